"""VL-Cache: what the text after the images looks at, layers by the density of that (2410.23317; SPEC 10.6)."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from kvweave.methods.allocation import Quota
from kvweave.methods.needs import ALL_ROWS, Needs
from kvweave.methods.options import real
from kvweave.methods.registry import register
from kvweave.methods.scored import ScoredMethod
from kvweave.ops import budget as counts
from kvweave.view import LayerView


@register("vlcache")
@dataclass(frozen=True)
class VLCache(ScoredMethod):
    """Keeps recent tokens and those that the rows after the last image attend to.

    A layer in which these rows spread their attention widely gets more of the budget.
    """

    keeps_by = "attention from the rows after the images"
    allocates_by = "density of those rows"
    source = "2410.23317"
    attention_like = True

    p: float = real(0.01, lo=0, hi=1, help="share of a row's maximum above which an entry counts as dense")
    recent_frac: float = real(0.1, lo=0, hi=1, help="share of the budget that is recent tokens")

    layer_adaptive = True
    uses_modality = True

    @property
    def needs(self) -> Needs:
        return replace(super().needs, rows=ALL_ROWS)

    def rows(self, view: LayerView) -> int:
        """Rows after the last visual token; where there are none, the last 32."""

        def compute() -> int:
            visual = view.row_visual()[0]  # rows are planned one at a time
            shown = visual.nonzero().flatten().tolist()
            after = len(visual) - 1 - shown[-1] if shown else 0
            return after or min(32, len(visual))

        return view.once("rows after the images", compute)

    def layer_weight(self, view: LayerView) -> Tensor:
        return view.density(self.rows(view), self.p)

    def observe(self, view: LayerView) -> Any:
        if self.pools:
            return super().observe(view)
        self.score(view, self.quota(view.mean_budget, view.mean_budget))
        return self.layer_weight(view)

    def score(self, view: LayerView, quota: Quota) -> Tensor:
        """Attention received from these rows: [batch, kv_heads, length]."""
        return view.window_attention(self.rows(view), rows_by=self.rows_by, heads_by=self.heads_by)

    def quota(self, budget: int, mean_budget: int) -> Quota:
        return Quota(budget, recent=max(1, counts.floor(self.recent_frac * budget)) if budget > 1 else 0)

    def allocate(self, weights: list[Any], budget: int, length: int) -> list[Any]:
        if self.pools:
            return super().allocate(weights, budget, length)
        return counts.allocate(weights, len(weights) * budget, counts.least(budget, length), length)
