"""What memory holds of a layer: keys, values, and which tokens they stand for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvweave.plan import Compacted

_FEW = 16  # new slots up to which decoding is assumed, and the least room that is made for more


class Room(NamedTuple):
    """Buffers whose first slots are those of a block.

    Attributes:
        keys, values: [batch, kv_heads, capacity, dim].
        bias: [batch, kv_heads, capacity] in the keys' dtype, added to the slots' logits: least where a slot is
            empty, 0 for tokens to come; None where nothing is added.
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
        if self.bias is not None:
            self.bias[:, :, start:end] = 0


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

    def __getstate__(self) -> dict[str, Any]:
        """What is copied, saved and sent: the slots, and not the room behind them."""
        keys, values = (x if self.room is None else x.clone() for x in (self.keys, self.values))
        return vars(self) | {"keys": keys, "values": values, "room": None}

    @property
    def count(self) -> int:
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values))

    def unpacked(self) -> "Slots":
        """All slots in full precision: themselves."""
        return self

    def appended(self, keys: Tensor, values: Tensor, column: int) -> "Slots":
        """These slots and new ones, [batch, kv_heads, new, dim], of columns from `column` on.

        A few new slots are written behind the old ones where there is room for them.
        """
        new, total = keys.shape[2], self.count + keys.shape[2]
        if new > _FEW or keys.requires_grad:
            room = None
            grown = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        else:
            room = self.room
            if room is None or room.keys.shape[2] < total:
                room = Room.of(self, total + max(_FEW, total // 4))
            room.write(keys, values, self.count)
            grown = room.keys[:, :, :total], room.values[:, :, :total]
        if self.positions is None:
            return Slots(*grown, room=room)
        first = self.column if self.tail else column
        return replace(self, keys=grown[0], values=grown[1], tail=self.tail + new, column=first, room=room)

    def added(self, dtype: torch.dtype) -> Tensor | None:
        """What all slots' logits are given, [batch, kv_heads, slots]: the bias, least where empty; None: nothing."""
        if self.room is not None and self.room.bias is not None:
            return self.room.bias[:, :, : self.count].to(dtype)
        if self.positions is None or (self.bias is None and not self.has_empty):
            return None
        bias = torch.zeros_like(self.positions, dtype=dtype) if self.bias is None else self.bias.to(dtype)
        if self.has_empty:
            bias = bias.masked_fill(self.positions < 0, torch.finfo(dtype).min)
        return F.pad(bias, (0, self.tail))  # decoded tokens weigh one

    def outlined(self) -> "Slots":
        """What is known of the slots, without keys and values."""
        nothing = self.keys.new_empty(1).expand(*self.keys.shape[:3], 1)
        return replace(self, keys=nothing, values=nothing, room=None)

    def written(self) -> "Slots":
        """With positions, mass and bias of all slots written out, where those of the old ones are."""
        if not self.tail or self.positions is None or self.mass is None:
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

    def positions_of_all(self) -> Tensor:
        """int64 [batch, kv_heads, slots], where those of the old slots are known."""
        positions = self.written().positions
        assert positions is not None
        return positions

    def explicit(self, valid: Tensor, *, padded: bool | None = None) -> "Slots":
        """With positions and mass written out; slots of columns that are not `valid` [batch, columns] are empty.

        Args:
            padded: some column is not valid; None: the device is asked.
        """
        if self.positions is not None:
            return self.written()
        batch, kv_heads, count, _ = self.keys.shape
        real = valid[:, None, :count].to(self.keys.device).expand(batch, kv_heads, -1)
        columns = torch.arange(count, device=self.keys.device).expand(batch, kv_heads, -1)
        held = columns.masked_fill(~real, -1)
        has_empty = not bool(real.all()) if padded is None else padded
        return replace(self, positions=held, mass=real.to(torch.float32), has_empty=has_empty)

    def stands_for_others_than(self, valid: Tensor) -> Tensor:
        """Filled slots of columns that are not `valid` [batch, columns]: bool [batch, kv_heads, slots]."""
        positions = self.positions_of_all()
        real = valid.to(positions.device).gather(1, positions.clamp(min=0).flatten(1)).view_as(positions)
        return (positions >= 0) & ~real

    def first(self, count: int) -> "Slots":
        """The first `count` slots; what lay behind them is room."""
        return self.written()._cut(slice(None, count), self.room)

    def after(self, count: int) -> "Slots":
        """The slots behind the first `count`."""
        return self.written()._cut(slice(count, None), None)

    def _cut(self, part: slice, room: Room | None) -> "Slots":
        def of(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, :, part]

        return replace(
            self,
            keys=self.keys[:, :, part],
            values=self.values[:, :, part],
            positions=of(self.positions),
            mass=of(self.mass),
            bias=of(self.bias),
            room=room,
        )

    def padded(self, count: int) -> "Slots":
        """With empty slots in front, `count` together."""
        missing = count - self.count
        if not missing or self.positions is None or self.mass is None:
            return self
        whole = self.written()
        assert whole.positions is not None
        assert whole.mass is not None
        return Slots(
            F.pad(whole.keys, (0, 0, missing, 0)),
            F.pad(whole.values, (0, 0, missing, 0)),
            F.pad(whole.positions, (missing, 0), value=-1),
            F.pad(whole.mass, (missing, 0)),
            None if whole.bias is None else F.pad(whole.bias, (missing, 0)),
            True,
        )

    def head(self, number: int) -> "Slots":
        """The slots of one KV head."""
        part = slice(number, number + 1)

        def of(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, part]

        return replace(
            self,
            keys=self.keys[:, part],
            values=self.values[:, part],
            positions=of(self.positions),
            mass=of(self.mass),
            bias=of(self.bias),
            room=None,
        )

    def before(self, column: int, seen: int) -> "Slots":
        """The slots of columns before `column`, where `seen` have been stored."""
        if self.positions is None or seen - column <= self.tail:
            gone = seen - column
            left = replace(
                self, keys=self.keys[:, :, : self.count - gone], values=self.values[:, :, : self.count - gone]
            )
            return replace(left, tail=self.tail - gone) if self.positions is not None else left
        # Decoded tokens lie at the end of every head; those of a prompt that was cut may lie anywhere.
        whole = self.written()
        assert whole.positions is not None
        left = whole.first(whole.count - int((whole.positions >= column).sum(-1).min()))
        assert left.positions is not None
        assert left.mass is not None
        gone_slots = left.positions >= column
        if bool(gone_slots.any()):
            left.positions = left.positions.masked_fill(gone_slots, -1)
            left.mass = left.mass.masked_fill(gone_slots, 0)
            left.has_empty = True
            left.room = None
        return left

    def rows(self, index: Tensor) -> "Slots":
        """The given rows of the batch, in that order."""

        def of(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[index.to(x.device)]

        return replace(
            self,
            keys=self.keys[index.to(self.keys.device)],
            values=self.values[index.to(self.values.device)],
            positions=of(self.positions),
            mass=of(self.mass),
            bias=of(self.bias),
            room=None,
        )


def _with_room(x: Tensor, capacity: int) -> Tensor:
    """A buffer for `capacity` slots that begins with those of `x` [batch, kv_heads, slots, dim]."""
    buffer = x.new_empty(*x.shape[:2], capacity, x.shape[3])
    buffer[:, :, : x.shape[2]] = x
    return buffer


def stored(done: Compacted, behind: Slots | None = None) -> list[Slots]:
    """What memory holds of a compacted layer: heads that keep different counts apart, so that memory is freed.

    Args:
        behind: slots of the same heads that follow, untouched.
    """
    _, kv_heads, slots = done.positions.shape
    if done.full:
        block = Slots(done.keys, done.values, done.positions, done.mass, done.bias)
        return [block if behind is None else _joined(block, behind, slice(0, kv_heads))]
    counts = (done.positions >= 0).sum(-1)  # [batch, kv_heads]
    longest: list[int] = counts.amax(0).tolist()
    has_empty = bool((counts < slots).any())
    if len(set(longest)) == 1:
        parts = [(slice(0, kv_heads), longest[0])]
    else:
        parts = [(slice(head, head + 1), count) for head, count in enumerate(longest)]
    blocks = []
    for heads, count in parts:
        start = slots - count  # empty slots come first

        def part(x: Tensor, heads: slice = heads, start: int = start, count: int = count) -> Tensor:
            piece = x[:, heads, start:]
            return piece if count == slots and len(parts) == 1 else piece.clone()

        block = Slots(
            part(done.keys),
            part(done.values),
            part(done.positions),
            part(done.mass),
            None if done.bias is None else part(done.bias),
            has_empty and bool((done.positions[:, heads, start:] < 0).any()),
        )
        blocks.append(block if behind is None else _joined(block, behind, heads))
    return blocks


def _joined(block: Slots, behind: Slots, heads: slice) -> Slots:
    assert behind.positions is not None
    assert behind.mass is not None
    assert block.positions is not None
    assert block.mass is not None
    bias = block.bias
    if bias is not None:
        more = torch.zeros_like(behind.mass) if behind.bias is None else behind.bias
        bias = torch.cat([bias, more[:, heads]], -1)
    return Slots(
        torch.cat([block.keys, behind.keys[:, heads]], 2),
        torch.cat([block.values, behind.values[:, heads]], 2),
        torch.cat([block.positions, behind.positions[:, heads]], -1),
        torch.cat([block.mass, behind.mass[:, heads]], -1),
        bias,
        block.has_empty,
    )


def rectangular(blocks: Sequence[Slots]) -> Slots:
    """All heads side by side, those that hold less with empty slots in front; a single block is returned as it is."""
    if len(blocks) == 1:
        return blocks[0]
    blocks = [block.written() for block in blocks]
    positions = [block.positions for block in blocks if block.positions is not None]
    masses = [block.mass for block in blocks if block.mass is not None]
    biases = [block.bias for block in blocks if block.bias is not None]
    return Slots(
        side_by_side([block.keys for block in blocks], 1, empty=0),
        side_by_side([block.values for block in blocks], 1, empty=0),
        side_by_side(positions, 1, empty=-1),
        side_by_side(masses, 1, empty=0),
        side_by_side(biases, 1, empty=0) if biases else None,
        True,
    )


def side_by_side(tensors: Sequence[Tensor], dim: int, *, empty: int) -> Tensor:
    """Tensors [batch, kv_heads, n, ...] of unequal n as one; shorter ones have empty slots in front.

    Args:
        dim: along which they are put: 0, rows, or 1, heads.
        empty: what fills the slots in front.
    """
    slots = max(x.shape[2] for x in tensors)

    def padded(x: Tensor) -> Tensor:
        missing = slots - x.shape[2]
        return torch.cat([x.new_full((*x.shape[:2], missing, *x.shape[3:]), empty), x], 2) if missing else x

    return torch.cat([padded(x) for x in tensors], dim)
