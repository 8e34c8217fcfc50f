"""One layer of a compressed cache: what it holds, and transformers' methods.

Two lengths are kept apart: the logical one, which transformers is told and positions are counted by, and the
number of slots that memory holds (`kvweave.memory.block`). When and how it is cut says `kvweave.cut.prompt_cut`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kvweave.cut.prompt_cut import Pending, PromptCut, Terms
from kvweave.cut.rows import Share
from kvweave.memory.block import Block
from kvweave.memory.fixed import FixedSlots
from kvweave.memory.heads import block_of, in_fixed_buffers, unpacked
from kvweave.memory.slots import Slots
from kvweave.ops.statistics import AttentionRule
from kvweave.seam.shared import Shared


@dataclass(frozen=True)
class Link:
    """Goes with the keys from `update` to attention: whose they are, and what lies in memory at that moment.

    Attributes:
        apart: the keys and values of `block` are not those that `update` returned: packed, or by head.
    """

    layer: "CompressedLayer"
    block: Block
    apart: bool


class CompressedLayer(DynamicLayer):
    """One layer's keys and values, compressed once the prompt that fills it ends.

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
        self.fixed: tuple[FixedSlots, ...] = ()
        self._seen = 0
        self.prompt_cut = PromptCut(self.index)
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
        self.fixed = in_fixed_buffers(self.block, tokens, self._seen, self._valid)
        self.block = block_of(self.fixed)

    def settle(self) -> None:
        """Leave the fixed buffers."""
        if self.fixed:
            self._seen = self.seen
            self.block = block_of([block.out_of_room() for block in self.fixed])
            self.fixed = ()

    # ---------------------------------------------------------------- what transformers asks

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens; the keys carry a `Link` to attention."""
        if not self.shared.attached:
            raise RuntimeError(
                "a CompressedCache is read by a model that kvweave is not attached to: use it inside "
                "kvweave.compress(model, method) or after kvweave.attach(model)"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.fixed:  # tensors alone change: a step can be compiled once, or captured
            assert self.block is not None
            self.block.append(key_states, value_states, 0)
            return self._linked(key_states, value_states, self.block)
        if self.block is None:
            self.block = Slots(key_states, value_states)
        else:
            self.block = self.block.append(key_states, value_states, self._seen)
        self._new = key_states.shape[-2]
        self._seen += self._new
        self.unread = True
        one = self._new == 1  # a token is attended to without unpacking what is packed
        return self._linked(key_states, value_states, self.block if one else unpacked(self.block))

    def _linked(self, keys: Tensor, values: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """Keys and values for attention, the keys with a link to what is to be read."""
        tensors = block.tensors
        keys, values = tensors or (keys, values)
        keys = keys.view_as(keys)
        keys._kvweave = Link(self, block, tensors is None)  # type: ignore[attr-defined]
        return keys, values

    def get_seq_length(self) -> Any:
        """Logical length: every token seen; a tensor where memory lies in fixed buffers, as in a static cache."""
        return self.fixed[0].seen if self.fixed else self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical sizes: the model builds its whole mask, attention picks the slots' columns from it."""
        return self.fixed[0].columns if self.fixed else self._seen + query_length, 0

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
        gone = self.seen - removed if removed > 0 else -removed
        if gone <= 0 or self.block is None:
            return
        column = self.seen - gone
        if column <= 0:
            self.reset()
            return
        self.settle()
        self.block = self.block.before(column, self._seen)
        self.prompt_cut.crop(gone, column)
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

    # ---------------------------------------------------------------- compression

    @torch.no_grad()
    def after_attention(self, queries: Tensor, rule: AttentionRule, mask: Tensor | None) -> None:
        """Called once attention has read the keys of a forward pass; cuts the layer when the prompt is complete.

        Args:
            queries: [batch, heads, new, dim] as attention took them.
            rule: scaling, soft cap and sinks of the layer.
            mask: [batch or 1, heads or 1, new, slots], as attention took it; None: causal.
        """
        if not self.unread or self.fixed:
            return  # a second reader of the same keys (layers that share them)
        self.unread = False
        turn, cut, start = self.shared.turn, self.prompt_cut, self._seen - self._new
        cut.query_shape = queries.shape[1], queries.shape[3]
        if queries.shape[2] != self._new:
            self.why = "cross attention"
        if self.why or turn.end is None:
            return
        if start >= turn.end:
            if cut.waiting is not None:
                cut.waiting.note(queries.detach(), start - turn.end)
        elif cut.collect(queries, start, turn.end, self.shared.query_rows):
            self._complete(queries, rule, mask, turn.end)

    def _complete(self, queries: Tensor, rule: AttentionRule, mask: Tensor | None, end: int) -> None:
        """The prompt's last queries have been seen."""
        turn, cut = self.shared.turn, self.prompt_cut
        assert self.block is not None
        assert turn.prompt is not None
        turn.observe()
        behind = self._seen - end
        self.block, valid = cut.complete(self.block, turn.prompt, end, behind, queries, rule, mask, self._terms)
        if valid is not None:
            turn.note_cut(valid)
        if cut.waiting is not None:
            turn.wait()

    @property
    def _terms(self) -> Terms:
        return self.shared.terms(self.prompt_cut.query_shape[0])

    @torch.no_grad()
    def count_attention(self, counted: Tensor) -> None:
        """Note what the tokens behind the prompt attend to in it: bool [batch, tokens], those that count."""
        assert self.block is not None
        self.prompt_cut.count_attention(self.block, counted, self.seen, self._terms)

    @torch.no_grad()
    def due(self, share: Sequence[Share] | None, counted: Tensor | None) -> Pending:
        """The prompt that waited, ready for `cut`, as in `PromptCut.due`."""
        assert self.block is not None
        return self.prompt_cut.due(self.block, share, counted, self.seen, self._terms)

    @torch.no_grad()
    def cut(self, pending: Pending, share: Sequence[Share]) -> None:
        """Replace the prompt's slots by what the method keeps of them.

        Args:
            share: entries that each row of the batch keeps in this layer.
        """
        assert self.block is not None
        self.block, valid = self.prompt_cut.cut(self.block, pending, share, self._terms)
        self.shared.turn.note_cut(valid)
