"""One layer cut: what the method sees of its slots, and what memory keeps of them. Nothing here knows a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kvweave.cut.coarse import Coarse, fate_after
from kvweave.cut.record import Record, tally
from kvweave.cut.rows import Group, Share, compact, fits, group_rows
from kvweave.cut.terms import Pending, Terms
from kvweave.memory.block import Block
from kvweave.memory.heads import block_from, stored_in
from kvweave.memory.slots import Slots
from kvweave.ops.statistics import AttentionRule
from kvweave.plan import Compacted
from kvweave.prompt import Prompt


@dataclass
class LayerCut:
    """What a layer keeps of its cuts beside the slots.

    Attributes:
        layer: its number among the layers that are compressed.
        rotated: keys carry a rotary phase.
        projection: the output projection, for methods that look through it.
        memory: what the method left for a later turn.
        expand: what the heads make of slots that they all share (MLA); None: memory holds each head's own.
        pending: what is cut once all layers have been observed.
        record, flow: of the last cut, for the report.
        fate: with `trace`, for each row int64 [kv_heads, length], the slot that a slot lives on in, -1: evicted.
    """

    layer: int = 0
    rotated: bool = True
    projection: Tensor | None = None
    memory: Tensor | None = None
    expand: Callable[[Slots], Slots] | None = None
    pending: Pending | None = None
    record: Record | None = None
    flow: float | None = None
    fate: list[Tensor] = field(default_factory=list)

    def groups(
        self,
        slots: Slots,
        queries: Tensor | None,
        prompt: Prompt,
        rule: AttentionRule,
        terms: Terms,
        mask: Tensor | None = None,
        apart: Sequence[int] | None = None,
        *,
        whole: bool = False,
    ) -> list[Group]:
        """What the method sees of the prompt's slots, rows that hold equally many tokens together.

        Args:
            slots, queries, prompt, rule, mask, apart, whole: as in `group_rows`.
        """
        groups = group_rows(
            self.heads_of(slots),
            queries,
            prompt,
            rule,
            mask=mask,
            layer=self.layer,
            layers=terms.layers,
            memory=self.memory,
            rotary=terms.rotary,
            most=terms.query_rows,
            apart=range(len(prompt.valid)) if terms.alone else apart,
            heads=terms.heads,
            stored=None if self.expand is None else slots,
            whole=whole,
        )
        for group in groups:
            view = group.view
            view.interleaved, view.rotated, view.projection = terms.interleaved, self.rotated, self.projection
        return groups

    def heads_of(self, slots: Slots) -> Slots:
        """The slots as attention reads them."""
        return slots if self.expand is None else self.expand(slots)

    def cut(
        self, block: Block, pending: Pending, share: Sequence[Share], terms: Terms
    ) -> tuple[Block, Tensor | None]:
        """What memory holds once the method has taken from the prompt's slots what it keeps.

        Args:
            block: what memory holds.
            share: entries that each row of the batch keeps in this layer.
        Returns:
            That, and bool [batch, columns], the tokens of the prompt that were taken for real; None: nothing was cut.
        """
        self.pending = None
        behind, coarse = 0 if pending.behind is None else pending.behind.nbytes, pending.coarse
        if fits(pending.groups, share) and not _holds_padding(block, pending):
            whole = self.store(block, block, pending.lengths, pending.prompt, terms, behind=behind, coarse=coarse)
            return whole, pending.valid
        outcome = compact(terms.method, pending.groups, share, pending.budgets, trace=terms.trace)
        self.flow = outcome.compacted.flow
        self.fate = outcome.fate
        if coarse is not None and coarse.fates:
            self.fate = [fate_after(*fates) for fates in zip(coarse.fates, outcome.fate, strict=True)]
        self.memory = self.memory if outcome.memory is None else outcome.memory
        cut = block_from(outcome.compacted, pending.behind)
        rows, lengths = outcome.rows, pending.lengths
        cut = self.store(block, cut, lengths, outcome.compacted, terms, rows, behind=behind, coarse=coarse)
        return cut, pending.valid

    def store(
        self,
        before: Block,
        block: Block,
        lengths: list[int],
        prompt: Slots | Compacted,
        terms: Terms,
        rows: list[dict[str, Any]] | None = None,
        packs: bool = True,
        behind: int = 0,
        coarse: Coarse | None = None,
    ) -> Block:
        """`block` as the method wants it stored; keeps what the report will say.

        Args:
            before: what memory held.
            prompt: what is left of the prompt, for its positions and mass.
            rows: for each row, what its plan says of itself.
            packs: store it as the method wants it stored.
            behind: bytes of the tokens that lie behind the prompt.
            coarse: what a first cut did before.
        """
        if packs and terms.storage is not None:
            block = stored_in(block, terms.storage)
        assert prompt.positions is not None
        assert prompt.mass is not None
        is_full = prompt.full if isinstance(prompt, Compacted) else not prompt.has_empty
        counts = tally(None if is_full else prompt.positions >= 0, prompt.mass, terms.heads)
        sizes = [before.nbytes - behind, block.nbytes - behind, behind]
        if terms.heads.size > 1:  # and those of the layer's other heads
            sizes = [sum(each) for each in zip(*terms.heads.each(sizes, prompt.mass.device), strict=True)]
        bytes_before, bytes_after, behind = sizes
        rows = rows or [{} for _ in lengths]
        held = None
        if coarse is not None:
            bytes_before, held = coarse.bytes_before, coarse.bytes_after
        self.record = Record(lengths, *counts, bytes_before, bytes_after, rows, behind, held)
        return block


def _holds_padding(block: Block, pending: Pending) -> bool:
    """Slots, known by their columns, that are no real token: padding that came behind an earlier cut."""
    return block.has_positions and bool(pending.prompt.stands_for_others_than(pending.valid).any())
