"""One layer of a compressed cache: what it holds, how it takes in new tokens, and its cut.

Two lengths are kept apart: the logical one, which transformers is told and positions are counted by, and the
number of slots that memory holds. `kvweave.seam.session` lets attention know which logical column each slot is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kvweave.cut.record import Record
from kvweave.cut.rows import Group, Share, compact, fits, group_rows, observe, smallest
from kvweave.cut.waiting import Waiting, known_by_row
from kvweave.memory.fixed import FixedSlots
from kvweave.memory.packed import PackedSlots, packed
from kvweave.memory.slots import Slots, rectangular, stored
from kvweave.methods.base import ALL_ROWS
from kvweave.ops.budget import entries
from kvweave.ops.heads import Heads
from kvweave.ops.statistics import AttentionRule
from kvweave.plan import Compacted
from kvweave.prompt import Prompt
from kvweave.seam.turn import Conversation


@dataclass(frozen=True)
class Link:
    """Goes with the keys from `update` to attention: whose they are, and what lies in memory at that moment."""

    layer: "CompressedLayer"
    blocks: tuple[Slots | PackedSlots | FixedSlots, ...]

    @property
    def compressed(self) -> bool:
        """The slots are known to be real tokens, or say where they are none."""
        slots = [block.rest if isinstance(block, PackedSlots) else block for block in self.blocks]
        return all(isinstance(block, FixedSlots) or block.positions is not None for block in slots)


@dataclass
class Pending:
    """A layer between its attention and its cut.

    Attributes:
        groups: what the method sees, rows of equal length together.
        weights: what was observed of each group, for layer-adaptive methods.
        budgets, lengths: mean entries of a layer and real tokens, by row of the batch.
        prompt: the prompt's slots; behind: those behind it, which are not cut.
        valid: bool [batch, columns], real tokens of the prompt.
    """

    groups: list[Group]
    weights: list[Any]
    budgets: list[int]
    lengths: list[int]
    prompt: Slots
    behind: Slots
    valid: Tensor


class CompressedLayer(DynamicLayer):
    """One layer's keys and values, compressed once the prompt that fills it ends.

    Attributes:
        blocks: what memory holds: one block for all KV heads, or one for each where heads keep different counts.
        flow: the layer's flow ratio at the last cut, mean over rows, or None.
        fate: with `trace`, for each row int64 [kv_heads, length], the slot that a slot lives on in, -1: evicted.
        kind: "full" for a layer that is compressed, else why it is not.
    """

    def __init__(self, index: int, conversation: Conversation) -> None:
        self.index = index
        self.conversation = conversation
        self._clear()
        super().__init__()

    def _clear(self) -> None:
        self._blocks: list[Slots | PackedSlots] = []
        self._seen = 0
        self.fixed: tuple[FixedSlots, ...] = ()  # what memory holds instead, while decode steps are compiled
        self.kind = "full"
        self.flow: float | None = None
        self.fate: list[Tensor] = []
        self.memory: Tensor | None = None  # what the method left for a later turn
        self.record: Record | None = None
        self.pending: Pending | None = None
        self.waiting: Waiting | None = None
        self.unread = False  # keys handed out that attention has not been seen to read
        self.rotated = True  # keys carry a rotary phase
        self.projection: Tensor | None = None  # the output projection, for methods that look through it
        self._new = 0
        self._query_shape = 0, 0  # heads, dim
        self._queries: list[Tensor] = []

    # ---------------------------------------------------------------- what memory holds

    @property
    def blocks(self) -> list[Slots | PackedSlots]:
        """What memory holds; a host synchronisation where it lies in fixed buffers."""
        return [block.settled() for block in self.fixed] if self.fixed else self._blocks

    @blocks.setter
    def blocks(self, blocks: list[Slots | PackedSlots]) -> None:
        seen = self.seen
        self._blocks, self._seen, self.fixed = blocks, seen, ()

    @property
    def seen(self) -> int:
        """Logical length: every token seen; a host synchronisation where memory lies in fixed buffers."""
        return int(self.fixed[0].seen) if self.fixed else self._seen

    @seen.setter
    def seen(self, seen: int) -> None:
        self._seen = seen

    def reserve(self, tokens: int) -> None:
        """Lay what memory holds in fixed buffers, with room for `tokens` more."""
        assert self.conversation.prompt is not None
        valid = self.conversation.prompt.valid
        blocks = [block.explicit(valid) for block in self.blocks if isinstance(block, Slots)]
        self.fixed = tuple(FixedSlots.of(block, tokens, self.seen, valid) for block in blocks)
        self._blocks = []

    def settle(self) -> None:
        """Leave the fixed buffers."""
        self.blocks = self.blocks

    # ---------------------------------------------------------------- what users ask

    @property
    def slots(self) -> Slots | None:
        """What memory holds, positions written out, heads that hold less padded in front; None: nothing yet."""
        if not self.blocks:
            return None
        prompt = self.conversation.prompt
        whole = rectangular([block.unpacked() for block in self.blocks])
        return whole if prompt is None else whole.explicit(prompt.valid)

    def _part(self, name: str) -> Any:
        slots = self.slots
        return None if slots is None else getattr(slots, name)

    def _known(self, name: str) -> Any:
        """Positions, mass or bias, without writing out keys and values."""
        if not self.blocks:
            return None
        prompt = self.conversation.prompt
        whole = rectangular([block.outlined() for block in self.blocks])
        return getattr(whole if prompt is None else whole.explicit(prompt.valid), name)

    @property
    def keys(self) -> Tensor | None:
        """[batch, kv_heads, slots, dim]."""
        return self._part("keys")

    @keys.setter
    def keys(self, value: None) -> None:
        """For transformers' constructor, which sets them to None."""

    @property
    def values(self) -> Tensor | None:
        """[batch, kv_heads, slots, dim]."""
        return self._part("values")

    @values.setter
    def values(self, value: None) -> None:
        """For transformers' constructor, which sets them to None."""

    @property
    def positions(self) -> Tensor | None:
        """int64 [batch, kv_heads, slots], logical column of each slot, ascending; -1: empty, those come first."""
        return self._known("positions")

    @property
    def mass(self) -> Tensor | None:
        """float32 [batch, kv_heads, slots], tokens that a slot stands for."""
        return self._known("mass")

    @property
    def bias(self) -> Tensor | None:
        """float32 [batch, kv_heads, slots], what decoding adds to a slot's logit; None: nothing."""
        return self._known("bias")

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that memory holds."""
        return sum(block.nbytes for block in self.blocks)

    # ---------------------------------------------------------------- what transformers asks

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens; the keys carry a `Link` to attention."""
        if not self.conversation.attached:
            raise RuntimeError(
                "a CompressedCache is read by a model that kvweave is not attached to: use it inside "
                "kvweave.compress(model, method) or after kvweave.attach(model)"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.fixed:
            return self._append_fixed(key_states, value_states)
        if not self.blocks:
            self.blocks = [Slots(key_states, value_states)]
        elif len(self.blocks) == 1:
            self.blocks = [self.blocks[0].appended(key_states, value_states, self.seen)]
        else:
            heads = zip(self.blocks, key_states.split(1, 1), value_states.split(1, 1), strict=True)
            self.blocks = [block.appended(keys, values, self.seen) for block, keys, values in heads]
        self._new = key_states.shape[-2]
        self.seen += self._new
        self.unread = True
        unpacks = self._new > 1  # one token is attended to without
        blocks = tuple(block.unpacked() if unpacks else block for block in self.blocks)
        return self._linked(key_states, value_states, blocks)

    def _append_fixed(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """One token into fixed buffers, nothing else changes: a step can be compiled once, or captured."""
        if len(self.fixed) == 1:
            self.fixed[0].append(keys, values)
        else:
            for block, key, value in zip(self.fixed, keys.split(1, 1), values.split(1, 1), strict=True):
                block.append(key, value)
        return self._linked(keys, values, self.fixed)

    def _linked(
        self, keys: Tensor, values: Tensor, blocks: tuple[Slots | PackedSlots | FixedSlots, ...]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values for attention, the keys with a link to what is to be read."""
        if len(blocks) == 1 and not isinstance(blocks[0], PackedSlots):
            keys, values = blocks[0].keys, blocks[0].values
        keys = keys.view_as(keys)
        keys._kvweave = Link(self, blocks)  # type: ignore[attr-defined]
        return keys, values

    def get_seq_length(self) -> Any:
        """Logical length: every token seen; a tensor where memory lies in fixed buffers, as in a static cache."""
        return self.fixed[0].seen if self.fixed else self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical sizes: the model builds its whole mask, attention picks the slots' columns from it."""
        if self.fixed:
            first = self.fixed[0]
            return first.column + first.keys.shape[2] - first.start.count, 0
        return self.seen + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized = False
        self._clear()

    def offload(self) -> None:
        """Refused: the blocks stay where attention reads them."""
        raise ValueError("a CompressedCache cannot be offloaded")

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; a positive number is the length to crop to (older transformers)."""
        asked = int(tokens_to_remove)  # older transformers count it on the device
        gone = self.seen - asked if asked > 0 else -asked
        if gone <= 0 or not self.blocks:
            return
        column = self.seen - gone
        if column <= 0:
            self.reset()
            return
        self.blocks = [block.before(column, self.seen) for block in self.blocks]
        if self._queries:
            rows = torch.cat(self._queries, 2)
            self._queries = [rows[:, :, : rows.shape[2] - gone]]
        if self.waiting is not None and column < self.waiting.prompt.length:
            self.waiting = None  # what was known spoke of a longer prompt
        self.seen = column

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows of the batch, in that order."""
        self.blocks = [block.rows(indices) for block in self.blocks]
        self._queries = [queries[indices.to(queries.device)] for queries in self._queries]
        self.waiting = self.waiting.rows(indices) if self.waiting is not None else None
        self.memory = self.memory[indices.to(self.memory.device)] if self.memory is not None else None

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.blocks:
            batch = self.blocks[0].unpacked().keys.shape[0]
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
        self._query_shape = queries.shape[1], queries.shape[3]
        if queries.shape[2] != self._new:
            self.kind = "cross attention"
            return
        talk = self.conversation
        start = self.seen - self._new
        if self.kind != "full" or talk.end is None:
            return
        if start >= talk.end:
            if self.waiting is not None:
                self.waiting.note(queries.detach(), start - talk.end)
            return
        self.waiting = None  # another prompt: it is compressed with all that came before
        real = min(self.seen, talk.end) - start
        wanted = talk.query_rows
        if wanted:
            self._queries.append(queries[:, :, :real].detach())
            if wanted != ALL_ROWS and len(self._queries) > 1:
                self._queries = [torch.cat(self._queries, 2)[:, :, -wanted:].clone()]
        if self.seen < talk.end:
            return
        behind = self.seen - talk.end  # candidates of assisted decoding
        asked = torch.cat(self._queries, 2) if self._queries else None
        self._queries = []
        # Of a prompt that came in pieces only the last one's mask is at hand: the whole counts as causal.
        whole = asked is not None and asked.shape[2] == real
        mask = mask[:, :, :real, : mask.shape[-1] - behind] if mask is not None and whole else None
        if mask is not None and mask.shape[1] not in (1, queries.shape[1]):
            mask = mask.repeat_interleave(queries.shape[1] // mask.shape[1], 1)
        self._prompt_complete(asked, rule, mask, behind)
        if self.waiting is not None:
            self.waiting.note(queries[:, :, real:].detach(), 0)

    def _prompt_complete(self, queries: Tensor | None, rule: AttentionRule, mask: Tensor | None, behind: int) -> None:
        """Cut all slots but the last `behind`, or with a layer-adaptive method prepare for `cut`."""
        talk = self.conversation
        talk.deferred, talk.probes = None, {}
        assert talk.prompt is not None
        prompt = talk.prompt.cropped(talk.end).to(self.device)
        lengths = prompt.lengths
        slots = self._all_slots()
        first = slots.positions is None
        slots = slots.explicit(talk.prompt.valid, padded=talk.prompt.padded)
        whole, after = slots.first(slots.count - behind), slots.after(slots.count - behind)
        if mask is not None:  # other processes' heads may hold more slots
            hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            mask = F.pad(mask, (whole.count - mask.shape[-1], 0), value=hidden)
        entry_bytes = talk.layers * self._heads.size * slots.nbytes // slots.count
        budgets = [entries(talk.method.budget, n, entry_bytes) for n in lengths]
        share = [
            talk.method.layer_budgets(b, n, talk.layers)[self.index] for b, n in zip(budgets, lengths, strict=True)
        ]
        adaptive = talk.method.layer_adaptive
        if first and not adaptive and all(smallest(b) >= n for b, n in zip(share, lengths, strict=True)):
            self._store(self.blocks, lengths, whole)  # nothing to give up: not a bit is touched
            return
        groups = self._groups(whole, queries, prompt, rule, mask)
        for group in groups:
            if talk.known is not None:
                rows = 0 if group.view.queries is None else group.view.queries.shape[2]
                group.view.remember_in(talk.known.setdefault((self.index, *group.index, rows), {}))
        pending = Pending(groups, [], budgets, lengths, whole, after, prompt.valid)
        if talk.method.defer or talk.held:
            self._wait(pending, prompt, rule, budgets if adaptive else share)
        elif adaptive:
            pending.weights = observe(talk.method, groups, budgets, lengths)
            self.pending = pending
        else:
            self.cut(pending, share)

    @property
    def _heads(self) -> Heads:
        return self.conversation.heads_of(self._query_shape[0])

    def _all_slots(self) -> Slots:
        """What memory holds, heads side by side; as many slots as in every process that holds other heads."""
        slots = rectangular([block.unpacked() for block in self.blocks])
        return slots.padded(max(self._heads.counts(slots.count, slots.keys.device)))

    def _groups(
        self,
        whole: Slots,
        queries: Tensor | None,
        prompt: Prompt,
        rule: AttentionRule,
        mask: Tensor | None = None,
        apart: Sequence[int] | None = None,
    ) -> list[Group]:
        """What the method sees of the prompt's slots."""
        talk = self.conversation
        groups = group_rows(
            whole,
            queries,
            prompt,
            rule,
            mask=mask,
            layer=self.index,
            layers=talk.layers,
            memory=self.memory,
            rotary=talk.rotary if talk.turns_keys else None,
            wanted=talk.query_rows,
            apart=range(len(prompt.valid)) if talk.method.plans_rows_alone else apart,
            heads=self._heads,
        )
        for group in groups:
            group.view.interleaved, group.view.rotated = talk.interleaved, self.rotated
            group.view.projection = self.projection
        return groups

    def _wait(self, pending: Pending, prompt: Prompt, rule: AttentionRule, budgets: list[int]) -> None:
        """Hold what the prompt's queries say until the first tokens are decoded.

        Args:
            budgets: as in `observe`.
        """
        talk, batch = self.conversation, len(prompt.valid)
        self._store(self.blocks, pending.lengths, pending.prompt, packs=False)
        probed = (False, True) if talk.held else (False,)
        weights = observe(talk.method, pending.groups, budgets, pending.lengths, probed=probed)
        by_row = {row: weight for group, weight in zip(pending.groups, weights, strict=True) for row in group.index}
        heads, dim = self._query_shape
        queries = pending.prompt.keys.new_zeros(batch, heads, talk.awaited, dim)
        self.waiting = Waiting(
            prompt,
            pending.prompt.count,
            known_by_row(pending.groups, batch),
            [by_row[row] for row in range(batch)],
            pending.budgets,
            rule,
            queries,
            [{} for _ in range(batch)],
            [[] for _ in range(batch)],
            torch.zeros(batch, device=queries.device),
        )

    @torch.no_grad()
    def count_attention(self, counted: Tensor) -> None:
        """Note what the tokens behind the prompt attend to in it.

        Args:
            counted: bool [batch, tokens], those that count.
        """
        if self.waiting is not None and self.conversation.query_rows:
            groups, _, after = self._held_groups(self.waiting)
            for group in groups:
                self.waiting.add(group, after.keys, counted, self.conversation.method)

    def _held_groups(self, waiting: Waiting) -> tuple[list[Group], Slots, Slots]:
        """What the method will see of the prompt that waits, its slots, and those behind it."""
        prompt = waiting.prompt.to(self.device)
        slots = self._all_slots()
        behind = prompt.valid.new_ones(len(prompt.valid), self.seen - prompt.length)
        slots = slots.explicit(torch.cat([prompt.valid, behind], 1))
        whole, after = slots.first(waiting.slots), slots.after(waiting.slots)
        rows = [known.get("rows", 0) for known in waiting.known]
        return self._groups(whole, None, prompt, waiting.rule, apart=rows), whole, after

    @torch.no_grad()
    def due(self, share: Sequence[Share] | None, counted: Tensor | None) -> Pending:
        """The prompt that waits, ready for `cut`: the tokens decoded meanwhile have said what they look at.

        Args:
            share: entries that each row of the batch keeps in this layer; None: that depends on what is learnt here.
            counted: bool [batch, tokens], those that count; None: there are none.
        """
        waiting, talk = self.waiting, self.conversation
        assert waiting is not None
        self.waiting = None
        groups, whole, after = self._held_groups(waiting)
        for group in groups:
            view, at = group.view, group.index
            cuts = share is None or smallest(share[at[0]]) < view.length
            if counted is not None and after.count and talk.query_rows and cuts:
                waiting.add(group, after.keys, counted, talk.method, talk.method.decoded_temperature)
            waiting.tell(view, at)
            view.probed = bool(talk.probes)
            rows = waiting.counts[at] if talk.probes else torch.full_like(waiting.counts[at], talk.method.defer)
            view.decoded_weight = talk.method.weight_of(rows)[:, None, None]
        valid = waiting.prompt.valid
        pending = Pending(groups, [], waiting.budgets, waiting.prompt.lengths, whole, after, valid)
        if share is None:
            probed = (bool(talk.probes),)
            pending.weights = observe(talk.method, groups, waiting.budgets, pending.lengths, probed=probed)
        return pending

    @torch.no_grad()
    def cut(self, pending: Pending, share: Sequence[Share]) -> None:
        """Replace the prompt's slots by what the method keeps of them.

        Args:
            share: entries that each row of the batch keeps in this layer.
        """
        self.pending = None
        talk = self.conversation
        talk.note_cut(pending.valid)
        if fits(pending.groups, share) and not self._holds_padding(pending):
            self._store(self.blocks, pending.lengths, pending.prompt, behind=pending.behind.nbytes)
            return
        outcome = compact(talk.method, pending.groups, share, pending.budgets, trace=talk.trace)
        self.flow = outcome.compacted.flow
        self.fate = outcome.fate
        self.memory = self.memory if outcome.memory is None else outcome.memory
        blocks = stored(outcome.compacted, pending.behind)
        self._store(blocks, pending.lengths, outcome.compacted, outcome.rows, behind=pending.behind.nbytes)

    def _holds_padding(self, pending: Pending) -> bool:
        """Slots, known by their columns, that are no real token: padding that came behind an earlier cut."""
        if any(block.outlined().positions is None for block in self.blocks):
            return False
        return bool(pending.prompt.stands_for_others_than(pending.valid).any())

    def _store(
        self,
        blocks: Sequence[Slots | PackedSlots],
        lengths: list[int],
        prompt: Slots | Compacted,
        said: list[dict[str, Any]] | None = None,
        packs: bool = True,
        behind: int = 0,
    ) -> None:
        """Let memory hold `blocks`, and keep what the report will say.

        Args:
            prompt: what is left of the prompt, for its positions and mass.
            said: for each row, what its plan says of itself.
            packs: store it as the method wants it stored.
            behind: bytes of the tokens that lie behind the prompt.
        """
        before, storage = self.nbytes - behind, self.conversation.method.storage if packs else None
        self.blocks = [packed(x, storage) if storage and isinstance(x, Slots) else x for x in blocks]
        assert prompt.positions is not None
        assert prompt.mass is not None
        held = prompt.positions >= 0
        mass = prompt.mass * held
        rows = said or [{} for _ in lengths]
        ours = before, self.nbytes - behind, behind  # and those of the layer's other heads
        before, after, behind = (sum(self._heads.counts(n, held.device)) for n in ours)
        whole = [held.sum(-1).to(mass.dtype), mass.sum(-1), mass.amax(-1)]
        kept, represented, heaviest = self._heads.gather(torch.stack(whole, -1)).unbind(-1)
        self.record = Record(lengths, kept, represented, heaviest.max(), before, after, rows, behind)
