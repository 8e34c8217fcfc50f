"""MadaKV-style: modality preference by head (2506.15724, reduced; SPEC 10.9).

The paper's hierarchical compensation between layers is not part of this.
"""

from dataclasses import dataclass
from operator import methodcaller

import torch

from kvweave.methods.base import Method
from kvweave.methods.needs import Needs
from kvweave.methods.options import integer
from kvweave.methods.registry import register
from kvweave.ops.select import last, top_by_modality
from kvweave.plan import Plan
from kvweave.view import LayerView


@register("madakv")
@dataclass(frozen=True)
class MadaKV(Method):
    """Each head divides its budget between modalities as its last tokens divide their attention."""

    keeps_by = "window attention within each modality"
    allocates_by = "modality shares by head"
    source = "2506.15724, reduced"

    proxies: int = integer(32, minimum=1, help="last tokens whose attention is a token's importance; they stay")

    uses_modality = True

    @property
    def needs(self) -> Needs:
        return Needs(self.proxies, statistics=(methodcaller("window_attention", self.proxies),))

    def plan(self, view: LayerView, budget: int) -> Plan:
        recent = min(self.proxies, budget // 2)
        before, count = view.length - recent, budget - recent
        importance, visual = view.window_attention(self.proxies)[..., :before], view.visual[..., :before]
        share = (importance * visual).sum(-1) / importance.sum(-1).clamp(min=1e-30)  # [batch, kv_heads]
        visuals = torch.floor(share.double() * count + 0.5 + 1e-9).long()
        visuals = torch.minimum(visuals, visual.sum(-1))
        visuals = torch.maximum(visuals, count - (~visual).sum(-1))
        best = top_by_modality(importance, visual, visuals, count)
        return Plan(torch.cat([best, last(view.positions, recent)], -1), scope=("MadaKV-style",) * view.batch)
