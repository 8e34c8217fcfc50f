"""What a layer of a compressed cache holds, and how rows and columns leave it.

Two lengths are kept apart: the logical one, which transformers is told and positions are counted by, and the
number of slots that memory holds (`kvweave.memory.block`). How they come in and are cut is `kvweave.seam.layer`.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kvweave.cut.prompt_cut import PromptCut
from kvweave.cut.record import Record
from kvweave.cut.stream_cut import StreamCut
from kvweave.memory.block import Block, Fixed
from kvweave.memory.fixed_heads import in_fixed_buffers, out_of_fixed_buffers
from kvweave.seam.shared import Shared


class HeldLayer(DynamicLayer):
    """One layer's keys and values in memory.

    Attributes:
        index: its number among the layers that are compressed.
        block: what memory holds; None: nothing yet.
        fixed: blocks in fixed buffers, while decode steps are compiled; else empty.
        seen: logical length, every token seen; not kept while memory lies in fixed buffers.
        prompt_cut: the prompt's way to its cut, and what the last one did.
        why: it is not compressed; empty: it is.
    """

    def __init__(self, index: int, shared: Shared) -> None:
        self.index = index
        self.shared = shared
        self._clear()
        super().__init__()

    def _clear(self) -> None:
        self.block: Block | None = None
        self.fixed: tuple[Fixed, ...] = ()
        self._seen = 0
        self.prompt_cut = PromptCut(self.index) if self.shared.stream is None else StreamCut(self.index)
        self.why = ""
        self.unread = False  # keys handed out that attention has not been seen to read
        self._new = 0

    # ---------------------------------------------------------------- what users ask

    @property
    def compressed(self) -> bool:
        """The layer is compressed; else `why` says why not."""
        return not self.why

    @property
    def keys(self) -> Tensor | None:
        """[batch, kv_heads, slots, dim], heads that hold less padded in front."""
        return None if self.block is None else self.block.as_slots(self._valid).keys

    @keys.setter
    def keys(self, value: None) -> None:
        """For transformers' constructor, which sets them to None."""

    @property
    def values(self) -> Tensor | None:
        """[batch, kv_heads, slots, dim]."""
        return None if self.block is None else self.block.as_slots(self._valid).values

    @values.setter
    def values(self, value: None) -> None:
        """For transformers' constructor, which sets them to None."""

    @property
    def positions(self) -> Tensor | None:
        """int64 [batch, kv_heads, slots], logical column of each slot, ascending; -1: empty, those come first."""
        return None if self.block is None else self.block.outline(self._valid).positions

    @property
    def mass(self) -> Tensor | None:
        """float32 [batch, kv_heads, slots], tokens that a slot stands for."""
        return None if self.block is None else self.block.outline(self._valid).mass

    @property
    def bias(self) -> Tensor | None:
        """float32 [batch, kv_heads, slots], what decoding adds to a slot's logit; None: nothing."""
        return None if self.block is None else self.block.outline(self._valid).bias

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that memory holds."""
        return 0 if self.block is None else self.block.nbytes

    @property
    def flow(self) -> float | None:
        """The layer's flow ratio at the last cut, mean over rows, or None."""
        return self.prompt_cut.flow

    @property
    def fate(self) -> list[Tensor]:
        """With `trace`, for each row int64 [kv_heads, length], the slot that a slot lives on in, -1: evicted."""
        return self.prompt_cut.fate

    @property
    def _valid(self) -> Tensor | None:
        prompt = self.shared.turn.prompt
        return None if prompt is None else prompt.valid

    @property
    def record(self) -> Record | None:
        """What the report says of the last cut; of a stream, of the whole input."""
        cut, prompt = self.prompt_cut, self.shared.turn.prompt
        if not isinstance(cut, StreamCut) or self.block is None or prompt is None:
            return cut.record
        return cut.recorded(self.block, prompt, self.shared.terms(cut.query_shape[0]))

    def hold(self, block: Block, seen: int) -> None:
        """Let memory hold `block`, of `seen` tokens, as after a prompt that was cut."""
        self.block, self._seen = block, seen

    # ---------------------------------------------------------------- fixed buffers

    @property
    def seen(self) -> int:
        """Logical length: every token seen; a host synchronisation where memory lies in fixed buffers."""
        return int(self.fixed[0].seen) if self.fixed else self._seen

    def reserve(self, tokens: int) -> None:
        """Lay what memory holds in fixed buffers, with room for `tokens` more."""
        assert self.block is not None
        assert self._valid is not None
        self.block = in_fixed_buffers(self.block, tokens, self._seen, self._valid)
        self.fixed = self.block.fixed

    def settle(self) -> None:
        """Leave the fixed buffers."""
        if self.fixed:
            assert self.block is not None
            self._seen = self.seen
            self.block, self.fixed = out_of_fixed_buffers(self.block), ()

    # ---------------------------------------------------------------- what transformers asks

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_seq_length(self) -> Any:
        """Logical length: every token seen; a tensor where memory lies in fixed buffers, as in a static cache."""
        return self.fixed[0].seen if self.fixed else self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical sizes: the model builds its whole mask, attention picks the slots' columns from it.

        In a long stream the whole mask would be long: where a pass sees all slots, it speaks of its own columns.
        """
        if self.shared.turn.narrow and query_length > 1:
            return query_length, self._seen
        return self.fixed[0].columns if self.fixed else self._seen + query_length, 0

    # ---------------------------------------------------------------- columns and rows go

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized = False
        self._clear()

    def offload(self) -> None:
        """Refused: the blocks stay where attention reads them."""
        raise ValueError("a CompressedCache cannot be offloaded")

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; a positive number is the length to crop to (older transformers)."""
        removed = int(tokens_to_remove)  # older transformers count it on the device
        removals = self.seen - removed if removed > 0 else -removed
        if removals <= 0 or self.block is None:
            return
        column = self.seen - removals
        if column <= 0:
            self.reset()
            return
        self.settle()
        self.block = self.block.before(column, self._seen)
        self.prompt_cut.crop(removals, column)
        self._seen = column

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows of the batch, in that order."""
        self.settle()
        self.block = None if self.block is None else self.block.rows(indices)
        self.prompt_cut.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.block is not None:
            batch = self.block.outline().keys.shape[0]
            self.batch_select_indices(torch.arange(batch).repeat_interleave(repeats))
