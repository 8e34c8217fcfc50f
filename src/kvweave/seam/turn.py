"""When a cache is cut: one turn of a conversation, from its prompt's first column to the last decoded token.

    FILLING ──> OBSERVED ──> CUT           at once, or when all layers have been observed
                        └──> WAITING ──> CUT   with `defer`, probes or `hold`
    FROZEN                                 nothing is cut any more

A further prompt fills the same turn anew; `Shared.reset` makes a new one. No code but this writes a turn's fields.
"""

from copy import copy
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from kvweave.ops.device import writable
from kvweave.ops.rotary import paired_tables
from kvweave.prompt import Prompt
from kvweave.seam.places import Places


class State(Enum):
    """Where a turn is."""

    FILLING = "filling"  # no prompt, or one of which some is still to come
    OBSERVED = "observed"  # layers have read the whole prompt
    WAITING = "waiting"  # they hold it whole until tokens have been decoded, or the cut is asked for
    CUT = "cut"
    FROZEN = "frozen"  # what comes from now on stays whole


@dataclass
class Turn:
    """One turn.

    Attributes:
        state: where it is.
        on_request: its prompt stays whole until the cut is asked for, or until probes have been answered.
        prompt: modalities and padding of everything seen; None before the first forward pass.
        end: logical length at which the current prompt ends; slots after it are decoded tokens.
        declared: the prompt's end as the user told it, for prompts that come in pieces outside `generate`.
        counted: with a deferred cut, bool [batch, tokens], the first decoded tokens that belong to a reply which has
            not ended; None: no cut is waiting.
        deferred: tokens decoded before the last prompt's cut, where it waited; else None.
        probe: tokens of the probe that is being answered, and of the answer at most; zeros: none is.
        ids: int64 [batch, columns], the prompt's tokens, as far as they were given without a gap; of a conversation
            that is held all.
        embeddings: [batch, columns, width], what the decoder was given in place of the ids, where it was;
            hidden: alike, what it made of them. Both only while the prompt is whole and may be read again.
        places: what is known of positions.
        probes: what answering the probes before the last cut took; empty: there were none.
        choice: budgets that were found by what they cost (`kvweave.seam.foresight`); empty: none, or not yet.
        rotary: (cos, sin), [batch, columns, rotary_dim] each, of everything seen, where the method turns keys.
        interleaved: how rotary pairs channels.
        cut: bool [batch, columns], tokens that the last cut took for real: no slot of a layer that was cut stands
            for another column before its end; None: nothing was cut.
        shown: the mask shows every column that a slot stands for; None: nobody has looked since it may have changed.
        sees_all: the token that is being decoded sees every slot, so that the model's mask need not be read.
        narrow: the pass sees every slot of columns before it, so that the model's mask may speak of its own alone.
    """

    state: State = State.FILLING
    on_request: bool = False
    prompt: Prompt | None = None
    end: int | None = None
    declared: int | None = None
    counted: Tensor | None = None
    deferred: int | None = None
    probe: tuple[int, int] = (0, 0)
    ids: Tensor | None = None
    embeddings: Tensor | None = None
    hidden: Tensor | None = None
    places: Places = field(default_factory=Places)
    probes: dict[str, Any] = field(default_factory=dict)
    choice: dict[str, Any] = field(default_factory=dict)
    rotary: tuple[Tensor, Tensor] | None = None
    interleaved: bool = False
    cut: Tensor | None = None
    shown: bool | None = None
    sees_all: bool = False
    narrow: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """What is copied, saved and sent: memory that another process may share is not written to."""
        return vars(self) | {"counted": None if self.counted is None else self.counted.clone()}

    def __copy__(self) -> "Turn":
        """One that goes its own way."""
        return Turn(**self.__getstate__() | {"places": copy(self.places)})

    @property
    def is_cut(self) -> bool:
        """The prompt has been cut, or what comes is not."""
        return self.state is State.CUT or self.frozen

    @property
    def frozen(self) -> bool:
        """Nothing is cut any more."""
        return self.state is State.FROZEN

    # ---------------------------------------------------------------- a prompt comes

    def declare(self, length: int) -> None:
        """The prompt that comes ends at this logical length."""
        self.declared = length

    def hold(self) -> None:
        """The prompt stays whole until probes have been answered."""
        self.on_request = True

    def release(self) -> None:
        """Prompts that come are cut when they are due."""
        self.on_request = False

    def begin(
        self,
        prompt: Prompt,
        end: int | None,
        past: int,
        *,
        generating: bool = False,
        masked: bool = False,
        narrow: bool = False,
    ) -> None:
        """A forward pass begins.

        Args:
            prompt: what is known of all columns, the new ones included.
            end: where the prompt ends that they belong to; None: they are decoded.
            past: columns before.
            generating: inside a `generate` that knows its prompt, whose mask only grows by what it adds.
            masked: with a mask that `prompt` does not speak of.
            narrow: the model may make a mask of the new columns alone, where it hides no slot.
        """
        self.prompt = prompt
        prompted = end is not None and past < end
        ended = self.end if end is None else end  # of another cache than the one that `generate` was given
        self.look(decoding=generating and ended is not None and past >= ended, masked=masked)
        self.narrow = narrow and not masked and self._shows_slots(prompt.valid[:, :past])
        if end is not None and not self.frozen:
            self.end = end
            if prompted:
                self.counted, self.state = None, State.FILLING
        if end is not None and self.declared is not None and prompt.length >= self.declared:
            self.declared = None

    def extend(self, tokens: int) -> None:
        """So many tokens were decoded while memory lay in fixed buffers."""
        assert self.prompt is not None
        valid = self.prompt.valid.new_ones(self.prompt.valid.shape[0], tokens)
        self.prompt = self.prompt.extended(torch.zeros_like(valid), valid)

    def append_ids(self, ids: Tensor | None, past: int) -> None:
        """Add a forward pass's tokens [batch, new] behind `past` columns; None, or a gap: not all are known."""
        self.ids = _joined(self.ids, ids, past)

    def append_read(self, embeddings: Tensor | None, hidden: Tensor | None, past: int) -> None:
        """Add what the decoder was given for a forward pass's tokens, and made of them, behind `past` columns.

        Args:
            embeddings, hidden: [batch, new, width], or None.
        """
        self.embeddings = _joined(self.embeddings, embeddings, past)
        self.hidden = _joined(self.hidden, hidden, past)

    def append_rotary(self, cos: Tensor, sin: Tensor, past: int, *, interleaved: bool) -> None:
        """Add a forward pass's tables, [batch or 1, new, rotary_dim], behind `past` columns."""
        tables = [paired_tables(table, interleaved=interleaved) for table in (cos, sin)]
        if self.prompt is not None:
            tables = [table.expand(self.prompt.valid.shape[0], -1, -1) for table in tables]
        if self.rotary is not None and past:
            tables = [torch.cat([old[:, :past], new], 1) for old, new in zip(self.rotary, tables, strict=True)]
        self.recall_rotary((tables[0], tables[1]), interleaved=interleaved)

    def recall_rotary(self, tables: tuple[Tensor, Tensor] | None, *, interleaved: bool) -> None:
        """The tables of everything seen, as another cache noted them."""
        self.rotary, self.interleaved = tables, interleaved

    def look(self, *, decoding: bool, masked: bool) -> None:
        """Find out whether a decoded token may go without the model's mask: read from the device once a prompt.

        Padding of a prompt that was cut is not kept, and the mask hides nothing else of it. But slots that came after
        the cut can be padding too, and a later mask may hide what an earlier one showed.

        Args:
            decoding: the forward pass that begins decodes inside `generate`, whose mask only grows by what it adds.
            masked: it was given a mask that `prompt` does not speak of.
        """
        if not decoding:
            self.shown = None
        elif self.shown is None and self.prompt is not None:
            self.shown = self._shows_slots(self.prompt.valid)
        self.sees_all = decoding and not masked and bool(self.shown)

    def _shows_slots(self, valid: Tensor) -> bool:
        """The mask `valid` [batch, columns] shows every column that a slot may stand for."""
        if self.cut is None:
            return bool(valid.all())
        end = self.cut.shape[1]
        return bool((valid[:, :end] | ~self.cut.to(valid.device)).all() & valid[:, end:].all())

    def trust_room(self, prompted: bool) -> None:
        """A token comes into fixed buffers: the mask was read when they were laid out, of a `generate`'s prompt."""
        self.sees_all = prompted

    # ---------------------------------------------------------------- it is complete, and cut

    def observe(self) -> None:
        """A layer has read the whole prompt."""
        self.deferred, self.probes, self.choice = None, {}, {}
        if self.state is State.FILLING:
            self.state = State.OBSERVED

    def wait(self) -> None:
        """A layer holds the prompt whole until its cut is due."""
        self.state = State.WAITING

    def note_cut(self, valid: Tensor) -> None:
        """The layers' slots of the columns `valid` [batch, columns] stand for those alone that are true in it."""
        self.cut, self.shown = valid, self.shown or None

    def finish(self, deferred: int | None = None) -> None:
        """All layers have been cut, those that waited when `deferred` tokens had been decoded."""
        if deferred is not None:
            self.deferred = deferred
        if self.state is State.OBSERVED or deferred is not None:
            self.state, self.embeddings, self.hidden = State.CUT, None, None

    def freeze(self) -> None:
        """Cut no more."""
        self.state = State.FROZEN

    # ---------------------------------------------------------------- tokens behind it

    def count(self, start: int, live: Tensor, ended: Tensor, awaited: int) -> None:
        """Note which of the first `awaited` decoded tokens belong to a reply that has not ended.

        Args:
            start: number of the first of them; the first decoded token is 0.
            live: bool [batch, new], tokens that the attention mask shows; ended: alike, tokens that end a reply.
        """
        if self.counted is None:
            self.counted = torch.zeros(len(live), awaited, dtype=torch.bool, device=live.device)
        self.counted = writable(self.counted)
        for n in range(min(live.shape[1], awaited - start)):
            at = start + n
            going = live[:, n] if at < self.probe[0] else live[:, n] & ~ended[:, n]  # a probe may hold an end of turn
            self.counted[:, at] = going & self.counted[:, at - 1] if at else going

    def expect(self, probe: int, answer: int) -> None:
        """A probe of so many tokens comes with an answer of at most so many; zeros: it was taken back."""
        self.probe, self.counted = (probe, answer), None

    def note_probes(self, cost: dict[str, Any]) -> None:
        """The probes were answered; `cost` goes into the report."""
        self.probes = cost

    def note_choice(self, choice: dict[str, Any]) -> None:
        """A cut has found its budgets; `choice` goes into the report."""
        self.choice = choice

    # ---------------------------------------------------------------- columns and rows go

    def crop(self, length: int) -> None:
        """Forget the columns from `length` on; at least one is left."""
        if self.prompt is not None:
            past, self.prompt = self.prompt.length, self.prompt.cropped(length)
            if self.end is not None and length < self.end <= past:  # what is left is all that there is of the prompt
                self.end = None if self.on_request and self.deferred is None else length  # and is no whole one
                self.state = State.CUT if self.state is State.WAITING else self.state
        if self.cut is not None:
            self.cut = self.cut[:, :length]
        self.places.crop(length)

    def select(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, in that order."""

        def of(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows.to(x.device)]

        self.prompt = None if self.prompt is None else self.prompt.rows(rows)
        self.counted, self.cut = of(self.counted), of(self.cut)
        self.ids, self.embeddings, self.hidden = of(self.ids), of(self.embeddings), of(self.hidden)
        self.places.select(rows)
        if self.rotary is not None:
            cos, sin = self.rotary
            self.rotary = cos[rows.to(cos.device)], sin[rows.to(sin.device)]


def _joined(before: Tensor | None, new: Tensor | None, past: int) -> Tensor | None:
    """What is known of all columns [batch, columns, ...], `past` before the new ones; None: not of all."""
    if new is None or not past:
        return new
    if before is None or before.shape[1] < past:
        return None
    return torch.cat([before[:, :past].to(new.device), new], 1)
