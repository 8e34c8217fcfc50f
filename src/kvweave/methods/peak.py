"""Peak: what some row of the prompt once looked at closely (SPEC 13.2; KVzip, 2505.23416, scores alike)."""

from dataclasses import dataclass

from torch import Tensor

from kvweave.methods.base import ALL_ROWS, Method
from kvweave.methods.options import integer
from kvweave.methods.registry import register
from kvweave.ops.select import top_and_recent
from kvweave.plan import Plan
from kvweave.view import LayerView


@register("peak")
@dataclass(frozen=True)
class Peak(Method):
    """Keeps the recent tokens and those that received most attention from any single row.

    KVzip takes that maximum while the model repeats its context; here it is the prompt's own, or with probes also
    what their answers attend to.
    """

    keeps_by = "largest attention from any row"
    source = "2505.23416, reduced"

    recent: int = integer(32, minimum=0, help="last tokens that stay, at most half of the budget")

    @property
    def query_rows(self) -> int:
        return ALL_ROWS

    def plan(self, view: LayerView, budget: int) -> Plan:
        return Plan(top_and_recent(peak_score(view), budget, min(self.recent, budget // 2)))


def peak_score(view: LayerView) -> Tensor:
    """The largest attention of any row, beside what decoded tokens attend to: [batch, kv_heads, length]."""
    peak = view.peak_attention()
    if view.decoded is None:
        return peak
    if not view.probed:
        return (1 - view.decoded_weight) * peak + view.decoded_weight * view.decoded
    most = view.decoded.amax(-1, keepdim=True).clamp(min=1e-30)
    return view.decoded / most + 0.5 * peak
