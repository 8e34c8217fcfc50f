"""Knorm: keys of small norm (Devoto et al., 2406.11430; SPEC 16.3)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvweave.methods.allocation import Quota
from kvweave.methods.options import integer
from kvweave.methods.registry import register
from kvweave.methods.scored import ScoredMethod
from kvweave.view import LayerView


@register("knorm")
@dataclass(frozen=True)
class Knorm(ScoredMethod):
    """Keeps the tokens whose keys are shortest, which attention favours; reads no attention.

    The authors leave the first two layers whole; here all are cut, for equal budgets.
    """

    keeps_by = "short keys"
    source = "2406.11430"
    cost = "L D"

    recent: int = integer(0, minimum=0, help="last tokens that stay, at most half of the budget")
    sinks: int = integer(0, minimum=0, help="first tokens that stay, at most half of the rest")

    def score(self, view: LayerView, quota: Quota) -> Tensor:
        return -view.keys.to(torch.promote_types(view.keys.dtype, torch.float32)).norm(dim=-1)
