"""MEDA: layer budgets by cross-modal entropy (Wan et al., 2502.17599; SPEC 7)."""

import math
from dataclasses import dataclass

from torch import Tensor

from kvweave.methods.lookm import LookM
from kvweave.methods.options import choice, flag, integer, real
from kvweave.methods.registry import register
from kvweave.ops import budget as counts
from kvweave.ops.merge import RULES
from kvweave.view import LayerView


@register("meda")
@dataclass(frozen=True)
class Meda(LookM):
    """LOOK-M within layer budgets: a layer whose modalities look widely at each other keeps more."""

    keeps_by = "attention from all rows, text first"
    merges_by = "nearest kept token"
    allocates_by = "cross-modal entropy"
    source = "2502.17599"

    merge_rule: str = choice("average", *RULES, help="weights of the members of a merged entry")
    recent_frac: float = real(0.75, lo=0, hi=1, help="share of the budget that is recent tokens")
    causal: bool = flag(False, help="entropy over earlier tokens only (the paper: over all of the other modality)")

    entropy_rows: int = integer(
        0, minimum=0, help="rows, drawn from both modalities, that estimate the entropy; 0: all, as published"
    )

    layer_adaptive = True

    def layer_weight(self, view: LayerView) -> Tensor:
        """Mean over heads of the entropy of text over visual keys and of visual over text keys, nats: [batch]."""
        return view.cross_entropy(causal=self.causal, rows=self.entropy_rows)

    def allocate(self, weights: list[float], budget: int, length: int) -> list[int]:
        top = max(weights)
        softmax = [math.exp(w - top) for w in weights]  # `allocate` normalises
        return counts.allocate(softmax, len(weights) * budget, counts.least(budget, length), length)
