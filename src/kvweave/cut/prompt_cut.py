"""One layer's prompt, from the queries that attention took to what memory keeps of it.

A prompt that is complete is cut at once; or once all layers have been observed, where they share a budget by what
was seen of them; or when the first tokens have been decoded, or probes answered. Nothing here knows a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvweave.cut.coarse import Coarse, of_slots_left
from kvweave.cut.layer_cut import LayerCut
from kvweave.cut.rows import Group, Share, compact, fits, observe, smallest
from kvweave.cut.shares import by_row, coarse_shares, share_out
from kvweave.cut.terms import Pending, Terms
from kvweave.cut.waiting import Waiting, known_by_row
from kvweave.memory.block import Block
from kvweave.memory.heads import block_from
from kvweave.memory.slots import Slots
from kvweave.methods.needs import ALL_ROWS
from kvweave.ops.budget import entries
from kvweave.ops.statistics import AttentionRule
from kvweave.prompt import Prompt


@dataclass
class PromptCut(LayerCut):
    """A layer's prompt on its way to the cut.

    Attributes:
        queries: of the prompt's last rows so far, in pieces [batch, heads, rows, dim].
        query_shape: heads, dim.
        waiting: what is cut once tokens have been decoded.
    """

    queries: list[Tensor] = field(default_factory=list)
    query_shape: tuple[int, int] = (0, 0)
    waiting: Waiting | None = None

    # ---------------------------------------------------------------- while the prompt comes

    def collect(self, queries: Tensor, start: int, end: int, rows: int) -> bool:
        """Keep the queries that the method will need; whether the prompt is complete.

        Args:
            queries: [batch, heads, new, dim], of the columns from `start` on.
            end: where the prompt ends, behind `start`; what comes behind it is decoded.
            rows: queries of how many of its last rows are needed.
        """
        self.waiting = None  # another prompt: it is compressed with all that came before
        if rows:
            self.queries.append(queries[:, :, : end - start].detach())
            if rows != ALL_ROWS and len(self.queries) > 1:
                self.queries = [torch.cat(self.queries, 2)[:, :, -rows:].clone()]
        return start + queries.shape[2] >= end

    def crop(self, removals: int, column: int) -> None:
        """Forget the last `removals` columns, those from `column` on."""
        if self.queries:
            rows = torch.cat(self.queries, 2)
            self.queries = [rows[:, :, : rows.shape[2] - removals]]
        if self.waiting is not None and column < self.waiting.prompt.length:
            self.waiting = None  # what was known spoke of a longer prompt

    def select(self, index: Tensor) -> None:
        """Keep the given rows of the batch, in that order."""
        self.queries = [queries[index.to(queries.device)] for queries in self.queries]
        self.waiting = self.waiting.rows(index) if self.waiting is not None else None
        self.memory = self.memory[index.to(self.memory.device)] if self.memory is not None else None

    # ---------------------------------------------------------------- when it is complete

    def complete(
        self,
        block: Block,
        prompt: Prompt,
        end: int,
        behind: int,
        queries: Tensor,
        rule: AttentionRule,
        mask: Tensor | None,
        terms: Terms,
    ) -> tuple[Block, Tensor | None]:
        """Cut the prompt, or hold what its cut will need.

        Args:
            block: what memory holds, `prompt` what is known of its columns; the prompt ends at column `end`.
            behind: columns behind it, candidates of assisted decoding.
            queries: [batch, heads, new, dim] of the last columns.
            rule: scaling, soft cap and sinks of the layer.
            mask: [batch or 1, heads or 1, new, slots], as attention took it; None: causal.
        Returns:
            What memory holds then, and as in `cut`, None: nothing was cut.
        """
        real = queries.shape[2] - behind
        prompt_queries = torch.cat(self.queries, 2) if self.queries else None
        self.queries = []
        # Of a prompt that came in pieces only the last one's mask is at hand: it all counts as causal.
        at_once = prompt_queries is not None and prompt_queries.shape[2] == real
        mask = mask[:, :, :real, : mask.shape[-1] - behind] if mask is not None and at_once else None
        if mask is not None and mask.shape[1] not in (1, queries.shape[1]):
            mask = mask.repeat_interleave(queries.shape[1] // mask.shape[1], 1)
        outcome = self._decide(block, prompt, end, behind, prompt_queries, rule, mask, terms)
        if self.waiting is not None:
            self.waiting.note(queries[:, :, real:].detach(), 0)
        return outcome

    def _decide(
        self,
        block: Block,
        prompt: Prompt,
        end: int,
        behind: int,
        queries: Tensor | None,
        rule: AttentionRule,
        mask: Tensor | None,
        terms: Terms,
    ) -> tuple[Block, Tensor | None]:
        method = terms.method
        slots = self._all_slots(block, prompt.valid, terms, padded=prompt.padded)
        own = prompt.cropped(end, slots.keys.device)
        lengths = own.lengths
        ours, after = slots.split_at(slots.count - behind) if behind else (slots, None)
        if mask is not None:  # other processes' heads may hold more slots
            hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            mask = F.pad(mask, (ours.count - mask.shape[-1], 0), value=hidden)
        entry_bytes = 0
        if isinstance(method.budget, str):
            entry_bytes = terms.layers * terms.heads.size * slots.nbytes // slots.count
        budgets = [entries(method.budget, n, entry_bytes) for n in lengths]
        share = share_out(method, budgets, lengths, terms.layers)[self.layer]
        is_full = not terms.adaptive and all(smallest(b) >= n for b, n in zip(share, lengths, strict=True))
        if is_full and not block.has_positions:
            return self.store(block, block, lengths, ours, terms), None  # not a bit is touched
        groups = self.groups(ours, queries, own, rule, terms, mask, whole=not block.has_positions)
        for group in groups:
            if terms.memo is not None:
                rows = 0 if group.view.queries is None else group.view.queries.shape[2]
                group.view.remember_in(terms.memo.setdefault((self.layer, *group.index, rows), {}))
        pending = Pending(groups, budgets, lengths, ours, after, own.valid)
        if method.defer or terms.on_request:
            self.store(block, block, lengths, ours, terms, packs=False)
            self.waiting = self._wait(pending, own, rule, budgets if terms.adaptive else share, terms)
            first = None if terms.on_request else coarse_shares(method, budgets, lengths, terms.layers)
            return (block, None) if first is None else self._cut_coarsely(block, pending, first[self.layer], terms)
        if terms.adaptive:
            pending.weights = observe(method, groups, budgets, lengths)
            self.pending = pending
            return block, None
        return self.cut(block, pending, share, terms)

    def _all_slots(self, block: Block, valid: Tensor, terms: Terms, padded: bool | None = None) -> Slots:
        """What memory holds, heads side by side; as many slots as in every process that holds other heads."""
        slots = block.as_slots(valid, padded=padded)
        if terms.heads.size == 1:
            return slots
        return slots.padded(max(count for (count,) in terms.heads.each([slots.count], slots.keys.device)))

    # ---------------------------------------------------------------- a cut that waits

    def _wait(
        self, pending: Pending, prompt: Prompt, rule: AttentionRule, budgets: Sequence[Share], terms: Terms
    ) -> Waiting:
        """What the prompt's queries say, held until the first tokens are decoded.

        Args:
            budgets: as in `observe`.
        """
        batch = len(prompt.valid)
        probed = (False, True) if terms.on_request else (False,)
        means, lengths = pending.budgets, pending.lengths
        weights = observe(terms.method, pending.groups, budgets, lengths, means=means, probed=probed, later=True)
        heads, dim = self.query_shape
        queries = pending.prompt.keys.new_zeros(batch, heads, terms.awaited, dim)
        statistics, weights = known_by_row(pending.groups, batch), by_row(pending.groups, weights)
        if terms.method.pools:  # it observes again, once more is known
            weights = [None] * batch
        return Waiting.of(prompt, rule, queries, statistics, weights, pending.budgets)

    def _cut_coarsely(
        self, block: Block, pending: Pending, share: Sequence[Share], terms: Terms
    ) -> tuple[Block, Tensor | None]:
        """What memory holds until the cut that waits; as in `cut`, and None too where that is the whole prompt.

        Args:
            share: entries that each row of the batch keeps in this layer till then.
        """
        method = terms.method.coarse_cut
        if method is None or fits(pending.groups, share):
            return block, None
        assert self.waiting is not None
        outcome = compact(method, pending.groups, share, pending.budgets, trace=True)
        smaller = block_from(outcome.compacted, pending.behind)
        behind = 0 if pending.behind is None else pending.behind.nbytes
        self.store(block, smaller, pending.lengths, outcome.compacted, terms, packs=False, behind=behind)
        assert self.record is not None
        self.fate = outcome.fate if terms.trace else []
        coarse = Coarse(self.record.bytes_before, self.record.bytes_after, self.fate)
        self.record = replace(self.record, bytes_coarse=coarse.bytes_after)
        statistics = of_slots_left(self.waiting.known, outcome.fate, terms.heads)
        self.waiting = replace(self.waiting, known=statistics, coarse=coarse)
        return smaller, pending.valid

    def count_attention(
        self, block: Block, counted: Tensor, length: int, terms: Terms, weights: Tensor | None = None
    ) -> None:
        """Note what the tokens behind the prompt attend to in it.

        Args:
            counted: bool [batch, tokens], those that count; weights: float, alike, how much; None: all alike.
            length: columns of `block`.
        """
        if self.waiting is not None and terms.query_rows:
            groups, _, after = self._waiting_groups(self.waiting, block, length, terms)
            for group in groups:
                self.waiting.add(group, self.heads_of(after).keys, counted, terms.needs, weights=weights, probed=True)

    def _waiting_groups(
        self, waiting: Waiting, block: Block, length: int, terms: Terms
    ) -> tuple[list[Group], Slots, Slots]:
        """What the method will see of the prompt that waits, its slots, and those behind it."""
        prompt = waiting.prompt.to(waiting.queries.device)
        behind = prompt.valid.new_ones(len(prompt.valid), length - prompt.length)
        slots = self._all_slots(block, torch.cat([prompt.valid, behind], 1), terms, padded=prompt.padded)
        ours, after = slots.split_at(slots.count - behind.shape[1])
        rows = [known.get("rows", 0) for known in waiting.known]
        whole = not block.has_positions
        return self.groups(ours, None, prompt, waiting.rule, terms, apart=rows, whole=whole), ours, after

    def weigh(self, block: Block, counted: Tensor | None, length: int, terms: Terms) -> list[Any]:
        """What `Method.allocate` is given of each row, once the tokens decoded meanwhile have said what they look at.

        Args:
            counted: bool [batch, tokens], those that count; None: there are none.
            length: columns of `block`.
        """
        waiting = self.waiting
        assert waiting is not None
        groups, _, _ = self._informed(waiting, block, None, counted, length, terms)
        budgets, lengths = waiting.budgets, waiting.prompt.lengths
        return by_row(groups, observe(terms.method, groups, budgets, lengths, probed=(terms.probed,)))

    def due(self, block: Block, share: Sequence[Share], counted: Tensor | None, length: int, terms: Terms) -> Pending:
        """The prompt that waited, ready for `cut`: the tokens decoded meanwhile have said what they look at.

        Args:
            share: entries that each row of the batch keeps in this layer.
            counted: bool [batch, tokens], those that count; None: there are none, or `weigh` was told of them.
            length: columns of `block`.
        """
        waiting = self.waiting
        assert waiting is not None
        self.waiting = None
        groups, ours, after = self._informed(waiting, block, share, counted, length, terms)
        lengths, valid = waiting.prompt.lengths, waiting.prompt.valid
        return Pending(groups, waiting.budgets, lengths, ours, after, valid, coarse=waiting.coarse)

    def _informed(
        self,
        waiting: Waiting,
        block: Block,
        share: Sequence[Share] | None,
        counted: Tensor | None,
        length: int,
        terms: Terms,
    ) -> tuple[list[Group], Slots, Slots]:
        """As `_waiting_groups`, with all that was learnt."""
        method = terms.method
        groups, ours, after = self._waiting_groups(waiting, block, length, terms)
        for group in groups:
            view, at = group.view, group.index
            cuts = share is None or smallest(share[at[0]]) < view.length
            if counted is not None and after.count and terms.query_rows and cuts:
                keys = self.heads_of(after).keys
                waiting.add(group, keys, counted, terms.needs, terms.needs.temperature, probed=terms.probed)
            waiting.tell(view, at)
            view.probed = terms.probed
            rows = waiting.counts[at] if terms.probed else torch.full_like(waiting.counts[at], method.defer)
            view.decoded_weight = method.weight_of(rows)[:, None, None]
        return groups, ours, after
