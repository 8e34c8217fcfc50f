"""Peak: what some row of the prompt once looked at closely (SPEC 13.2; KVzip, 2505.23416, scores alike)."""

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from kvweave.methods.allocation import Quota
from kvweave.methods.needs import ALL_ROWS, Needs
from kvweave.methods.options import choice, integer
from kvweave.methods.registry import register
from kvweave.methods.scored import ScoredMethod
from kvweave.view import LayerView


@register("peak")
@dataclass(frozen=True)
class Peak(ScoredMethod):
    """Keeps the recent tokens and those that received most attention from any single row.

    KVzip takes that maximum while the model repeats its context; here it is the prompt's own, or with probes also
    what their answers attend to.
    """

    keeps_by = "largest attention from any row"
    source = "2505.23416, reduced"
    attention_like = True

    recent: int = integer(32, minimum=0, help="last tokens that stay, at most half of the budget")
    _: KW_ONLY
    rows_by: str = choice("max", "mean", "max", help="attention of the prompt's rows: the largest, or their sum")

    @property
    def needs(self) -> Needs:
        # D of SPEC 13.1, whatever the prompt's own rows are reduced by
        return Needs(ALL_ROWS, decoded=(("mean", self.heads_by),), by_slot=True)

    def score(self, view: LayerView, quota: Quota) -> Tensor:
        return peak_score(view, self.rows_by, self.heads_by)


def peak_score(view: LayerView, rows_by: str = "max", heads_by: str = "mean") -> Tensor:
    """The largest attention of any row, beside what decoded tokens attend to: [batch, kv_heads, length]."""
    peak, decoded = view.received(rows_by, heads_by), view.decoded_attention("mean", heads_by)
    if decoded is None:
        return peak
    if not view.probed:
        return (1 - view.decoded_weight) * peak + view.decoded_weight * decoded
    most = decoded.amax(-1, keepdim=True).clamp(min=1e-30)
    return decoded / most + 0.5 * peak
