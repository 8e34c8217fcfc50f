"""Heads that keep different counts: a block for each KV head, and a layer's heads parted and put side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvweave.memory.attend import by_kernel
from kvweave.memory.block import Block, Fixed
from kvweave.memory.expanded import Expanded
from kvweave.memory.head_room import HeadRoom, Lane
from kvweave.memory.packed import packed
from kvweave.memory.slots import FEW, Slots
from kvweave.ops.quantize import Quantization
from kvweave.plan import Compacted

#: What a further call costs a CPU: reading the keys and values of so many tokens times channels.
_CALL = 25_000
#: Of a layer's slots so many hold a token for each one that is empty, at least.
_FILLED = 3


@dataclass(frozen=True)
class RaggedHeads:
    """A `Block` made of several, each of KV heads that hold equally many.

    Attributes:
        base: the parts, without the last `tail` tokens.
        heads: for each part, which KV heads it holds, in its order; empty: one each, in order.
        order: int64 [kv_heads], KV heads as the parts hold them; back: where each is then. None: in order.
        room: buffers in which the parts lie, and the tail behind each; None: there is no tail.
        tail: tokens of all heads, of columns from `column` on.
    """

    base: tuple[Block, ...]
    heads: tuple[tuple[int, ...], ...] = ()
    order: Tensor | None = None
    back: Tensor | None = None
    room: HeadRoom | None = None
    tail: int = 0
    column: int = 0

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and sent: the parts, and not the room behind them."""
        return vars(self.settled())

    def settled(self) -> "RaggedHeads":
        """The same, each part with its own tail."""
        return RaggedHeads(self.parts, self.heads, self.order, self.back)

    @property
    def parts(self) -> tuple[Block, ...]:
        """The parts, with all that came."""
        if self.room is None:
            return self.base
        return tuple(map(self._grown, self.base, self.room.lanes))

    def _grown(self, part: Block, lane: Lane) -> Slots:
        assert isinstance(part, Slots)
        assert self.room is not None
        keys, values = (x[:, :, : lane.size + self.tail] for x in (lane.keys, lane.values))
        if not self.tail:
            return replace(part, keys=keys, values=values)
        column = part.column if part.tail else self.column
        return replace(part, keys=keys, values=values, tail=part.tail + self.tail, column=column)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def has_positions(self) -> bool:
        return all(part.has_positions for part in self.base)

    @property
    def fixed(self) -> tuple[Fixed, ...]:
        return ()

    @property
    def tensors(self) -> None:
        return None

    def each(self, of: Callable[[Block], Block]) -> "RaggedHeads":
        """With `of` each part."""
        return RaggedHeads(tuple(of(part) for part in self.parts), self.heads, self.order, self.back)

    def append(self, keys: Tensor, values: Tensor, column: int) -> Block:
        new, room = keys.shape[2], self.room
        if room is not None and new <= room.spare - self.tail and not keys.requires_grad:
            room.write(keys, values, self.tail)
            return replace(self, tail=self.tail + new, column=self.column if self.tail else column)
        parts = [part for part in self.parts if isinstance(part, Slots)]
        if new > FEW or keys.is_cuda or keys.requires_grad or len(parts) < len(self.base):
            split = zip(self.parts, self._split(keys), self._split(values), strict=True)
            grown = tuple(part.append(key, value, column) for part, key, value in split)
            return RaggedHeads(grown, self.heads, self.order, self.back)
        if not self.heads and not any(part.tail for part in parts):
            block = in_buckets(parts)
            if not isinstance(block, RaggedHeads):
                return block.append(keys, values, column)
            return block.with_room(new).append(keys, values, column)
        return self.settled().with_room(new).append(keys, values, column)

    def with_room(self, new: int) -> "RaggedHeads":
        """The same in buffers with room for `new` tokens and some more."""
        parts = [part for part in self.base if isinstance(part, Slots)]
        spare = max(FEW, max(part.count for part in parts) // 4) + new
        room = HeadRoom.of(parts, self.back, spare)
        views = [(x[:, :, : lane.size] for x in (lane.keys, lane.values)) for lane in room.lanes]
        base = [replace(part, keys=k, values=v, room=None) for part, (k, v) in zip(parts, views, strict=True)]
        return replace(self, base=tuple(base), room=room)

    def rows(self, index: Tensor) -> "RaggedHeads":
        return self.each(lambda part: part.rows(index))

    def before(self, column: int, length: int) -> "RaggedHeads":
        return self.each(lambda part: part.before(column, length))

    def as_slots(self, valid: Tensor | None = None, *, padded: bool | None = None) -> Slots:
        return _together([part.as_slots() for part in self.parts], self.back)

    def outline(self, valid: Tensor | None = None) -> Slots:
        return _together([part.outline() for part in self.parts], self.back)

    def mask(self, mask: Tensor | None, queries: Tensor) -> Tensor | None:
        """The model's: each part picks its own columns."""
        return mask

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float | None, dropout: float) -> Tensor | None:
        """Where there is no mask, a call for each part; one launch for all, where each begins a buffer on a GPU."""
        if mask is not None or dropout:
            return None
        if self.room is not None:
            return self._attend_in_room(query, self.room, scaling)
        if not self.heads:
            out = attend_uneven(query, self.parts, scaling)
            if out is not None:
                return out
        outs = []
        for part, own in zip(self.parts, self._split(query), strict=True):
            out = part.attend(own, part.mask(None, own), scaling, dropout)
            if out is None:
                return None
            outs.append(out)
        return self.in_order(torch.cat(outs, 2), 2)

    def _attend_in_room(self, query: Tensor, room: HeadRoom, scaling: float | None) -> Tensor:
        batch, heads, _, dim = query.shape
        rows = query.reshape(batch, sum(room.sizes), -1, dim)
        if self.order is None or self.back is None:
            return room.attend(rows, self.tail, scaling).view(batch, 1, heads, -1)
        out = room.attend(rows.index_select(1, self.order), self.tail, scaling)
        return out.index_select(1, self.back).view(batch, 1, heads, -1)

    def _split(self, x: Tensor) -> list[Tensor]:
        """`x` [batch, a multiple of kv_heads, ...] by part."""
        sizes = [len(own) for own in self.heads] or [1] * len(self.parts)
        group = x.shape[1] // sum(sizes)
        if self.order is not None:
            x = (x if group == 1 else x.unflatten(1, (-1, group))).index_select(1, self.order)
            x = x if group == 1 else x.flatten(1, 2)
        return list(x.split([size * group for size in sizes], 1))

    def query_heads(self, queries: Tensor) -> list[slice | Tensor]:
        """For each part, which of the query heads [batch, heads, ...] read it."""
        heads = self.heads or tuple((n,) for n in range(len(self.parts)))
        group = queries.shape[1] // sum(map(len, heads))
        groups: list[slice | Tensor] = []
        for own in heads:
            if own == tuple(range(own[0], own[-1] + 1)):
                groups.append(slice(own[0] * group, (own[-1] + 1) * group))
            else:
                groups.append(torch.tensor([n * group + g for n in own for g in range(group)], device=queries.device))
        return groups

    def one_by_one(self, parts: Sequence[Slots]) -> list[Slots]:
        """The slots of each KV head, in order, of `parts` that have taken the place of these."""
        split = [part.head(n) for part in parts for n in range(part.keys.shape[1])]
        if not self.heads:
            return split
        back = sorted(range(len(split)), key=[head for own in self.heads for head in own].__getitem__)
        return [split[n] for n in back]

    def in_order(self, x: Tensor, dim: int) -> Tensor:
        """What was computed part by part, a multiple of kv_heads along `dim`, by the order of heads."""
        if self.back is None:
            return x
        group = x.shape[dim] // len(self.back)
        return x.unflatten(dim, (-1, group)).index_select(dim, self.back).flatten(dim, dim + 1)


def block_of(parts: Sequence[Block]) -> Block:
    """One block, or one for each KV head, as a layer holds them."""
    return parts[0] if len(parts) == 1 else RaggedHeads(tuple(parts))


def ragged(block: Block) -> RaggedHeads | None:
    """`block` where heads hold counts of their own, else None."""
    return block if isinstance(block, RaggedHeads) else None


def settled(block: Block) -> Block:
    """`block` with all that it holds in its parts, and none of the room behind them."""
    return block.settled() if isinstance(block, RaggedHeads) else block


def of_parts(block: Block, of: Callable[[Block], Block]) -> Block:
    """`block` with `of` each of its parts."""
    return block.each(of) if isinstance(block, RaggedHeads) else of(block)


def unpacked(block: Block) -> Block:
    """`block` as attention of several tokens reads it, nothing packed."""
    return of_parts(block, lambda part: part.as_slots() if part.tensors is None else part)


def for_flash(block: Block, padding: Tensor | None) -> list[Slots]:
    """`block` for attention that masks nothing but padding, the same for all heads: parted where heads differ.

    Args:
        padding: [batch, columns], 0 or False where there is no token; None: nowhere.
    """
    parts = []
    for part in block.parts:
        slots = part.as_slots() if part.tensors is None or isinstance(part, Expanded) else part
        if not isinstance(slots, Slots):
            raise ValueError("flash attention reads no reserved room: allowed is sdpa or eager")
        parts.append(slots)
    if isinstance(block, RaggedHeads):
        return block.one_by_one(parts)
    if not block.has_positions:
        return parts
    visible = parts[0].shown(padding)
    if visible is None or bool((visible == visible[:, :1]).all()):  # flash itself asks the device how much is padding
        return parts
    return [parts[0].head(n) for n in range(visible.shape[1])]


def stored_in(block: Block, setting: Quantization | None) -> Block:
    """`block`, its slots packed as a method wants them stored; None: as they are."""
    if setting is None:
        return block
    return of_parts(block, lambda part: packed(part, setting) if isinstance(part, Slots) else part)


def block_from(compacted: Compacted, behind: Slots | None = None) -> Block:
    """`stored`, as a layer holds it."""
    return block_of(stored(compacted, behind))


def in_buckets(parts: Sequence[Slots]) -> Block:
    """Slots of one KV head each, those of like counts side by side, so that one call attends to them.

    Heads lie together where reading the empty slots in front costs less than a further call, as long as these are a
    third of the layer's tokens at most.
    """
    batch, dim = parts[0].keys.shape[0], parts[0].keys.shape[3]
    buckets = buckets_of([part.count for part in parts], max(1, _CALL // (batch * dim)))
    if len(buckets) == len(parts):
        return block_of(parts)
    heads = tuple(sorted(tuple(sorted(bucket)) for bucket in buckets))
    joined = tuple(_bucket([parts[n] for n in own]) for own in heads)
    if len(joined) == 1:
        return joined[0]
    order = [head for own in heads for head in own]
    if order == sorted(order):
        return RaggedHeads(joined, heads)
    back = sorted(range(len(order)), key=order.__getitem__)
    with torch.inference_mode(False):
        device = parts[0].keys.device
        return RaggedHeads(joined, heads, torch.tensor(order, device=device), torch.tensor(back, device=device))


def buckets_of(counts: Sequence[int], call: int) -> list[tuple[int, ...]]:
    """Which heads lie together: the parting that costs least.

    Heads of like counts, or neighbours: where these are no neighbours, queries and outputs are put in another order,
    which costs half a call.

    Args:
        counts: of each head; call: slots that cost as much to read as a call.
    """
    neighbours = range(len(counts))
    alike = sorted(neighbours, key=lambda n: counts[n])
    options = [_cheapest(counts, neighbours, call), _cheapest(counts, alike, call)]
    return min(options, key=lambda buckets: _cost(counts, buckets, call))


def _cost(counts: Sequence[int], buckets: Sequence[tuple[int, ...]], call: int) -> float:
    """Of a token's attention, in slots."""
    order = [head for own in sorted(buckets) for head in own]
    moved = call / 2 if order != sorted(order) else 0
    return moved + sum(call + len(own) * max(counts[n] for n in own) for own in buckets)


def _cheapest(counts: Sequence[int], order: Sequence[int], call: int) -> list[tuple[int, ...]]:
    """The parting of heads in this order into runs that costs least, by dynamic programming."""
    spare = sum(counts) // _FILLED
    best: list[tuple[int, int, list[tuple[int, ...]]]] = [(0, 0, [])]  # cost and empty slots of the first heads
    for end in range(1, len(order) + 1):
        found = []
        for start in range(end):
            cost, empty, before = best[start]
            own = order[start:end]
            slots = len(own) * max(counts[n] for n in own)
            empty += slots - sum(counts[n] for n in own)
            if empty <= spare:
                found.append((cost + call + slots, empty, [*before, tuple(sorted(own))]))
        best.append(min(found))
    return best[-1][2]


def _bucket(parts: Sequence[Slots]) -> Slots:
    joined = _together(parts)
    return replace(joined, spare=sum(joined.count - part.count for part in parts))


def stored(compacted: Compacted, behind: Slots | None = None) -> list[Slots]:
    """What memory holds of a compacted layer: heads that keep different counts apart, so that memory is freed.

    Args:
        behind: slots of the same heads that follow, untouched.
    """
    _, kv_heads, slots = compacted.positions.shape
    if compacted.full:
        block = Slots(compacted.keys, compacted.values, compacted.positions, compacted.mass, compacted.bias)
        return [block if behind is None else _joined(block, behind, slice(0, kv_heads))]
    counts = compacted.counts or (compacted.positions >= 0).sum(-1).tolist()  # by row, and by KV head
    longest = [max(row[head] for row in counts) for head in range(kv_heads)]
    if len(set(longest)) == 1:
        parts = [(slice(0, kv_heads), longest[0])]
    else:
        parts = [(slice(head, head + 1), count) for head, count in enumerate(longest)]
    blocks = []
    for heads, count in parts:
        start = slots - count  # empty slots come first

        def part(x: Tensor, heads: slice = heads, start: int = start, count: int = count) -> Tensor:
            piece = x[:, heads, start:]
            alone = count < slots or len(parts) > 1  # of a tensor that would be held on to
            return piece.clone() if alone and behind is None else piece

        block = Slots(
            part(compacted.keys),
            part(compacted.values),
            part(compacted.positions),
            part(compacted.mass),
            None if compacted.bias is None else part(compacted.bias),
            any(own < count for row in counts for own in row[heads]),
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


def _together(parts: Sequence[Slots], back: Tensor | None = None) -> Slots:
    """All heads side by side, those that hold less with empty slots in front.

    Args:
        back: int64 [kv_heads], where each head is in the parts; None: in order.
    """

    def joint(tensors: Sequence[Tensor], empty: int) -> Tensor:
        x = side_by_side(tensors, 1, empty=empty)
        return x if back is None else x.index_select(1, back)

    biases = [part.bias for part in parts if part.bias is not None]
    return Slots(
        joint([part.keys for part in parts], 0),
        joint([part.values for part in parts], 0),
        joint([part.positions for part in parts if part.positions is not None], -1),
        joint([part.mass for part in parts if part.mass is not None], 0),
        joint(biases, 0) if biases else None,
        len({part.count for part in parts}) > 1 or any(part.has_empty for part in parts),
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


def attend_uneven(query: Tensor, parts: Sequence[Block], scaling: float | None) -> Tensor | None:
    """Attention of one token where each KV head holds a count of its own; None where that is no single launch.

    Args:
        query: [batch, heads, 1, dim].
    Returns:
        [batch, 1, heads, dim].
    """
    rooms = [_room(part) for part in parts]
    tensors = [part.tensors for part in parts if part.tensors is not None]
    keys, values = [keys for keys, _ in tensors], [values for _, values in tensors]
    biases = [bias for is_room, bias in rooms if is_room and bias is not None]
    even = all(is_room for is_room, _ in rooms) and len(biases) in (0, len(parts))
    if not even or not by_kernel(None, 1, query, *keys, *values):
        return None
    from kvweave.ops import decode

    batch, heads, _, dim = query.shape
    tails = {part.tail if isinstance(part, Slots) else 0 for part in parts}
    out = decode.attend_uneven(
        query.reshape(batch, len(parts), -1, dim),
        keys,
        values,
        biases or None,
        dim**-0.5 if scaling is None else scaling,
        tail=tails.pop() if len(tails) == 1 else 0,
    )
    return out.reshape(batch, 1, heads, -1)


def _room(part: Block) -> tuple[bool, Tensor | None]:
    """Whether the slots begin a buffer with a bias of as many slots or without one, and that bias."""
    if not isinstance(part, Slots) or part.room is None:
        return False, None
    bias = part.added(part.keys.dtype)
    return part.room.bias is not None or bias is None, bias
