"""What memory holds of a layer: keys, values, and which tokens they stand for."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvweave.memory.attend import attend
from kvweave.memory.masks import slot_mask

FEW = 16  # new slots up to which decoding is assumed, and the least room that is made for more


class Room(NamedTuple):
    """Buffers whose first slots are those of a block.

    Attributes:
        keys, values: [batch, kv_heads, capacity, dim].
        bias: [batch, kv_heads, capacity] in the keys' dtype, added to the slots' logits: least where a slot is
            empty, 0 for tokens to come, which nobody writes again; None where nothing is added.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None

    @classmethod
    @torch.inference_mode(False)  # decoding writes to the buffers, in inference mode or outside
    def of(cls, slots: "Slots", capacity: int) -> "Room":
        """Room for `capacity` slots that begins with `slots`."""
        bias = slots.added(slots.keys.dtype)
        if bias is not None:
            bias = F.pad(bias, (0, capacity - bias.shape[2]))
        return cls(_with_room(slots.keys, capacity), _with_room(slots.values, capacity), bias)

    def write(self, keys: Tensor, values: Tensor, start: int) -> None:
        """Put new slots behind the first `start`."""
        end = start + keys.shape[2]
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values


@dataclass
class Slots:
    """Entries of some KV heads that hold equally many, side by side.

    Decoding appends a token at a time: keys and values then lie in buffers with room for more, and what is known of
    the new slots (next column, mass 1, no bias) is not written out until somebody asks.

    Attributes:
        keys, values: [batch, kv_heads, slots, dim].
        positions: int64 [batch, kv_heads, slots - tail], logical column of each slot, -1: empty; None: slot j is
            column j.
        mass: float32 [batch, kv_heads, slots - tail], tokens a slot stands for; None with `positions`.
        bias: float32 [batch, kv_heads, slots - tail], added to the slots' logits, or None.
        has_empty: some slot is empty.
        tail: slots at the end of which `positions`, `mass` and `bias` do not speak: columns from `column` on.
        room: buffers whose first slots these are, or None.
        spare: slots in front, counted over heads, that hold nothing in any row: room, where heads of like counts lie
            side by side.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor | None = None
    mass: Tensor | None = None
    bias: Tensor | None = None
    has_empty: bool = False
    tail: int = 0
    column: int = 0
    room: Room | None = None
    spare: int = 0

    fixed: ClassVar[tuple[()]] = ()

    def __getstate__(self) -> dict[str, Any]:
        """What is copied, saved and sent: the slots, and not the room behind them."""
        keys, values = (x if self.room is None else x.clone() for x in (self.keys, self.values))
        return vars(self) | {"keys": keys, "values": values, "room": None}

    @property
    def count(self) -> int:
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        batch, kv_heads, slots, _ = self.keys.shape  # room, in front and behind, is not counted
        entries = batch * (kv_heads * slots - self.spare)
        return entries * sum(x.shape[3] * x.element_size() for x in (self.keys, self.values))

    @property
    def has_positions(self) -> bool:
        return self.positions is not None

    @property
    def parts(self) -> "tuple[Slots, ...]":
        return (self,)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    # ---------------------------------------------------------------- coming and going

    def append(self, keys: Tensor, values: Tensor, column: int) -> "Slots":
        """These slots and new ones; a few are written behind the old ones where there is room for them."""
        new, total = keys.shape[2], self.count + keys.shape[2]
        if new > FEW or keys.requires_grad:
            room = None
            grown = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        else:
            room = self.room
            if room is None or room.keys.shape[2] < total:
                room = Room.of(self, total + max(FEW, total // 4))
            room.write(keys, values, self.count)
            grown = room.keys[:, :, :total], room.values[:, :, :total]
        if self.positions is None:
            return Slots(*grown, room=room)
        first = self.column if self.tail else column
        return replace(self, keys=grown[0], values=grown[1], tail=self.tail + new, column=first, room=room)

    def rows(self, index: Tensor) -> "Slots":
        return self._each(lambda x: x[index.to(x.device)])

    def before(self, column: int, length: int) -> "Slots":
        if self.positions is None or length - column <= self.tail:
            removals = length - column
            rest = replace(
                self, keys=self.keys[:, :, : self.count - removals], values=self.values[:, :, : self.count - removals]
            )
            return replace(rest, tail=self.tail - removals) if self.positions is not None else rest
        # Decoded tokens lie at the end of every head; those of a prompt that was cut may lie anywhere.
        everything = self.as_slots()
        assert everything.positions is not None
        rest = everything.first(everything.count - int((everything.positions >= column).sum(-1).min()))
        assert rest.positions is not None
        assert rest.mass is not None
        gone_slots = rest.positions >= column
        if bool(gone_slots.any()):
            rest.positions = rest.positions.masked_fill(gone_slots, -1)
            rest.mass = rest.mass.masked_fill(gone_slots, 0)
            rest.has_empty = True
            rest.room = None
        return rest

    # ---------------------------------------------------------------- which tokens they stand for

    def as_slots(self, valid: Tensor | None = None, *, padded: bool | None = None) -> "Slots":
        """Themselves, with positions, mass and bias of all slots written out where those of the old ones are.

        Args:
            valid: bool [batch, columns]; where slot j is column j, positions and mass are written out too, and slots
                of columns that are no real token are empty.
            padded: some column is none; None: the device is asked.
        """
        if self.positions is None or self.mass is None:
            return self if valid is None else self._of_columns(valid, padded)
        if not self.tail:
            return self
        shape = (*self.positions.shape[:2], self.tail)
        columns = torch.arange(self.column, self.column + self.tail, device=self.positions.device).expand(shape)
        return replace(
            self,
            positions=torch.cat([self.positions, columns], -1),
            mass=torch.cat([self.mass, self.mass.new_ones(shape)], -1),
            bias=None if self.bias is None else torch.cat([self.bias, self.bias.new_zeros(shape)], -1),
            tail=0,
        )

    def _of_columns(self, valid: Tensor, padded: bool | None) -> "Slots":
        batch, kv_heads, count, _ = self.keys.shape
        shape, device = (batch, kv_heads, count), self.keys.device
        columns = torch.arange(count, device=device).expand(shape)
        if padded is False:
            return replace(self, positions=columns, mass=torch.ones(1, device=device).expand(shape))
        real = valid[:, None, :count].to(device).expand(shape)
        has_empty = not bool(real.all()) if padded is None else padded
        positions, mass = columns.masked_fill(~real, -1), real.to(torch.float32)
        return replace(self, positions=positions, mass=mass, has_empty=has_empty)

    def outline(self, valid: Tensor | None = None) -> "Slots":
        nothing = self.keys.new_empty(1).expand(*self.keys.shape[:3], 1)
        return replace(self, keys=nothing, values=nothing, room=None).as_slots(valid)

    def all_positions(self) -> Tensor:
        """int64 [batch, kv_heads, slots], where those of the old slots are known."""
        positions = self.as_slots().positions
        assert positions is not None
        return positions

    def stands_for_others_than(self, valid: Tensor) -> Tensor:
        """Filled slots of columns that are not `valid` [batch, columns]: bool [batch, kv_heads, slots]."""
        positions = self.all_positions()
        real = valid.to(positions.device).gather(1, positions.clamp(min=0).flatten(1)).view_as(positions)
        return (positions >= 0) & ~real

    # ---------------------------------------------------------------- attention

    def added(self, dtype: torch.dtype) -> Tensor | None:
        """What all slots' logits are given, [batch, kv_heads, slots]: the bias, least where empty; None: nothing."""
        if self.room is not None and self.room.bias is not None:
            return self.room.bias.narrow(2, 0, self.count).to(dtype)
        if self.positions is None or (self.bias is None and not self.has_empty):
            return None
        bias = torch.zeros_like(self.positions, dtype=dtype) if self.bias is None else self.bias.to(dtype)
        if self.has_empty:
            bias = bias.masked_fill(self.positions < 0, torch.finfo(dtype).min)
        return F.pad(bias, (0, self.tail))  # decoded tokens weigh one

    def mask(self, mask: Tensor | None, queries: Tensor) -> Tensor | None:
        if self.positions is None:
            return mask
        if mask is None and queries.shape[2] == 1:
            added = self.added(queries.dtype)
            return None if added is None else added.unsqueeze(2)
        slots = self.as_slots()
        assert slots.positions is not None
        return slot_mask(slots.positions, slots.bias, slots.has_empty, mask, queries)

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float | None, dropout: float) -> Tensor | None:
        if self.positions is None:
            return None
        return attend(query, self.keys, self.values, mask, scaling, dropout)

    def shown(self, padding: Tensor | None) -> Tensor | None:
        """Slots that attention sees which masks nothing but padding, bool [batch, kv_heads, slots]; None: all.

        Args:
            padding: [batch, columns], 0 or False where there is no token; None: nowhere.
        """
        if padding is None and not self.has_empty:
            return None
        positions = self.all_positions()
        visible = positions >= 0
        if padding is not None:
            visible &= padding.bool().gather(1, positions.clamp(min=0).flatten(1)).view_as(visible)
        return visible

    # ---------------------------------------------------------------- parts

    def first(self, count: int) -> "Slots":
        """The first `count` slots; what lay behind them is room, if it may hold any token."""
        plain = self.room is not None and self.room.bias is None
        return self._span(slice(None, count), self.room if plain else None)

    def split_at(self, count: int) -> "tuple[Slots, Slots]":
        """The first `count` slots, and those behind them."""
        return self.first(count), replace(self._span(slice(count, None), None), spare=0)

    def _span(self, span: slice, room: Room | None) -> "Slots":
        slots = self.as_slots()
        return replace(slots._each(lambda x: x[:, :, span]), room=room)

    def head(self, number: int) -> "Slots":
        """The slots of one KV head."""
        part = slice(number, number + 1)
        return replace(self._each(lambda x: x[:, part]), spare=0)

    def _each(self, of: Callable[[Tensor], Tensor]) -> "Slots":
        """With `of` each tensor, and no room."""

        def known(x: Tensor | None) -> Tensor | None:
            return None if x is None else of(x)

        return replace(
            self,
            keys=of(self.keys),
            values=of(self.values),
            positions=known(self.positions),
            mass=known(self.mass),
            bias=known(self.bias),
            room=None,
        )

    def padded(self, count: int) -> "Slots":
        """With empty slots in front, `count` together."""
        missing = count - self.count
        if not missing or self.positions is None or self.mass is None:
            return self
        slots = self.as_slots()
        assert slots.positions is not None
        assert slots.mass is not None
        return Slots(
            F.pad(slots.keys, (0, 0, missing, 0)),
            F.pad(slots.values, (0, 0, missing, 0)),
            F.pad(slots.positions, (missing, 0), value=-1),
            F.pad(slots.mass, (missing, 0)),
            None if slots.bias is None else F.pad(slots.bias, (missing, 0)),
            True,
        )


def _with_room(x: Tensor, capacity: int) -> Tensor:
    """A buffer for `capacity` slots that begins with those of `x` [batch, kv_heads, slots, dim]."""
    buffer = x.new_empty(*x.shape[:2], capacity, x.shape[3])
    buffer[:, :, : x.shape[2]] = x
    return buffer
