"""Chelsea-style: chunked soft matching, round by round (2506.11418, reduced to its abstract; SPEC 9.1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvweave.methods.merging import MergingMethod
from kvweave.methods.options import choice, integer
from kvweave.methods.registry import register
from kvweave.ops.match import take, unit
from kvweave.ops.merge import RULES, segment_sum
from kvweave.ops.select import best, complement
from kvweave.plan import Plan
from kvweave.view import LayerView

_RULES = [rule for rule in RULES if rule != "importance"]  # it reads no attention


@dataclass
class Entries:
    """The shortened sequence, and where each token has gone.

    Attributes:
        keys: [batch, kv_heads, entries, dim], mass-weighted means; mass: [batch, kv_heads, entries].
        position: int64 [batch, kv_heads, entries], ascending.
        owner: int64 [batch, kv_heads, tokens], the entry that each token is in.
    """

    keys: Tensor
    mass: Tensor
    position: Tensor
    owner: Tensor


@register("chelsea")
@dataclass(frozen=True)
class Chelsea(MergingMethod):
    """Pairs of similar neighbours within a chunk merge, until the budget is met.

    In each round every other entry of a chunk looks for its most similar one among the rest of the chunk; the most
    similar pairs merge, at the position of the heaviest member. Chunks that have shrunk to one entry join in pairs.
    """

    keeps_by = "similarity alone"
    merges_by = "most similar neighbour, round by round"
    source = "2506.11418, reduced"
    cost = "L chunk D"

    chunk: int = integer(64, minimum=1, help="tokens among which a match is sought at first")
    recent: int = integer(32, minimum=0, help="last tokens that stay, at most half of the budget")
    merge_rule: str = choice("average", *_RULES, help="weights of the members of a merged entry")

    def plan(self, view: LayerView, budget: int) -> Plan:
        recent = min(self.recent, budget // 2)
        before = view.length - recent
        position = torch.arange(before, device=view.keys.device).expand(view.batch, view.kv_heads, -1)
        keys = view.keys[:, :, :before].to(torch.promote_types(view.keys.dtype, torch.float32))
        mass = view.mass[..., :before].to(keys.dtype)
        entries = Entries(keys, mass, position, position)
        size = self.chunk
        while (excess := entries.mass.shape[-1] - (budget - recent)) > 0:
            pairs = best_pairs(entries, size)
            if pairs is None:
                size *= 2
            else:
                entries = join_pairs(entries, *pairs, excess)
        return self.by_owner(view, entries, before)

    def by_owner(self, view: LayerView, entries: Entries, before: int) -> Plan:
        """The plan that merges every token into the entry that it ended in."""
        recents = torch.arange(before, view.length, device=view.keys.device)
        recents = recents.expand(view.batch, view.kv_heads, -1)
        keep = torch.cat([entries.position, recents], -1)
        source = complement(keep, view.length)  # none of them is recent
        target = entries.owner.gather(-1, source)
        to = keep.gather(-1, target)
        cosine = (unit(take(view.keys, source)) * unit(take(view.keys, to))).sum(-1)
        return self.merged(view, keep, source, target, cosine)


def best_pairs(entries: Entries, size: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """For every other entry of each chunk its most similar one among the rest of the chunk.

    Until the last round all heads merge alike, so that an entry's place in its chunk is the same in all of them.

    Returns:
        indices of the entries that ask, [asking]; the entry that each found, [batch, kv_heads, asking]; their cosine.
        None if no chunk holds two entries.
    """
    number = entries.position[0, 0] // size  # the chunk of each entry
    _, sizes = torch.unique_consecutive(number, return_counts=True)
    starts = sizes.cumsum(0) - sizes
    place = torch.arange(len(number), device=number.device) - starts.repeat_interleave(sizes)
    alone = (sizes == 1).repeat_interleave(sizes)
    asking = ((place % 2 == 0) & ~alone).nonzero().flatten()
    if not len(asking):
        return None
    widest = int(sizes.max()) // 2
    # the entries at odd places of each chunk, padded: [chunks, widest]
    odd = starts[:, None] + 1 + 2 * torch.arange(widest, device=number.device)
    there = odd < (starts + sizes)[:, None]
    chunk = torch.arange(len(sizes), device=number.device).repeat_interleave(sizes)[asking]
    goals, open_ = odd.clamp(max=len(number) - 1)[chunk], there[chunk]  # [asking, widest]
    keys = unit(entries.keys)
    similarity = torch.einsum("bhad,bhawd->bhaw", keys[:, :, asking], keys[:, :, goals])
    cosine, which = similarity.masked_fill(~open_, -torch.inf).max(-1)
    targets = goals.expand(*which.shape, widest).gather(-1, which[..., None])[..., 0]
    return asking, targets, cosine


def join_pairs(entries: Entries, asking: Tensor, targets: Tensor, cosine: Tensor, excess: int) -> Entries:
    """The sequence after the most similar pairs, `excess` at most, have merged."""
    batch, kv_heads, count = entries.mass.shape
    merging = best(cosine, min(excess, len(asking)))  # [batch, kv_heads, asking]
    into = torch.arange(count, device=asking.device).expand(batch, kv_heads, -1)
    asks = asking.expand(batch, kv_heads, -1)
    into = into.scatter(-1, asks, torch.where(merging, targets, asks))
    mass = segment_sum(entries.mass, into, count)
    keys = segment_sum(entries.keys * entries.mass[..., None], into, count) / mass[..., None].clamp(min=1e-30)
    heaviest = torch.zeros_like(mass).scatter_reduce_(-1, into, entries.mass, "amax")
    far = torch.iinfo(torch.int64).max
    candidate = entries.position.masked_fill(entries.mass < heaviest.gather(-1, into), far)
    position = torch.full_like(into, far).scatter_reduce_(-1, into, candidate, "amin")
    order = position.argsort(-1)[..., : count - min(excess, len(asking))]  # those merged away come last
    place = torch.empty_like(into).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return Entries(
        take(keys, order),
        mass.gather(-1, order),
        position.gather(-1, order),
        place.gather(-1, into.gather(-1, entries.owner)),
    )
