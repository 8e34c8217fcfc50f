"""Heads that keep different counts: a block for each KV head, and a layer's heads parted and put side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvweave.memory.attend import by_kernel
from kvweave.memory.block import Block
from kvweave.memory.expanded import Expanded
from kvweave.memory.fixed import FixedSlots
from kvweave.memory.packed import packed
from kvweave.memory.slots import Slots
from kvweave.ops.quantize import Quantization
from kvweave.plan import Compacted


@dataclass(frozen=True)
class RaggedHeads:
    """A `Block` made of one for each KV head."""

    parts: tuple[Block, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def has_positions(self) -> bool:
        return all(part.has_positions for part in self.parts)

    @property
    def tensors(self) -> None:
        return None

    def append(self, keys: Tensor, values: Tensor, column: int) -> "RaggedHeads":
        heads = zip(self.parts, keys.split(1, 1), values.split(1, 1), strict=True)
        return RaggedHeads(tuple(part.append(key, value, column) for part, key, value in heads))

    def rows(self, index: Tensor) -> "RaggedHeads":
        return RaggedHeads(tuple(part.rows(index) for part in self.parts))

    def before(self, column: int, seen: int) -> "RaggedHeads":
        return RaggedHeads(tuple(part.before(column, seen) for part in self.parts))

    def as_slots(self, valid: Tensor | None = None, *, padded: bool | None = None) -> Slots:
        return _together([part.as_slots() for part in self.parts])

    def outline(self, valid: Tensor | None = None) -> Slots:
        return _together([part.outline() for part in self.parts])

    def mask(self, mask: Tensor | None, queries: Tensor) -> Tensor | None:
        """The model's: each head's part picks its own columns."""
        return mask

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float | None, dropout: float) -> Tensor | None:
        """One launch for all heads, where there is no mask and each begins a buffer."""
        return None if mask is not None or dropout else attend_uneven(query, self.parts, scaling)


def block_of(parts: Sequence[Block]) -> Block:
    """One block, or one for each KV head, as a layer holds them."""
    return parts[0] if len(parts) == 1 else RaggedHeads(tuple(parts))


def unpacked(block: Block) -> Block:
    """`block` as attention of several tokens reads it, nothing packed."""
    return block_of([part.as_slots() if part.tensors is None else part for part in block.parts])


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
    if len(parts) > 1 or not block.has_positions:
        return parts
    seen = parts[0].shown(padding)
    if seen is None or bool((seen == seen[:, :1]).all()):  # flash itself asks the device how much is padding
        return parts
    return [parts[0].head(n) for n in range(seen.shape[1])]


def stored_in(block: Block, setting: Quantization | None) -> Block:
    """`block`, its slots packed as a method wants them stored; None: as they are."""
    if setting is None:
        return block
    return block_of([packed(part, setting) if isinstance(part, Slots) else part for part in block.parts])


def in_fixed_buffers(block: Block, tokens: int, column: int, valid: Tensor) -> tuple[FixedSlots, ...]:
    """The parts of `block` in buffers of fixed shape, as `FixedSlots.of` lays them out."""
    return tuple(FixedSlots.of(part.as_slots(valid), tokens, column, valid) for part in block.parts)


def block_from(done: Compacted, behind: Slots | None = None) -> Block:
    """`stored`, as a layer holds it."""
    return block_of(stored(done, behind))


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


def _together(parts: Sequence[Slots]) -> Slots:
    """All heads side by side, those that hold less with empty slots in front."""
    positions = [part.positions for part in parts if part.positions is not None]
    masses = [part.mass for part in parts if part.mass is not None]
    biases = [part.bias for part in parts if part.bias is not None]
    return Slots(
        side_by_side([part.keys for part in parts], 1, empty=0),
        side_by_side([part.values for part in parts], 1, empty=0),
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
