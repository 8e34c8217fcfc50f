"""StreamingLLM: attention sinks and a recent window (Xiao et al., 2309.17453; SPEC 10.1)."""

from dataclasses import dataclass

import torch

from kvweave.methods.base import Method
from kvweave.methods.options import integer
from kvweave.methods.registry import register
from kvweave.ops.select import last
from kvweave.plan import Plan
from kvweave.view import LayerView


@register("streaming_llm")
@dataclass(frozen=True)
class StreamingLLM(Method):
    """Keeps the first tokens, which attention falls back on, and the last ones; reads no attention.

    Kept entries keep their rotary phase (the paper re-indexes them).
    """

    keeps_by = "place: sinks and the recent window"
    source = "2309.17453"

    sinks: int = integer(4, minimum=0, help="first tokens that stay, at most budget - 1")

    @property
    def needs_heads(self) -> str:
        return ""

    def plan(self, view: LayerView, budget: int) -> Plan:
        view = view.storage
        sinks = min(self.sinks, budget - 1)
        first = torch.arange(sinks, device=view.keys.device).expand(view.batch, view.kv_heads, -1)
        return Plan(torch.cat([first, last(view.positions, budget - sinks)], -1))
