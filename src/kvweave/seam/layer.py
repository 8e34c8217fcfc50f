"""One layer of a compressed cache, from the keys that come in to the cut.

Transformers calls `update`; attention reads what it returns, and calls `after_attention`. When and how the layer is
cut says `kvweave.cut.prompt_cut`; what it holds, `kvweave.seam.held`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvweave.cut.rows import Share
from kvweave.cut.stream_cut import StreamCut
from kvweave.cut.terms import Pending, Terms
from kvweave.memory.block import Block
from kvweave.memory.heads import unpacked
from kvweave.memory.slots import Slots
from kvweave.ops.statistics import AttentionRule
from kvweave.seam.held import HeldLayer


@dataclass(frozen=True)
class Link:
    """Goes with the keys from `update` to attention: whose they are, and what lies in memory at that moment.

    Attributes:
        values: of `block`, as `update` returned them; None: what it holds is apart from that, packed or by head.
    """

    layer: "CompressedLayer"
    block: Block
    values: Tensor | None


class CompressedLayer(HeldLayer):
    """One layer's keys and values, compressed once the prompt that fills it ends."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens; the keys carry a `Link` to attention."""
        if not self.shared.attached:
            raise RuntimeError(
                "a CompressedCache is read by a model that kvweave is not attached to: use it inside "
                "kvweave.compress(model, method) or after kvweave.attach(model)"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        if self.fixed:  # tensors alone change: a step can be compiled once, or captured
            assert self.block is not None
            self.block.append(key_states, value_states, 0)
            return self._linked(key_states, value_states, self.block, new)
        if self.block is None:
            self.block = Slots(key_states, value_states)
        else:
            self.block = self.block.append(key_states, value_states, self._seen)
        self._new, self._seen = new, self._seen + new
        self.unread = self.shared.filled = True
        return self._linked(key_states, value_states, self.block, new)

    def _linked(self, keys: Tensor, values: Tensor, block: Block, new: int) -> tuple[Tensor, Tensor]:
        """Keys and values for attention, the keys with a link to what is to be read."""
        tensors = block.tensors
        if tensors is None and new > 1:  # one token is attended to without unpacking what is packed
            block = unpacked(block)
            tensors = block.tensors
        if tensors is not None:
            keys, values = tensors
        linked: Any = keys.view_as(keys)
        linked._kvweave = Link(self, block, None if tensors is None else values)
        return linked, values

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
        assert self.block is not None
        assert turn.prompt is not None
        if isinstance(cut, StreamCut):
            if not turn.frozen:
                ended = start < turn.end <= self._seen
                self._keep(cut.take(self.block, turn.prompt, queries, rule, mask, ended=ended, terms=self._terms))
        elif start >= turn.end:
            if cut.waiting is not None:
                cut.waiting.note(queries.detach(), start - turn.end)
        elif cut.collect(queries, start, turn.end, self.shared.query_rows):  # the prompt's last ones have been seen
            turn.observe()
            behind = self._seen - turn.end
            self._keep(cut.complete(self.block, turn.prompt, turn.end, behind, queries, rule, mask, self._terms))
            if cut.waiting is not None:
                turn.wait()

    def _keep(self, outcome: tuple[Block, Tensor | None]) -> None:
        """Hold what a cut has left, as in `PromptCut.cut`."""
        self.block, valid = outcome
        if valid is not None:
            self.shared.turn.note_cut(valid)

    @property
    def _terms(self) -> Terms:
        return self.shared.terms(self.prompt_cut.query_shape[0])

    @torch.no_grad()
    def count_attention(self, counted: Tensor, weights: Tensor | None = None) -> None:
        """Note what the tokens behind the prompt attend to in it: as in `PromptCut.count_attention`."""
        assert self.block is not None
        self.prompt_cut.count_attention(self.block, counted, self.seen, self._terms, weights)

    @torch.no_grad()
    def weigh(self, counted: Tensor | None) -> list[Any]:
        """What is known of each row of the prompt that waits, as in `PromptCut.weigh`."""
        assert self.block is not None
        return self.prompt_cut.weigh(self.block, counted, self.seen, self._terms)

    @torch.no_grad()
    def due(self, share: Sequence[Share], counted: Tensor | None) -> Pending:
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
        self._keep(self.prompt_cut.cut(self.block, pending, share, self._terms))

    @torch.no_grad()
    def ready(self, probing: int = 0) -> Pending:
        """What the cut of a stream that is due at a pass's end will need, as in `StreamCut.ready`."""
        prompt = self.shared.turn.prompt
        assert isinstance(self.prompt_cut, StreamCut)
        assert self.block is not None
        assert prompt is not None
        return self.prompt_cut.ready(self.block, prompt, self._terms, probing)
