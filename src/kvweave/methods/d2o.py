"""D2O: layer budgets by the variance of attention, merges above a similarity (Wan et al., 2406.13035; SPEC 8)."""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from kvweave.methods.merging import MergingMethod
from kvweave.methods.needs import ALL_ROWS, Needs
from kvweave.methods.options import choice, real
from kvweave.methods.registry import register
from kvweave.ops import budget as counts
from kvweave.ops.match import nearest
from kvweave.ops.select import complement, top_and_recent
from kvweave.plan import Plan
from kvweave.view import LayerView


@register("d2o")
@dataclass(frozen=True)
class D2O(MergingMethod):
    """Keeps heavy hitters and recent tokens; a dropped token merges only if it is similar enough.

    The threshold is the mean similarity of the KV head's dropped tokens to their nearest kept one, averaged over
    turns. Layers of even attention get more of the budget.
    """

    keeps_by = "attention from all rows"
    merges_by = "nearest kept token above a similarity"
    allocates_by = "variance of attention"
    source = "2406.13035"

    var_norm: str = choice(
        "head_minmax", "head_minmax", "none", help="heads' variances scaled to [0, 1], or as printed"
    )
    recent_frac: float = real(0.25, lo=0, hi=1, help="share of the budget that is recent tokens")
    beta: float = real(0.7, lo=0, hi=1, help="share of the new similarity in the threshold of a later turn")

    layer_adaptive = True

    @property
    def needs(self) -> Needs:
        return replace(super().needs, rows=ALL_ROWS, statistics=(LayerView.column_sums,))

    def layer_weight(self, view: LayerView) -> Tensor:
        """F, [batch]: mean over heads of the variance over positions of the column sums."""
        variance = view.over_heads(view.column_sums().sum(2).var(-1))  # [batch, heads]
        if self.var_norm == "head_minmax":
            low, high = variance.amin(-1, keepdim=True), variance.amax(-1, keepdim=True)
            variance = (variance - low) / (high - low + 1e-6)
        return variance.mean(-1)

    def allocate(self, weights: list[float], budget: int, length: int) -> list[int]:
        low = min(weights)
        softmax = [math.exp(low - w) for w in weights]  # `allocate` normalises
        return counts.allocate(softmax, len(weights) * budget, counts.least(budget, length), length)

    def plan(self, view: LayerView, budget: int) -> Plan:
        mass = view.column_mass()
        keep = top_and_recent(mass, budget, min(counts.floor(self.recent_frac * budget), budget))
        source = complement(keep, view.length)
        target, cosine = nearest(view.keys, source, keep)
        threshold = cosine.mean(-1, keepdim=True)
        if view.memory is not None:  # a later turn: an exponential moving average
            threshold = self.beta * threshold + (1 - self.beta) * view.memory
        target = target.masked_fill(cosine < threshold, -1)
        return replace(self.merged(view, keep, source, target, cosine, mass), memory=threshold)
