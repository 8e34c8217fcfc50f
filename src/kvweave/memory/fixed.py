"""Slots in buffers whose shape and address never change, for decode steps that are compiled or captured."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvweave.memory.attend import attend
from kvweave.memory.block import Fixed
from kvweave.memory.masks import biased_mask
from kvweave.memory.slots import Room, Slots

_ROUND = 64  # capacities are multiples of it, so that few shapes are compiled


@dataclass(frozen=True)
class FixedSlots:
    """Slots and room for tokens to come; where the next one goes is known on the device alone.

    Attributes:
        keys, values: [batch, kv_heads, capacity, dim].
        bias: [batch, kv_heads, capacity] in the keys' dtype, added to logits: least where there is no token, or one
            that the prompt's mask hides.
        positions: int64 [batch, kv_heads, capacity], logical columns of the slots and of those to come.
        cursor: int64 [], slot of the next token.
        start: the slots that lay there first, views of the buffers.
        column: logical column of the first token that comes.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    positions: Tensor
    cursor: Tensor
    start: Slots
    column: int

    @classmethod
    @torch.inference_mode(False)
    def of(cls, slots: Slots, tokens: int, column: int, valid: Tensor) -> "FixedSlots":
        """`slots`, whose positions are written out, with room for `tokens` more, of columns from `column` on.

        Args:
            valid: bool [batch, columns], those that a token to come sees.
        """
        count = slots.count
        bias, positions = with_room(slots, tokens, column, valid)
        room = Room.of(slots, bias.shape[2])
        clear(room.keys, room.values, count)
        cursor = torch.tensor(count, device=slots.keys.device)
        for tensor in (room.keys, room.values, bias, positions, cursor):
            torch._dynamo.mark_static_address(tensor)  # a captured step writes to them in place
        start = replace(slots, keys=room.keys[:, :, :count], values=room.values[:, :, :count], room=None)
        return cls(room.keys, room.values, bias, positions, cursor, start, column)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied, saved and sent: memory that another process may share is not written to."""
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in vars(self).items()}

    def append(self, keys: Tensor, values: Tensor, column: int = 0) -> "FixedSlots":
        """One token, [batch, kv_heads, 1, dim], is written in place, where `cursor` says; returns itself."""
        at = self.cursor.view(1)
        self.keys.index_copy_(2, at, keys)
        self.values.index_copy_(2, at, values)
        self.bias.index_fill_(2, at, 0)
        self.cursor.add_(1)
        return self

    @property
    def seen(self) -> Tensor:
        """int64 [], logical length."""
        return self.cursor + (self.column - self.start.count)

    @property
    def columns(self) -> int:
        """Logical columns, those of all the room included."""
        return self.column + self.keys.shape[2] - self.start.count

    @property
    def nbytes(self) -> int:
        return self.as_slots().nbytes

    @property
    def has_positions(self) -> bool:
        return True

    @property
    def parts(self) -> "tuple[FixedSlots, ...]":
        return (self,)

    @property
    def fixed(self) -> tuple[Fixed, ...]:
        return (self,)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    def rows(self, index: Tensor) -> Slots:
        """Of no fixed address any more."""
        return self.out_of_room().rows(index)

    def before(self, column: int, length: int) -> Slots:
        """Of no fixed address any more."""
        return self.out_of_room().before(column, length)

    def as_slots(self, valid: Tensor | None = None, *, padded: bool | None = None) -> Slots:
        """The same as slots of a known number (a host synchronisation)."""
        return self.out_of_room().as_slots(valid)

    def outline(self, valid: Tensor | None = None) -> Slots:
        return self.out_of_room().outline(valid)

    def out_of_room(self) -> Slots:
        """The slots where they lie, no longer fixed (a host synchronisation)."""
        count = int(self.cursor)
        room = Room(self.keys, self.values, None) if self.start.added(self.keys.dtype) is None else None
        return replace(
            self.start,
            keys=self.keys[:, :, :count],
            values=self.values[:, :, :count],
            tail=count - self.start.count,
            column=self.column,
            room=room,
        )

    def mask(self, mask: Tensor | None, queries: Tensor) -> Tensor | None:
        return (
            self.bias[:, :, None] if mask is None else biased_mask(mask, self.positions, self.bias, queries.shape[1])
        )

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float | None, dropout: float) -> Tensor:
        return attend(query, self.keys, self.values, mask, scaling, dropout)


def with_room(slots: Slots, tokens: int, column: int, valid: Tensor) -> tuple[Tensor, Tensor]:
    """What is added to the logits of the slots and of those to come, and their columns.

    Args:
        slots, tokens, column, valid: as in `FixedSlots.of`.
    Returns:
        bias and positions, [batch, kv_heads, capacity], as those of `FixedSlots`.
    """
    count = slots.count
    capacity = -(-(count + tokens) // _ROUND) * _ROUND
    added = slots.added(slots.keys.dtype)
    if added is None:
        added = slots.keys.new_zeros(slots.keys.shape[:3])
    least = torch.finfo(added.dtype).min
    hidden = slots.stands_for_others_than(valid)
    bias = F.pad(added.masked_fill(hidden, least), (0, capacity - count), value=least)
    columns = torch.arange(column, column + capacity - count, device=bias.device).clamp(max=column + tokens - 1)
    positions = slots.all_positions()
    return bias, torch.cat([positions, columns.expand(*positions.shape[:2], -1)], -1)


def clear(keys: Tensor, values: Tensor, count: int) -> None:
    """Zero the room behind `count` slots: it is never read, and not a number would spread."""
    keys[:, :, count:] = 0
    values[:, :, count:] = 0
