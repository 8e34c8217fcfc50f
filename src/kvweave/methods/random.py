"""Random eviction: the floor that a method has to beat (SPEC 10.10)."""

from dataclasses import dataclass

from kvweave.methods.base import Method
from kvweave.methods.options import integer
from kvweave.methods.registry import register
from kvweave.ops.draw import uniform
from kvweave.ops.select import top_and_recent
from kvweave.plan import Plan
from kvweave.view import LayerView


@register("random")
@dataclass(frozen=True)
class Random(Method):
    """Keeps the recent window and a uniform draw of the rest, without replacement.

    Seeded by (seed, layer, KV head), alike for every row, so that a row of a batch gives what it gives alone.
    """

    keeps_by = "chance, and the recent window"
    source = "-"

    recent: int = integer(32, minimum=0, help="last tokens that stay, at most half of the budget")
    seed: int = integer(0, minimum=0, help="of the draw")

    @property
    def needs_heads(self) -> str:
        return ""

    def plan(self, view: LayerView, budget: int) -> Plan:
        view = view.storage
        scores = uniform(self.seed, view.layer, view.positions, view.first_head)
        return Plan(top_and_recent(scores, budget, min(self.recent, budget // 2)))
