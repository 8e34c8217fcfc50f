"""PyramidKV: SnapKV with budgets that fall with depth (Cai et al., 2406.02069; SPEC 10.4)."""

from dataclasses import dataclass
from typing import Any

from kvweave.methods.allocation import Quota
from kvweave.methods.options import real
from kvweave.methods.registry import register
from kvweave.methods.snapkv import SnapKV
from kvweave.ops.budget import largest_remainder


@register("pyramidkv")
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Lower layers, which gather information, keep more; upper ones, where it has gathered, less."""

    keeps_by = "pooled attention from the last rows"
    allocates_by = "depth: lower layers more"
    source = "2406.02069"

    beta: float = real(20.0, lo=1, hi=float("inf"), help="steepness: the top layer keeps 1/beta of the mean")

    def layer_budgets(self, budget: int, length: int, layers: int) -> list[Any]:
        if self.allocation in ("global", "profile") or layers == 1 or budget == 1 or budget >= length:
            return super().layer_budgets(budget, length, layers)
        recent = self.quota(budget, budget).recent
        smallest = (budget - recent) / self.beta
        largest = 2 * (budget - recent) - smallest
        if largest > length - recent:
            largest = length - recent
            smallest = 2 * (budget - recent) - largest
        step = (largest - smallest) / (layers - 1)
        shares = [recent + largest - layer * step for layer in range(layers)]
        return largest_remainder(shares, layers * budget, [length] * layers)

    def quota(self, budget: int, mean_budget: int) -> Quota:
        return Quota(budget, recent=min(self.window, mean_budget // 2, budget))
