"""What a layer holds, whatever its form.

    `Slots`        keys and values in full precision, and which tokens they stand for        slots.py
    `PackedSlots`  the older ones in few bits                                                packed.py
    `FixedSlots`   in buffers of fixed shape and address, for compiled steps                 fixed.py
    `RaggedHeads`  several of these, each of KV heads that hold equally many                 heads.py
    `FixedHeads`   the same in buffers of fixed shape and address                            fixed_heads.py
    `Expanded`     one head's for all heads, as attention reads them                         expanded.py

All but the two of heads that differ are of KV heads that hold equally many. Nothing outside of this folder asks which
it has.
"""

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from kvweave.memory.slots import Slots


class Fixed(Protocol):
    """What a block in buffers of fixed shape tells of tokens that only the device counts."""

    @property
    def seen(self) -> Tensor:
        """int64 [], logical length."""

    @property
    def columns(self) -> int:
        """Logical columns, those of all the room included."""


class Block(Protocol):
    """Entries of a layer's KV heads. A slot is known by its logical column, the number of the token it was."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values; room for more is not counted."""

    @property
    def has_positions(self) -> bool:
        """Each slot's column is known; else slot j is column j, padding included."""

    @property
    def parts(self) -> "tuple[Block, ...]":
        """The block, or one for each KV head where heads hold different counts."""

    @property
    def fixed(self) -> "tuple[Fixed, ...]":
        """What lies in buffers of fixed shape and address; else empty."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values [batch, kv_heads, slots, dim] as attention takes them; None: `as_slots` makes them."""

    def append(self, keys: Tensor, values: Tensor, column: int) -> "Block":
        """With new slots [batch, kv_heads, new, dim] behind the others, of columns from `column` on."""

    def rows(self, index: Tensor) -> "Block":
        """The given rows of the batch, in that order."""

    def before(self, column: int, length: int) -> "Block":
        """The slots of columns before `column`, where `length` have been appended."""

    def as_slots(self, valid: Tensor | None = None, *, padded: bool | None = None) -> "Slots":
        """All heads side by side in full precision, those that hold less with empty slots in front.

        Args:
            valid: bool [batch, columns], real tokens; positions and mass are then written out.
            padded: some column is none; None: the device is asked.
        """

    def outline(self, valid: Tensor | None = None) -> "Slots":
        """The same without keys and values."""

    def mask(self, mask: Tensor | None, queries: Tensor) -> Tensor | None:
        """What hides slots and adds to their logits: the model's mask, which speaks of columns, at the slots.

        Args:
            mask: [batch or 1, heads or 1, new, columns], boolean or additive; None: causal.
            queries: [batch, heads, new, dim].
        Returns:
            [batch or 1, 1 or kv_heads or heads, new, slots], or None where every slot is seen.
        """

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float | None, dropout: float) -> Tensor | None:
        """Attention of one token, [batch, heads, 1, dim], to the slots; None: the model's own function does it.

        Args:
            mask: what `mask` returned.
        Returns:
            [batch, 1, heads, dim].
        """
