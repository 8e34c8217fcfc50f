"""Heads that keep different counts: a block for each KV head, and a layer's heads parted and put side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvweave.memory.attend import by_kernel
from kvweave.memory.block import Block
from kvweave.memory.expanded import Expanded
from kvweave.memory.fixed import FixedSlots
from kvweave.memory.packed import packed
from kvweave.memory.slots import FEW, Slots
from kvweave.ops.quantize import Quantization
from kvweave.plan import Compacted

#: Of the slots of heads that lie side by side so many hold a token for each one that is empty, at least.
_PADDED = 8


@dataclass(frozen=True)
class RaggedHeads:
    """A `Block` made of several, each of KV heads that hold equally many.

    Attributes:
        heads: for each part, which KV heads it holds, in its order; empty: one each, in order.
        order: int64 [kv_heads], KV heads as the parts hold them; back: where each is then. None: in order.
    """

    parts: tuple[Block, ...]
    heads: tuple[tuple[int, ...], ...] = ()
    order: Tensor | None = None
    back: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def has_positions(self) -> bool:
        return all(part.has_positions for part in self.parts)

    @property
    def fixed(self) -> tuple[FixedSlots, ...]:
        return tuple(slots for part in self.parts for slots in part.fixed)

    @property
    def tensors(self) -> None:
        return None

    def each(self, of: Callable[[Block], Block]) -> "RaggedHeads":
        """With `of` each part."""
        return replace(self, parts=tuple(of(part) for part in self.parts))

    def append(self, keys: Tensor, values: Tensor, column: int) -> Block:
        fresh = [part for part in self.parts if isinstance(part, Slots) and part.room is None and not part.tail]
        if len(fresh) == len(self.parts) and not self.heads and keys.shape[2] <= FEW and not keys.is_cuda:
            block = in_buckets(fresh)  # room is made now, in front too
            if not isinstance(block, RaggedHeads) or block.heads:
                return block.append(keys, values, column)
        new = zip(self.parts, self._split(keys), self._split(values), strict=True)
        return replace(self, parts=tuple(part.append(key, value, column) for part, key, value in new))

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
        back = sorted(range(len(split)), key=[head for own in self.heads for head in own].__getitem__)
        return [split[n] for n in back] if self.heads else split

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


def in_fixed_buffers(block: Block, tokens: int, column: int, valid: Tensor) -> Block:
    """`block` in buffers of fixed shape, as `FixedSlots.of` lays them out."""
    return of_parts(block, lambda part: FixedSlots.of(part.as_slots(valid), tokens, column, valid))


def out_of_fixed_buffers(block: Block) -> Block:
    """What `in_fixed_buffers` laid out, where it lies, no longer fixed (a host synchronisation)."""
    return of_parts(block, lambda part: part.out_of_room() if isinstance(part, FixedSlots) else part)


def block_from(compacted: Compacted, behind: Slots | None = None) -> Block:
    """`stored`, as a layer holds it."""
    return block_of(stored(compacted, behind))


def in_buckets(parts: Sequence[Slots]) -> Block:
    """Slots of one KV head each, those of like counts side by side: one call attends to them.

    Empty slots come to an eighth of a bucket's tokens at most. What a further call costs is worth more than reading
    them: about 15 microseconds on a CPU, which is the keys and values of 150 tokens of 128 channels.
    """
    counts = [part.count for part in parts]
    buckets: list[list[int]] = []
    for head in sorted(range(len(parts)), key=lambda n: -counts[n]):
        real = sum(counts[n] for n in buckets[-1]) + counts[head] if buckets else 0
        if buckets and (len(buckets[-1]) + 1) * counts[buckets[-1][0]] - real <= real // _PADDED:
            buckets[-1].append(head)
        else:
            buckets.append([head])
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
    counts = (compacted.positions >= 0).sum(-1)  # [batch, kv_heads]
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
            part(compacted.keys),
            part(compacted.values),
            part(compacted.positions),
            part(compacted.mass),
            None if compacted.bias is None else part(compacted.bias),
            has_empty and bool((compacted.positions[:, heads, start:] < 0).any()),
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
    if isinstance(part, FixedSlots):
        return True, part.bias
    if not isinstance(part, Slots) or part.room is None:
        return False, None
    bias = part.added(part.keys.dtype)
    return part.room.bias is not None or bias is None, bias
