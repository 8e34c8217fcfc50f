"""Rows of many requests that decode together: one buffer a layer, a row a request, a cursor a row.

Iteration-level scheduling (Orca, OSDI 2022) over compressed caches. A row is what a `CompressedCache` of one prompt
kept; once its entries lie in the pool, the model's own attention reads them, and nothing of kvweave runs any more.
That takes heads and layers that keep equally many entries, and no bias: `refusal` says what stands against it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from kvweave.seam import lookup, names
from kvweave.seam.cache import CompressedCache
from kvweave.seam.layer import CompressedLayer

_ROUND = 64  # capacities are multiples of it, so that rows come and go without buffers being laid out anew


class _RowLayer(DynamicLayer):
    """One layer of a pool: keys and values [rows, kv_heads, capacity, dim], of which `pool.rows` rows are in use."""

    keys: Tensor | None
    values: Tensor | None

    def __init__(self, pool: "RowPool") -> None:
        super().__init__()
        self.pool = pool

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write each row's token, [rows, kv_heads, 1, dim], where its cursor says."""
        assert self.keys is not None
        assert self.values is not None
        rows, width = len(self.pool.cursors), self.pool.width
        row = torch.arange(rows, device=self.keys.device)
        at = torch.tensor(self.pool.cursors, device=self.keys.device)
        self.keys[row, :, at] = key_states[:, :, 0]
        self.values[row, :, at] = value_states[:, :, 0]
        return self.keys[:rows, :, :width], self.values[:rows, :, :width]

    def get_seq_length(self) -> int:
        return self.pool.width - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.pool.width, 0

    def lay(self, rows: int, capacity: int, like: tuple[Tensor, Tensor]) -> None:
        """Buffers of this size, for entries such as `like`, with what the old ones hold of them."""
        used, width = len(self.pool.cursors), max(self.pool.cursors, default=0)
        laid = []
        for old, one in zip((self.keys, self.values), like, strict=True):
            new = one.new_zeros(rows, one.shape[-3], capacity, one.shape[-1])
            if old is not None:
                new[:used, :, :width] = old[:used, :, :width]
            laid.append(new)
        self.keys, self.values = laid
        self.is_initialized = True

    def clear(self) -> None:
        """Give the memory back."""
        self.keys = self.values = None
        self.is_initialized = False


class RowPool(Cache):
    """The rows that decode together.

    Attributes:
        most: rows that it takes.
        cursors: of each row in use, the slot of its next token.
        ends: alike, the slot before which its last token lies: more is never written.
        width: slots that a decode step reads.
    """

    def __init__(self, layers: int, most: int) -> None:
        self.most = most
        self.cursors: list[int] = []
        self.ends: list[int] = []
        self.width = 0
        self._positions: list[Tensor] = []  # of each row's next token, [*axes, 1, 1]
        self._laid = (0, 0)  # rows and capacity of the buffers
        super().__init__(layers=[_RowLayer(self) for _ in range(layers)])

    # ---------------------------------------------------------------- what it holds

    @property
    def rows(self) -> int:
        """Rows in use."""
        return len(self.cursors)

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers."""
        tensors = (x for layer in self.layers for x in (layer.keys, layer.values) if x is not None)
        return sum(x.numel() * x.element_size() for x in tensors)

    def slots_with(self, lengths: list[int]) -> int:
        """Slots of its buffers, in each head of each layer, once rows of these lengths have come as well.

        Args:
            lengths: entries of each, those to be decoded included.
        """
        return _slots(*self._needed([*self.ends, *lengths]))

    # ---------------------------------------------------------------- rows come and go

    def admit(self, cache: CompressedCache, tokens: int, position: Tensor) -> int:
        """Let what `cache` holds of one prompt be the next row; the cache itself may go.

        Args:
            cache: one that `refusal` has nothing against.
            tokens: that are decoded at most.
            position: int64 [*axes, 1, 1], of the next one.
        Returns:
            the row's number.
        """
        blocks = [layer.block.as_slots() for layer in cache.layers]
        count = blocks[0].count
        self._fit([*self.ends, count + tokens], [(block.keys, block.values) for block in blocks])
        row = len(self.cursors)
        for layer, block in zip(self.layers, blocks, strict=True):
            layer.keys[row, :, :count] = block.keys[0]
            layer.values[row, :, :count] = block.values[0]
        self.cursors.append(count)
        self.ends.append(count + tokens)
        self._positions.append(position)
        return row

    def drop(self, row: int) -> None:
        """Let a row go; the last one takes its place and its number."""
        last = len(self.cursors) - 1
        if row != last:
            end = self.cursors[last]
            for layer in self.layers:
                layer.keys[row, :, :end] = layer.keys[last, :, :end]
                layer.values[row, :, :end] = layer.values[last, :, :end]
        self.cursors[row], self.ends[row], self._positions[row] = self.cursors[-1], self.ends[-1], self._positions[-1]
        for of_rows in (self.cursors, self.ends, self._positions):
            of_rows.pop()
        self._fit(self.ends, [(layer.keys[:1], layer.values[:1]) for layer in self.layers])

    def clear(self) -> None:
        """Let all rows go."""
        for of_rows in (self.cursors, self.ends, self._positions):
            of_rows.clear()
        self._fit([], [])

    def _needed(self, ends: list[int]) -> tuple[int, int]:
        """Rows and capacity of the buffers for rows that end there."""
        rows = 0 if not ends else min(self.most, 1 << (len(ends) - 1).bit_length())
        capacity = -(-max(ends, default=0) // _ROUND) * _ROUND
        if len(ends) > self.most:
            raise ValueError(f"a row pool of {self.most} rows is full: allowed is {self.most} rows at a time")
        keeps = self._laid[0] >= rows and self._laid[1] >= capacity
        return self._laid if keeps and _slots(*self._laid) <= 4 * _slots(rows, capacity) else (rows, capacity)

    def _fit(self, ends: list[int], like: list[tuple[Tensor, Tensor]]) -> None:
        """Lay out buffers for rows that end there, one layer at a time."""
        needed = self._needed(ends)
        if needed == self._laid:
            return
        for number, layer in enumerate(self.layers):
            if needed[0]:
                layer.lay(*needed, like[number])
            else:
                layer.clear()
        self._laid = needed

    # ---------------------------------------------------------------- a token for each row

    @torch.inference_mode()
    def decode(self, model: nn.Module, tokens: list[int]) -> Tensor:
        """One decode step of all rows.

        Args:
            model: to which kvweave may be attached or not.
            tokens: of each row, the last one that it decoded.
        Returns:
            [rows, vocabulary], logits of the next tokens.
        """
        self.width = max(self.cursors) + 1
        home: Tensor = self.layers[0].keys
        ends = torch.tensor(self.cursors, device=home.device)
        mask: Tensor = (torch.arange(self.width, device=home.device) <= ends[:, None])[:, None, None]
        if lookup.implementation(_decoder(model)) == "eager":
            mask = torch.zeros_like(mask, dtype=home.dtype).masked_fill(~mask, torch.finfo(home.dtype).min)
        step: dict[str, Any] = {
            "input_ids": torch.tensor(tokens, device=home.device)[:, None],
            names.CACHE: self,
            "attention_mask": mask,
            "position_ids": torch.cat(self._positions, -2),
            "use_cache": True,
            "return_dict": True,
        }
        logits = model(**step).logits[:, -1]
        self.cursors = [cursor + 1 for cursor in self.cursors]
        self._positions = [position + 1 for position in self._positions]
        return logits


def refusal(model: nn.Module, cache: CompressedCache) -> str:
    """Why a cache's prompt cannot be a row of a pool; empty: it can."""
    if lookup.implementation(_decoder(model)) not in ("sdpa", "eager"):
        return "the model's attention takes no mask"
    if cache.waits:
        return "the cut is still to come"
    if cache.method.storage is not None:
        return "entries are packed in few bits"
    counts = set()
    for layer in cache.layers:
        if not isinstance(layer, CompressedLayer) or layer.why or layer.block is None:
            return "some layers are not compressed"
        if len(layer.block.parts) > 1:
            return "heads keep different counts"
        slots = layer.block.as_slots()
        if slots.bias is not None:
            return "entries have a bias"
        if len(slots.keys) != 1:
            return "the prompt is one of several"
        if slots.has_empty:  # heads that hold less lie padded beside the others
            return "heads keep different counts"
        counts.add(slots.count)
    return "layers keep different counts" if len(counts) > 1 else ""


def _slots(rows: int, capacity: int) -> int:
    return rows * capacity


def _decoder(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)
