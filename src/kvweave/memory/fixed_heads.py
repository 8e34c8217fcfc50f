"""Heads of unlike counts in one pair of buffers of fixed shape and address, for steps that are compiled or captured.

One head's slots follow those of the head before it. A token is written to all heads by one call, the model's mask is
looked up for all slots by one, and on a GPU one launch attends to all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvweave.memory.attend import by_kernel
from kvweave.memory.block import Block, Fixed
from kvweave.memory.fixed import FixedSlots, clear, with_room
from kvweave.memory.head_room import Layout
from kvweave.memory.heads import RaggedHeads, of_parts, ragged
from kvweave.memory.masks import biased_mask
from kvweave.memory.slots import Slots


class Buffers(NamedTuple):
    """All heads' slots, and room behind those of each.

    Attributes:
        keys, values: [batch, slots, dim].
        bias, positions: [batch, slots], as those of `FixedSlots`.
        masked: [batch, slots] in the keys' dtype, what the model's mask and the bias last came to: a kernel looks for
            it in one place.
        ends: int64 [kv_heads], where each head's first token to come goes.
        cursor: int64 [], tokens that came.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    positions: Tensor
    masked: Tensor
    ends: Tensor
    cursor: Tensor


@dataclass(frozen=True)
class FixedHeads(RaggedHeads):
    """A `Block` of KV heads that hold counts of their own, and room for tokens to come.

    Attributes:
        buffers: what the heads hold, one after the other.
        sizes: slots of each head, its room included.
        begin: each head's slots that lay there first.
    """

    buffers: Buffers = field(kw_only=True)
    sizes: tuple[int, ...] = field(kw_only=True)
    begin: tuple[Slots, ...] = field(kw_only=True)

    @classmethod
    @torch.inference_mode(False)  # a step writes to the buffers, in inference mode or outside
    def of(cls, heads: Sequence[Slots], tokens: int, column: int, valid: Tensor) -> "FixedHeads":
        """Slots of one KV head each, in order, with room for `tokens` more, as `FixedSlots.of` lays them out."""
        rooms = [with_room(head, tokens, column, valid) for head in heads]
        sizes = tuple(bias.shape[2] for bias, _ in rooms)
        layout = Layout.of(heads, sizes)
        for head, views in zip(heads, layout.views, strict=True):
            clear(*views, head.count)
        bias, positions = (torch.cat([x[:, 0] for x in each], 1) for each in zip(*rooms, strict=True))
        cursor = torch.tensor(0, device=bias.device)
        buffers = Buffers(layout.keys, layout.values, bias, positions, bias.clone(), layout.ends, cursor)
        for tensor in buffers:
            torch._dynamo.mark_static_address(tensor)  # a captured step writes to them in place
        begin = tuple(
            replace(head, keys=keys[:, :, : head.count], values=values[:, :, : head.count], room=None)
            for head, (keys, values) in zip(heads, layout.views, strict=True)
        )
        return cls((), column=column, buffers=buffers, sizes=sizes, begin=begin)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied, saved and sent: memory that another process may share is not written to."""
        return vars(self) | {"buffers": Buffers(*(x.clone() for x in self.buffers))}

    @property
    def parts(self) -> tuple[FixedSlots, ...]:
        """Each head's, views of the buffers."""
        own = self.buffers
        views = (x.split(self.sizes, 1) for x in (own.keys, own.values, own.bias, own.positions))
        return tuple(
            FixedSlots(
                k[:, None], v[:, None], bias[:, None], at[:, None], own.cursor + begin.count, begin, self.column
            )
            for begin, k, v, bias, at in zip(self.begin, *views, strict=True)
        )

    @property
    def fixed(self) -> tuple[Fixed, ...]:
        return (self,)

    @property
    def has_positions(self) -> bool:
        return True

    @property
    def seen(self) -> Tensor:
        """int64 [], logical length."""
        return self.buffers.cursor + self.column

    @property
    def columns(self) -> int:
        """Logical columns, those of all the room included."""
        return self.column + self.sizes[0] - self.begin[0].count

    def append(self, keys: Tensor, values: Tensor, column: int = 0) -> "FixedHeads":
        """One token, [batch, kv_heads, 1, dim], is written in place behind each head's; returns itself."""
        own = self.buffers
        at = own.ends + own.cursor
        own.keys.index_copy_(1, at, keys[:, :, 0])
        own.values.index_copy_(1, at, values[:, :, 0])
        own.bias.index_fill_(1, at, 0)
        own.cursor.add_(1)
        return self

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float | None, dropout: float) -> Tensor | None:
        """One launch on a GPU, elsewhere a call a head; None where query heads have masks of their own."""
        if dropout or (mask is not None and mask.shape[1] > 1):
            return None
        batch, heads, _, dim = query.shape
        own = self.buffers
        bias = own.bias
        if mask is not None:
            bias = biased_mask(mask, own.positions[:, None], bias[:, None], 1)[:, 0, 0]
        rows = query.reshape(batch, len(self.sizes), -1, dim)
        by_launch = by_kernel(None, 1, query, own.keys, own.values)
        if by_launch:  # a mask may come for the first time while a graph is captured: the address is always the same
            bias = own.masked.copy_(bias)
        keys, values, biases = (
            [x[:, None] for x in tensor.split(self.sizes, 1)] for tensor in (own.keys, own.values, bias)
        )
        if by_launch:
            from kvweave.ops import decode

            scaling = dim**-0.5 if scaling is None else scaling
            out = decode.attend_uneven(rows, keys, values, biases, scaling)
        else:
            each = zip(rows.split(1, 1), keys, values, biases, strict=True)
            calls = (F.scaled_dot_product_attention(q, k, v, b[:, :, None], scale=scaling) for q, k, v, b in each)
            out = torch.cat(list(calls), 1)
        return out.reshape(batch, 1, heads, -1)


def in_fixed_buffers(block: Block, tokens: int, column: int, valid: Tensor) -> Block:
    """`block` in buffers of fixed shape, as `FixedSlots.of` lays them out."""

    heads = ragged(block)
    if heads is None:
        return FixedSlots.of(block.as_slots(valid), tokens, column, valid)
    own = heads.one_by_one([part.as_slots(valid) for part in heads.parts])
    return FixedHeads.of(own, tokens, column, valid)


def out_of_fixed_buffers(block: Block) -> Block:
    """What `in_fixed_buffers` laid out, where it lies, no longer fixed (a host synchronisation)."""
    return of_parts(block, lambda part: part.out_of_room() if isinstance(part, FixedSlots) else part)
