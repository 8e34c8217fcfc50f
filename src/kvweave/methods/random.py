"""Random eviction: the floor that a method has to beat (METHODS 10.10)."""

from dataclasses import dataclass

import torch

from kvweave.layer import LayerView
from kvweave.methods.base import Method, register
from kvweave.methods.options import integer
from kvweave.ops.select import top_and_recent
from kvweave.plan import Plan


@register("random")
@dataclass(frozen=True)
class Random(Method):
    """Keeps the recent window and a uniform draw of the rest, without replacement.

    Seeded by (seed, layer, KV head), alike for every row, so that a row of a batch gives what it gives alone.
    """

    recent: int = integer(32, minimum=0, help="last tokens that stay, at most half of the budget")
    seed: int = integer(0, minimum=0, help="of the draw")

    def plan(self, view: LayerView, budget: int) -> Plan:
        scores = torch.empty(view.kv_heads, view.length)
        for head in range(view.kv_heads):
            generator = torch.Generator().manual_seed((self.seed << 32) + (view.layer << 16) + head)
            scores[head] = torch.rand(view.length, generator=generator)
        scores = scores.to(view.keys.device).expand(view.batch, -1, -1)
        return Plan(top_and_recent(scores, budget, min(self.recent, budget // 2)))
