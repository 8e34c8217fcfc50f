"""H2O: heavy hitters and a recent window (Zhang et al., 2306.14048; SPEC 10.2)."""

from dataclasses import dataclass

from kvweave.methods.base import ALL_ROWS, Method
from kvweave.methods.registry import register
from kvweave.ops.select import top_and_recent
from kvweave.plan import Plan
from kvweave.view import LayerView


@register("h2o")
@dataclass(frozen=True)
class H2O(Method):
    """Keeps the tokens that received most attention from all rows, and as many recent ones."""

    keeps_by = "attention from all rows, and the recent half"
    source = "2306.14048"

    @property
    def query_rows(self) -> int:
        return ALL_ROWS

    def plan(self, view: LayerView, budget: int) -> Plan:
        return Plan(top_and_recent(view.column_mass(), budget, budget // 2))
