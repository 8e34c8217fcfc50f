"""VL-Cache: what the text after the images looks at, layers by the density of that (2410.23317; SPEC 10.6)."""

from dataclasses import dataclass

from torch import Tensor

from kvweave.methods.base import ALL_ROWS, Method
from kvweave.methods.options import real
from kvweave.methods.registry import register
from kvweave.ops import budget as counts
from kvweave.ops.select import top_and_recent
from kvweave.plan import Plan
from kvweave.view import LayerView


@register("vlcache")
@dataclass(frozen=True)
class VLCache(Method):
    """Keeps recent tokens and those that the rows after the last image attend to.

    A layer in which these rows spread their attention widely gets more of the budget.
    """

    keeps_by = "attention from the rows after the images"
    allocates_by = "density of those rows"
    source = "2410.23317"

    p: float = real(0.01, lo=0, hi=1, help="share of a row's maximum above which an entry counts as dense")
    recent_frac: float = real(0.1, lo=0, hi=1, help="share of the budget that is recent tokens")

    layer_adaptive = True
    uses_modality = True

    @property
    def query_rows(self) -> int:
        return ALL_ROWS

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

    def observe(self, view: LayerView) -> Tensor:
        self.score(view)
        return self.layer_weight(view)

    def score(self, view: LayerView) -> Tensor:
        """Attention received from these rows: [batch, kv_heads, length]."""
        return view.window_attention(self.rows(view))

    def allocate(self, weights: list[float], budget: int, length: int) -> list[int]:
        return counts.allocate(weights, len(weights) * budget, counts.least(budget, length), length)

    def plan(self, view: LayerView, budget: int) -> Plan:
        recent = max(1, counts.floor(self.recent_frac * budget)) if budget > 1 else 0
        return Plan(top_and_recent(self.score(view), budget, recent))
