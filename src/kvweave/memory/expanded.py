"""One entry a token for all heads (MLA's latents), as attention reads it: as keys and values of each head."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from kvweave.memory.block import Block
from kvweave.memory.slots import Slots


def expanded(slots: Slots, keys: Tensor, values: Tensor) -> Slots:
    """Slots of one KV head as those of all heads that share them.

    Args:
        keys, values: [batch, heads, slots, dim], what each head makes of them.
    """

    def shared(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.expand(-1, keys.shape[1], -1)

    return replace(
        slots,
        keys=keys,
        values=values,
        positions=shared(slots.positions),
        mass=shared(slots.mass),
        bias=shared(slots.bias),
        room=None,
    )


@dataclass(frozen=True)
class Expanded:
    """A `Block` that attention reads once: memory keeps what it was expanded from.

    Attributes:
        source: what memory holds, of one KV head.
        tensors: keys and values [batch, heads, slots, dim], what each head makes of it.
    """

    source: Block
    tensors: tuple[Tensor, Tensor]

    fixed: ClassVar[tuple[()]] = ()

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    @property
    def has_positions(self) -> bool:
        return self.source.has_positions

    @property
    def parts(self) -> "tuple[Expanded, ...]":
        return (self,)

    def append(self, keys: Tensor, values: Tensor, column: int) -> Block:
        return self.source.append(keys, values, column)

    def rows(self, index: Tensor) -> Block:
        return self.source.rows(index)

    def before(self, column: int, length: int) -> Block:
        return self.source.before(column, length)

    def as_slots(self, valid: Tensor | None = None, *, padded: bool | None = None) -> Slots:
        return expanded(self.source.as_slots(valid, padded=padded), *self.tensors)

    def outline(self, valid: Tensor | None = None) -> Slots:
        return self.as_slots(valid).outline()

    def mask(self, mask: Tensor | None, queries: Tensor) -> Tensor | None:
        return self.source.mask(mask, queries)

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float | None, dropout: float) -> None:
        """Keys and values differ in width: the model's own function reads them."""
