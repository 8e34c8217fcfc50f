"""InfiniPot-V: of older frames what has changed since, and what has large values (2506.15745; SPEC 18)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvweave.methods.base import Method
from kvweave.methods.options import integer, real
from kvweave.methods.registry import register
from kvweave.ops import budget as counts
from kvweave.ops.match import unit
from kvweave.ops.merge import segment_sum
from kvweave.ops.select import of_some, ragged_places, ranks_by
from kvweave.plan import Plan
from kvweave.view import LayerView


@register("infinipot")
@dataclass(frozen=True)
class InfiniPot(Method):
    """Keeps text and the newest frames whole; of older frames the tokens whose keys differ from what stands at their
    place now, and those of largest values. Made for video of any length: `CompressedCache(config, method, every=n)`
    with a few frames' tokens as n.

    A frame is a run of visual tokens, a token's place its number in the run. Text is at most half of the budget, the
    latest; where older frames hold too little, more of it stays.
    """

    keeps_by = "text, new frames, change since, value norms"
    source = "2506.15745"
    cost = "L D"
    uses_modality = True

    newest: int = integer(1, minimum=0, help="last frames that stay whole, as far as text leaves room")
    share: float = real(0.5, lo=0, hi=1, help="of what is left: tokens that have changed; the rest by value norm")

    def plan(self, view: LayerView, budget: int) -> Plan:
        valid = torch.ones_like(view.visual) if view.empty is None else ~view.empty
        text, visual = valid & ~view.visual, valid & view.visual
        frame, place = frames(visual)
        new = visual & (frame > frame.amax(-1, keepdim=True) - self.newest)
        old = visual & ~new

        words = latest(text, torch.full_like(text[..., :1], budget // 2, dtype=torch.int64))
        forced = words | latest(new, budget - words.sum(-1, keepdim=True))
        room = budget - forced.sum(-1, keepdim=True)
        alike = self.likeness(view, new, place)
        changed = old & (ranks_by(of_some([-alike], old)) < torch.floor(self.share * room.double() + counts.GUARD))

        order = torch.arange(view.length, device=valid.device).expand_as(frame).to(alike.dtype)
        tier = 4.0 * forced + 3.0 * changed + 2.0 * (old & ~changed) + 1.0 * (valid & ~old & ~forced)
        norm = torch.linalg.vector_norm(view.values.to(alike.dtype), dim=-1)
        keep = valid & (ranks_by([tier, torch.where(old, norm, order)]) < budget)
        return Plan(ragged_places(keep), uneven=view.empty is not None)

    def likeness(self, view: LayerView, new: Tensor, place: Tensor) -> Tensor:
        """Cosine of each key with the mean key at its place of the newest frames, 0 where they lack it.

        Args:
            new: bool [batch, kv_heads, length], tokens of the newest frames; place: int64, alike.
        Returns:
            [batch, kv_heads, length].
        """
        keys, at = view.keys.to(torch.promote_types(view.keys.dtype, torch.float32)), place.clamp(min=0)
        weights = (view.slot_weights() * new).to(keys.dtype)
        here = place.masked_fill(~new, -1)
        sums = segment_sum(keys * weights[..., None], here, view.length)
        there = sums.gather(2, at[..., None].expand_as(keys))  # a mean's length is no matter to a cosine
        return (unit(keys) * unit(there)).sum(-1)


def frames(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Number of each token's run of True, and its place in the run; both -1 where it is False.

    Args:
        mask: bool [batch, kv_heads, length].
    """
    before = torch.nn.functional.pad(mask[..., :-1], (1, 0))
    begins = mask & ~before
    slots = torch.arange(mask.shape[-1], device=mask.device).expand_as(mask)
    start = slots.masked_fill(~begins, 0).cummax(-1).values
    return (begins.cumsum(-1) - 1).masked_fill(~mask, -1), (slots - start).masked_fill(~mask, -1)


def latest(some: Tensor, count: Tensor) -> Tensor:
    """The last `count` [batch, kv_heads, 1] of `some`, bool [batch, kv_heads, length]."""
    behind = some.flip(-1).cumsum(-1).flip(-1)  # from each one on
    return some & (behind <= count)
