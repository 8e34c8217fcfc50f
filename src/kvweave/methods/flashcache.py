"""FlashCache: tokens that deviate from the low frequencies of their sequence.

Source: Revisiting Multimodal KV Cache Compression: A Frequency-Domain-Guided Outlier-KV-Aware Approach (2511.16786);
SPEC 5. Reads no attention at all.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvweave.methods.allocation import Quota
from kvweave.methods.options import flag, integer, real
from kvweave.methods.registry import register
from kvweave.methods.scored import ScoredMethod
from kvweave.ops import budget as counts
from kvweave.ops.spectrum import above
from kvweave.view import LayerView


@register("flashcache")
@dataclass(frozen=True)
class FlashCache(ScoredMethod):
    """Keeps outliers: tokens whose keys and values lie far from a low-pass of the sequence.

    Layers whose energy lies in high frequencies get more of the budget.
    """

    keeps_by = "deviation from the low frequencies"
    allocates_by = "energy above the cutoff"
    source = "2511.16786"
    cost = "L log L D"

    gamma: float = real(0.2, lo=0, hi=1, help="share of the frequencies that count as low")
    per_head: bool = flag(False, help="each KV head keeps tokens of its own (the paper: one set a layer)")
    recent: int = integer(0, minimum=0, help="last tokens that stay, at most half of the mean budget")

    layer_adaptive = True

    def layer_weight(self, view: LayerView) -> Tensor:
        """Share of the energy above the cutoff, of keys and of values: [batch], in [0, 2]."""
        return self.outliers(view)[1]

    def allocate(self, weights: list[Any], budget: int, length: int) -> list[Any]:
        if self.pools:
            return super().allocate(weights, budget, length)
        return counts.allocate(weights, len(weights) * budget, 1, length)

    def quota(self, budget: int, mean_budget: int) -> Quota:
        return Quota(budget, recent=min(self.recent, mean_budget // 2, budget))

    def score(self, view: LayerView, quota: Quota) -> Tensor:
        return self.outliers(view)[0]

    def outliers(self, view: LayerView) -> tuple[Tensor, Tensor]:
        """Each token's deviation, [batch, kv_heads, length], and the layer's weight, [batch]."""
        return view.once(("outliers", self.gamma, self.per_head), lambda: self._outliers(view))

    def _outliers(self, view: LayerView) -> tuple[Tensor, Tensor]:
        tensors = view.keys, view.values
        (of_keys, key_energy), (of_values, value_energy) = above(tensors, counts.floor(self.gamma * view.length))
        deviation = of_keys + of_values
        weight = _share(view, of_keys, key_energy, tensors[0].shape[-1])
        weight = weight + _share(view, of_values, value_energy, tensors[1].shape[-1])
        if not self.per_head:
            deviation = view.over_heads(deviation).mean(1, keepdim=True).expand(-1, view.kv_heads, -1)
        return deviation, weight


def _share(view: LayerView, distance: Tensor, energy: Tensor, dim: int) -> Tensor:
    """Of keys or values of `dim` channels the share of the energy that lies above the cutoff: [batch]."""
    high, total = (view.over_heads(part).sum(1) for part in (distance.sum(-1) * dim, energy))
    return high / total.clamp(min=1e-30)
