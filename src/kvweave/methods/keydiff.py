"""KeyDiff: keys unlike the others (Park et al., 2504.15364; SPEC 16.2)."""

from dataclasses import dataclass

from torch import Tensor

from kvweave.methods.allocation import Quota
from kvweave.methods.options import integer
from kvweave.methods.registry import register
from kvweave.methods.scored import ScoredMethod
from kvweave.ops.match import unit
from kvweave.view import LayerView


@register("keydiff")
@dataclass(frozen=True)
class KeyDiff(ScoredMethod):
    """Keeps the tokens whose keys point away from the mean direction of all keys; reads no attention."""

    keeps_by = "keys unlike the mean key"
    source = "2504.15364"
    cost = "L D"

    recent: int = integer(0, minimum=0, help="last tokens that stay, at most half of the budget")
    sinks: int = integer(0, minimum=0, help="first tokens that stay, at most half of the rest")

    def score(self, view: LayerView, quota: Quota) -> Tensor:
        """1 - cos(k_j, u), u the mean of the keys' directions: [batch, kv_heads, length]."""
        keys, weights = unit(view.keys), view.slot_weights()[..., None]
        anchor = (keys * weights).sum(2, keepdim=True) / weights.sum(2, keepdim=True)
        return 1 - (keys * unit(anchor)).sum(-1)
