"""Slots whose older part is stored in few bits; the youngest stay in full precision (KIVI, 2402.02750)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvweave.memory.attend import as_bias, attend, by_kernel
from kvweave.memory.slots import Slots
from kvweave.ops.quantize import Packed, Quantization, pack


@dataclass(frozen=True)
class PackedSlots:
    """Slots in two parts: `keys` and `values` packed, then `rest` in full precision.

    Attributes:
        keys: of [batch, kv_heads, groups, group, dim], quantised by channel within a group of tokens.
        values: of [batch, kv_heads, slots, parts, channels], quantised by token within a part of its channels.
        rest: the youngest slots' keys and values, with the positions, mass and bias of all.
    """

    keys: Packed
    values: Packed
    rest: Slots
    setting: Quantization

    fixed: ClassVar[tuple[()]] = ()

    @property
    def packed(self) -> int:
        """Slots that are packed."""
        return self.values.codes.shape[2]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.rest.nbytes

    @property
    def has_positions(self) -> bool:
        return self.rest.has_positions

    @property
    def parts(self) -> "tuple[PackedSlots, ...]":
        return (self,)

    @property
    def tensors(self) -> None:
        return None

    def as_slots(self, valid: Tensor | None = None, *, padded: bool | None = None) -> Slots:
        """All slots in full precision; lives as long as attention reads it."""
        return self._unpacked().as_slots(valid)

    def _unpacked(self) -> Slots:
        keys, values = self.keys.unpacked().flatten(2, 3), self.values.unpacked().flatten(3)
        return replace(
            self.rest,
            keys=torch.cat([keys, self.rest.keys], 2),
            values=torch.cat([values, self.rest.values], 2),
            room=None,
        )

    def outline(self, valid: Tensor | None = None) -> Slots:
        return self._outline().as_slots(valid)

    def _outline(self) -> Slots:
        nothing = self.rest.keys.new_empty(1)
        shape = (*self.rest.keys.shape[:2], self.packed + self.rest.count, 1)
        return replace(self.rest, keys=nothing.expand(shape), values=nothing.expand(shape), room=None)

    def append(self, keys: Tensor, values: Tensor, column: int) -> "Slots | PackedSlots":
        """These slots and new ones; whole groups of what is no longer young are packed."""
        young = replace(self.rest, bias=None, has_empty=False).append(keys, values, column)  # these speak of all
        grown = packed(replace(young, bias=self.rest.bias, has_empty=self.rest.has_empty), self.setting)
        if not isinstance(grown, PackedSlots):
            return replace(self, rest=grown)
        return PackedSlots(
            _joined(self.keys, grown.keys), _joined(self.values, grown.values), grown.rest, self.setting
        )

    def before(self, column: int, length: int) -> "Slots | PackedSlots":
        young = self.rest.keys.shape[2]
        all_slots = self._unpacked().before(column, length)
        removals = young + self.packed - all_slots.count
        if removals > young:
            return packed(all_slots, self.setting)
        rest = replace(
            all_slots,
            keys=self.rest.keys[:, :, : young - removals],
            values=self.rest.values[:, :, : young - removals],
        )
        return replace(self, rest=rest)

    def rows(self, index: Tensor) -> "PackedSlots":
        at = index.to(self.rest.keys.device)
        return replace(self, keys=self.keys.rows(at), values=self.values.rows(at), rest=self.rest.rows(index))

    def mask(self, mask: Tensor | None, queries: Tensor) -> Tensor | None:
        return self._outline().mask(mask, queries)

    def attend(
        self, query: Tensor, mask: Tensor | None, scaling: float | None, dropout: float = 0.0
    ) -> Tensor | None:
        """Of slots in few bits the whole is not written out, but for a mask of its own for each query head."""
        batch, heads, _, dim = query.shape
        rest, kv_heads = self.rest, self.rest.keys.shape[1]
        if dropout:
            return self._unpacked().attend(query, mask, scaling, dropout)
        if mask is not None and mask.shape[1] not in (1, kv_heads):
            slots = self._unpacked()
            return attend(query, slots.keys, slots.values, mask, scaling)
        group = self.setting.group
        if group >= 16 and group & (group - 1) == 0 and by_kernel(mask, kv_heads, query, rest.keys, rest.values):
            from kvweave.ops.decode import attend_packed
        else:
            from kvweave.ops.packed_attention import attend_packed
        rows = query.reshape(batch, kv_heads, -1, dim)
        shape = batch, kv_heads, self.packed + rest.count
        bias = None if mask is None else as_bias(mask, query.dtype).expand(shape)
        scaling = dim**-0.5 if scaling is None else scaling
        out = attend_packed(rows, self.keys, self.values, (rest.keys, rest.values), bias, scaling)
        return out.reshape(batch, 1, heads, -1)


def packed(slots: Slots, setting: Quantization) -> Slots | PackedSlots:
    """`slots` with all whole groups but the youngest `residual` packed; the same if there is none."""
    young = slots.keys.shape[2]
    count = max(0, young - setting.residual) // setting.group * setting.group
    if not count:
        return slots
    keys = slots.keys[:, :, :count].unflatten(2, (-1, setting.group))
    values = slots.values[:, :, :count]
    channels = setting.group if values.shape[-1] % setting.group == 0 else values.shape[-1]
    young_keys, young_values = slots.keys[:, :, count:].clone(), slots.values[:, :, count:].clone()
    rest = replace(slots, keys=young_keys, values=young_values, room=None)
    return PackedSlots(
        pack(keys, setting.bits, -2), pack(values.unflatten(-1, (-1, channels)), setting.bits, -1), rest, setting
    )


def _joined(old: Packed, new: Packed) -> Packed:
    return Packed(
        torch.cat([old.codes, new.codes], 2),
        torch.cat([old.scale, new.scale], 2),
        torch.cat([old.zero, new.zero], 2),
        old.bits,
    )
