"""The full cache: nothing is cut. The reference that every other method is held against."""

from dataclasses import dataclass

from kvweave.methods.base import Method
from kvweave.methods.registry import register
from kvweave.ops.budget import Budget
from kvweave.ops.select import last
from kvweave.plan import Plan
from kvweave.view import LayerView


@register("full")
@dataclass(frozen=True)
class Full(Method):
    """Keeps everything, whatever the budget says."""

    keeps_by = "everything"
    source = "-"

    budget: Budget = 1.0

    def layer_budgets(self, budget: int, length: int, layers: int) -> list[int]:
        return [length] * layers

    @property
    def needs_heads(self) -> str:
        return ""

    def plan(self, view: LayerView, budget: int) -> Plan:
        view = view.storage
        return Plan(last(view.positions, view.length))
