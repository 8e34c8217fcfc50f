"""H2O: heavy hitters and a recent window (Zhang et al., 2306.14048; SPEC 10.2)."""

from dataclasses import dataclass, replace

from torch import Tensor

from kvweave.methods.allocation import Quota
from kvweave.methods.needs import ALL_ROWS, Needs
from kvweave.methods.registry import register
from kvweave.methods.scored import ScoredMethod
from kvweave.view import LayerView


@register("h2o")
@dataclass(frozen=True)
class H2O(ScoredMethod):
    """Keeps the tokens that received most attention from all rows, and as many recent ones."""

    keeps_by = "attention from all rows, and the recent half"
    source = "2306.14048"
    attention_like = True

    @property
    def needs(self) -> Needs:
        return replace(super().needs, rows=ALL_ROWS, by_slot=True)

    def quota(self, budget: int, mean_budget: int) -> Quota:
        return Quota(budget, recent=budget // 2)

    def score(self, view: LayerView, quota: Quota) -> Tensor:
        return view.column_mass(self.rows_by, self.heads_by)
