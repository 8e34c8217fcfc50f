"""CriticalKV: what attention leaves open is decided by the weight of values (2502.03805; SPEC 16.11)."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvweave.methods.base import Method
from kvweave.methods.expected_attention import ExpectedAttention
from kvweave.methods.needs import Needs
from kvweave.methods.options import real, wrapped
from kvweave.methods.registry import register
from kvweave.methods.snapkv import SnapKV
from kvweave.methods.wrapping import ScoredWrapper
from kvweave.ops.budget import floor
from kvweave.ops.select import of_some, ragged_places, ranks_by
from kvweave.plan import Plan
from kvweave.view import LayerView

_BLOCK = 512  # tokens whose values are projected at a time


@register("critical", wrapper=True)
@dataclass(frozen=True)
class Critical(ScoredWrapper):
    """Keeps a first part of the free entries by a scored method, the others by its score times the norm of the value
    behind the output projection.

    Without that projection (no model, or an attention module that hides it) the value's own norm takes its place.
    """

    keeps_by = "the method's score, then times the projected value's norm"
    source = "2502.03805"

    method: Method = wrapped(SnapKV, help="the scored method that decides")
    first: float = real(0.5, lo=0, hi=1, help="share of the free entries that are kept by the method's score alone")
    offset: float = real(1e-4, lo=0, hi=float("inf"), open_hi=True, help="added to the score, scaled to sum 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.method, ExpectedAttention) and self.method.value_norm:
            warnings.warn(
                "critical of expected_attention with value_norm=True counts norms of values twice: value_norm=False "
                "leaves them to critical",
                stacklevel=3,
            )

    @property
    def needs(self) -> Needs:
        return replace(super().needs, projection=True)

    def planned(self, view: LayerView, budget: int | tuple[int, ...]) -> Plan:
        selection = self.inside.selection(view, budget)
        among, scores = selection.candidates, selection.scores
        score = scores.value.masked_fill(~among, 0)
        low = score.masked_fill(~among, torch.inf).amin(-1, keepdim=True).clamp(max=0)
        score = (score - low) * among
        total = score.sum(-1, keepdim=True)
        score = torch.where(total > 0, score / total.clamp(min=1e-30), 0)

        early = torch.tensor([floor(self.first * n) for n in selection.free.flatten().tolist()], device=score.device)
        sure = selection.top(early.view_as(selection.free))
        rest = among & ~sure
        weighed = replace(scores, value=(score + self.offset) * projected_norms(view))
        later = ranks_by(of_some(weighed.keys, rest)) < (selection.free - sure.sum(-1))[..., None]
        keep = sure | (rest & later) | (selection.forced & selection.valid)
        plan = self.inside.described(view, Plan(ragged_places(keep), uneven=not selection.even))
        return replace(plan, words={**plan.words, "projected": view.projection is not None})


def projected_norms(view: LayerView) -> Tensor:
    """Mean over a group's heads of |W_O v|_1, or |v|_1 where there is no projection: [batch, kv_heads, length]."""
    if view.projection is None:
        return view.values.to(torch.promote_types(view.values.dtype, torch.float32)).abs().sum(-1)
    return torch.cat([part.transpose(0, 1) for part in _norms(view, view.projection)], 1)


def _norms(view: LayerView, projection: Tensor) -> Iterator[Tensor]:
    """By KV head, [1 of them, batch, length]."""
    dim = view.values.shape[-1]
    wide = torch.promote_types(view.values.dtype, torch.float32)
    heads = projection.shape[1] // dim
    group = heads // view.kv_heads
    for head in range(view.kv_heads):
        parts = []
        for values in view.values[:, head].to(wide).split(_BLOCK, 1):
            sums = torch.zeros_like(values[..., 0])
            for h in range(head * group, (head + 1) * group):
                sums += torch.matmul(values, projection[:, h * dim : (h + 1) * dim].to(wide).mT).abs().sum(-1)
            parts.append(sums / group)
        yield torch.cat(parts, 1)[None]
