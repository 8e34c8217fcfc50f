"""One layer of a bounded cache, from cut to cut (SPEC 18).

It holds its memory, what the last cut left, and a tail of the tokens since. It is cut when the tail has `every`
columns, and when a prompt ends with more than the budget. What a prompt's cut knows of the whole prompt, this one
knows of the tail: older queries are gone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvweave.cut.prompt_cut import PromptCut
from kvweave.cut.record import Record, tally
from kvweave.cut.rows import Group, Share, compact, fits, observe, smallest
from kvweave.cut.sinks import behind, first_apart, real_slots
from kvweave.cut.terms import Pending, Terms
from kvweave.cut.waiting import tell_rows
from kvweave.memory.block import Block
from kvweave.memory.heads import block_of, stored, stored_in
from kvweave.memory.slots import Slots
from kvweave.ops.statistics import AttentionRule
from kvweave.prompt import Prompt
from kvweave.view import LayerView


@dataclass
class StreamCut(PromptCut):
    """One layer's way from cut to cut.

    Attributes:
        start: column at which the tail begins.
        held: slots of memory, mean over KV heads.
        cuts: times that something was given up.
        read: slots that attention read in the last pass, mean over KV heads; peak: most ever.
        peak_bytes: most bytes of keys and values that the layer held at once.
        due_by: what the cut goes by that comes when the pass has ended; None: none is due.
        probed: queries of the probes that were read before it.
        sinks: of the cut that is due, first tokens that stay.
        words: for each row, what the last plan said of itself.
    """

    start: int = 0
    held: float = 0
    cuts: int = 0
    read: float = 0
    peak: float = 0
    peak_bytes: int = 0
    due_by: tuple[AttentionRule, Tensor | None] | None = None
    probed: Tensor | None = None
    sinks: Slots | None = None
    words: list[dict[str, Any]] = field(default_factory=list)

    # ---------------------------------------------------------------- passes

    def take(
        self,
        block: Block,
        prompt: Prompt,
        queries: Tensor,
        rule: AttentionRule,
        mask: Tensor | None,
        *,
        ended: bool,
        terms: Terms,
    ) -> tuple[Block, Tensor | None]:
        """Attention has read a pass: cut the layer if it is due, or leave that to the pass's end.

        Args:
            block: what memory holds, `prompt` what is known of its columns.
            queries: [batch, heads, new, dim].
            rule: scaling, soft cap and sinks of the layer.
            mask: [batch or 1, heads or 1, new, slots], as attention took it; None: causal.
            ended: a prompt ended in this pass.
        Returns:
            What memory holds then; bool [batch, columns], tokens that were taken for real, None: nothing was cut.
        """
        assert terms.stream is not None
        if self.due_by is not None:
            self.probed = queries.detach()  # of probes that come before the cut
            return block, None
        past, new = prompt.length, queries.shape[2]
        if terms.query_rows:
            self.collect(queries, past - new, past, terms.query_rows)
        tail = past - self.start
        self.read = self.held + tail
        self.peak = max(self.peak, self.read)
        self.peak_bytes = max(self.peak_bytes, block.nbytes)
        if tail < terms.stream.every and not (ended and self._exceeds(block, prompt, terms)):
            return block, None
        at_once = tail == new and new > 1
        self.due_by = rule, mask if at_once else None
        if terms.adaptive or terms.stream.asks:
            return block, None
        pending = self.ready(block, prompt, terms)
        share = terms.stream.shares(terms.method, pending.budgets, self.layer, terms.layers)
        return self.cut(block, pending, share, terms)

    def _exceeds(self, block: Block, prompt: Prompt, terms: Terms) -> bool:
        """Some row's head holds more than its budget."""
        stream = terms.stream
        assert stream is not None
        slots = block.outline(prompt.valid)
        assert slots.positions is not None
        most = int(real_slots(slots.positions, prompt.valid).sum(-1).max())
        most = max(count for (count,) in terms.heads.each([most], slots.positions.device))
        budget = self._budget(block, terms)
        forced = stream.forced(terms.method, budget)
        if most <= forced or terms.adaptive:
            return most > budget
        (share,) = stream.shares(terms.method, [budget - forced], self.layer, terms.layers)
        return most - forced > smallest(share)

    def _budget(self, block: Block, terms: Terms) -> int:
        assert terms.stream is not None
        if terms.stream.budget is not None:
            return terms.stream.budget
        slots = block.as_slots()
        return terms.stream.entries(terms.method, terms.layers * terms.heads.size * slots.nbytes // slots.count)

    # ---------------------------------------------------------------- the cut

    def ready(self, block: Block, prompt: Prompt, terms: Terms, probing: int = 0) -> Pending:
        """What the cut that is due will need.

        Args:
            probing: slots at the end that are probes'; they are not cut, and gone before it.
        """
        assert self.due_by is not None
        assert terms.stream is not None
        method, (rule, mask) = terms.method, self.due_by
        budget = self._budget(block, terms)
        everything = self._all_slots(block, prompt.valid, terms, padded=prompt.padded)
        slots, probes = everything.split_at(everything.count - probing) if probing else (everything, None)
        prompt = prompt.cropped(prompt.length - probing, slots.keys.device)
        forced = terms.stream.forced(method, budget)
        self.sinks, rest = first_apart(slots, prompt.valid, forced)
        queries = torch.cat(self.queries, 2) if self.queries else None
        if mask is not None:
            hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            mask = F.pad(mask, (rest.count - mask.shape[-1], 0), value=hidden)
            if mask.shape[1] not in (1, self.query_shape[0]):
                mask = mask.repeat_interleave(self.query_shape[0] // mask.shape[1], 1)
        groups = self.groups(rest, queries, prompt, rule, terms, mask)
        for group in groups:
            self._tell(group, mask, rule, terms)
        if probes is not None and self.probed is not None and terms.query_rows:
            tell_rows(groups, prompt, self.probed, probes.keys, rule, terms)
        by_row = {row: group.length for group in groups for row in group.index}
        lengths = [by_row[row] for row in range(len(by_row))]
        budgets = [budget - forced] * len(lengths)
        weights: list[Any] = []
        if terms.adaptive:
            weights = observe(method, groups, budgets, lengths, probed=(terms.stream.asks,))
        return Pending(groups, budgets, lengths, slots, None, prompt.valid, weights)

    def _tell(self, group: Group, mask: Tensor | None, rule: AttentionRule, terms: Terms) -> None:
        """Let a view know of its slots' biases, and of the rotary tables."""
        stream, view = terms.stream, group.view
        assert stream is not None
        if mask is None and (view.bias is not None or view.empty is not None):
            view.rule = replace(rule, mask=_Causal(view, self.query_shape[0]))
        if terms.needs.rotary and stream.tables.columns:
            view.rotary = stream.tables.at(group.index, view.positions)
            view.interleaved = stream.tables.interleaved

    def cut(
        self, block: Block, pending: Pending, share: Sequence[Share], terms: Terms
    ) -> tuple[Block, Tensor | None]:
        """What memory holds once it is within its budget, as in `PromptCut.cut`."""
        sinks, slots = self.sinks, self.held + pending.valid.shape[1] - self.start
        self.pending = self.due_by = self.probed = self.sinks = None
        self.queries, self.start = [], pending.valid.shape[1]
        if fits(pending.groups, share):
            self.held = slots
            return block, None
        outcome = compact(terms.method, pending.groups, share, pending.budgets)
        self.flow = outcome.compacted.flow
        self.memory = self.memory if outcome.memory is None else outcome.memory
        self.words, self.cuts = outcome.rows, self.cuts + 1
        blocks = stored(outcome.compacted if sinks is None else behind(sinks, outcome.compacted))
        self.held = sum(slots.count for slots in blocks) / len(blocks)
        return stored_in(block_of(blocks), terms.storage), pending.valid

    # ---------------------------------------------------------------- columns go

    def crop(self, removals: int, column: int) -> None:
        """Forget the last `removals` columns, those from `column` on."""
        if self.queries:
            rows = torch.cat(self.queries, 2)
            self.queries = [rows[:, :, : max(0, rows.shape[2] - removals)]]
        if column < self.start:  # some of them may have been given up
            self.held, self.start = min(self.held, column), column

    # ---------------------------------------------------------------- what the report says

    def recorded(self, block: Block, prompt: Prompt, terms: Terms) -> Record:
        """Counts of the whole input, as the layer is now."""
        slots = block.outline(prompt.valid)
        assert slots.positions is not None
        assert slots.mass is not None
        real = real_slots(slots.positions, prompt.valid)
        counts = tally(real, slots.mass, terms.heads)
        full = block.as_slots()
        size = full.nbytes // max(1, full.count) * prompt.length
        before, after = (sum(of) for of in zip(*terms.heads.each([size, block.nbytes], real.device), strict=True))
        rows = self.words or [{} for _ in prompt.lengths]
        return Record(prompt.lengths, *counts, before, after, rows)

    def counted(self, record: Record) -> dict[str, int]:
        """What the report says of a stream besides."""
        entries = math.ceil(record.kept.double().mean(1).max())
        return {"cuts": self.cuts, "held": entries, "peak_entries": math.ceil(self.peak)}


@dataclass(frozen=True)
class _Causal:
    """The mask of a view's last rows: what they see of its slots, whose biases it adds."""

    view: LayerView
    heads: int

    def __call__(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop): float [batch, heads, rows, length]."""
        view = self.view
        slots = torch.zeros_like(view.mass) if view.bias is None else view.bias.to(view.mass.dtype)
        least = torch.finfo(slots.dtype).min
        if view.empty is not None:
            slots = slots.masked_fill(view.empty, least)
        place = torch.arange(view.length, device=slots.device)
        ahead = place > view.length - view.rows + torch.arange(start, stop, device=slots.device)[:, None]
        mask = slots[:, :, None].masked_fill(ahead, least)
        return mask.repeat_interleave(self.heads // view.kv_heads, 1)
