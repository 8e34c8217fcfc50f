"""What all layers of a compressed cache share: the method, the prompt, and where it ends."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvweave.methods.base import Method
from kvweave.ops.heads import HERE, Heads
from kvweave.ops.rotary import paired_tables
from kvweave.prompt import Prompt


@dataclass
class Conversation:
    """What all layers of a cache share.

    Attributes:
        method: what decides.
        prompt: modalities and padding of everything seen; None before the first forward pass.
        end: logical length at which the current prompt ends; slots after it are decoded tokens.
        declared: the prompt's end as the user told it, for prompts that come in pieces outside `generate`.
        frozen: what comes from now on stays whole.
        layers: how many layers are compressed.
        trace: keep each layer's fate, for pictures.
        rotary: (cos, sin), [batch, columns, rotary_dim] each, of everything seen, where the method turns keys.
        interleaved: how rotary pairs channels.
        attached: a model that knows how to read this cache is running.
        counted: with a deferred cut, bool [batch, tokens], the first decoded tokens that belong to a reply which has
            not ended; None: no cut is waiting.
        deferred: tokens decoded before the last prompt's cut, where it waited; else None.
        hold: the cache was made to hold prompts whole until `CompressedCache.compress` is called.
        held: the prompt stays whole until then, or until probes have been answered.
        expected: tokens of the probe that is being answered, its answer's included; 0: none is.
        asked: of those, the probe's own.
        last_position: position ids of the prompt's last tokens, [..., batch, 1], where the model was given them.
        probes: what answering the probes before the last cut took; empty: there were none.
        known: views' statistics by what they are of, for caches that are filled with one and the same prompt.
        cut: bool [batch, columns], tokens that the last cut took for real: no slot of a layer that was cut stands
            for another column before its end; None: nothing was cut.
        shown: the mask shows every column that a slot stands for; None: nobody has looked since it may have changed.
        sees_all: the token that is being decoded sees every slot, so that the model's mask need not be read.
        heads: processes that share each layer's heads, where the model is tensor parallel.
        query_heads: of a layer, in all of them.
        room: tokens to come for which memory is laid out once the prompt is cut, or None.
    """

    method: Method
    prompt: Prompt | None = None
    end: int | None = None
    declared: int | None = None
    frozen: bool = False
    layers: int = 0
    trace: bool = False
    rotary: tuple[Tensor, Tensor] | None = None
    interleaved: bool = False
    attached: bool = False
    counted: Tensor | None = None
    deferred: int | None = None
    hold: bool = False
    held: bool = False
    expected: int = 0
    asked: int = 0
    last_position: Tensor | None = None
    probes: dict[str, Any] = field(default_factory=dict)
    known: dict[Any, dict[Any, Any]] | None = None
    cut: Tensor | None = None
    shown: bool | None = None
    sees_all: bool = False
    heads: Heads = HERE
    query_heads: int = 0
    room: int | None = None

    def __post_init__(self) -> None:
        self.held = self.hold

    def __getstate__(self) -> dict[str, Any]:
        """What is copied, saved and sent: memory that another process may share is not written to."""
        return vars(self) | {
            "counted": None if self.counted is None else self.counted.clone(),
            "attached": False,
            "heads": HERE,
        }

    def reset(self) -> None:
        """As it was made: nothing seen, nothing cut, nothing frozen."""
        vars(self).update(
            vars(Conversation(self.method, layers=self.layers, trace=self.trace, hold=self.hold)),
        )

    @property
    def query_rows(self) -> int:
        """Queries of how many of a prompt's last rows are needed."""
        return self.method.probed_rows if self.held else self.method.query_rows

    @property
    def awaited(self) -> int:
        """Tokens behind the prompt whose queries are wanted."""
        return self.expected or (0 if self.held else self.method.defer)

    @property
    def turns_keys(self) -> bool:
        """The method needs the rotary tables."""
        return self.method.turns_keys

    def spread_over(self, model: Any) -> None:
        """Know where the layers' heads are, of a model that may be tensor parallel."""
        if (getattr(model, "_tp_size", None) or 1) > 1:
            mesh = model._device_mesh
            self.heads = Heads(mesh["tp"].get_group() if mesh.ndim > 1 else mesh.get_group())
            self.query_heads = model.config.get_text_config(decoder=True).num_attention_heads

    def heads_of(self, query_heads: int) -> Heads:
        """Where a layer's other heads are that has as many query heads here: a plan may leave attention whole."""
        return self.heads if query_heads * self.heads.size == self.query_heads else HERE

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
            shown = self.prompt.valid
            if self.cut is not None:
                end = self.cut.shape[1]
                shown = torch.cat([shown[:, :end] | ~self.cut.to(shown.device), shown[:, end:]], 1)
            self.shown = bool(shown.all())
        self.sees_all = decoding and not masked and bool(self.shown)

    def note_cut(self, valid: Tensor) -> None:
        """The layers' slots of the columns `valid` [batch, columns] stand for those alone that are true in it."""
        self.cut, self.shown = valid, self.shown or None

    def crop(self, length: int) -> None:
        """Forget the columns from `length` on."""
        if not length:
            frozen = self.frozen
            self.reset()
            self.frozen = frozen
            return
        if self.prompt is not None:
            seen, self.prompt = self.prompt.length, self.prompt.cropped(length)
            if self.end is not None and length < self.end <= seen:  # what is left is all that there is of the prompt
                self.end = None if self.held and self.deferred is None else length  # and is no whole one
        if self.cut is not None:
            self.cut = self.cut[:, :length]

    def select(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, in that order."""

        def of(x: Tensor) -> Tensor:
            return x[rows.to(x.device)]

        self.prompt = None if self.prompt is None else self.prompt.rows(rows)
        self.counted = None if self.counted is None else of(self.counted)
        self.cut = None if self.cut is None else of(self.cut)
        if self.last_position is not None:
            self.last_position = self.last_position[..., rows.to(self.last_position.device), :]
        self.rotary = None if self.rotary is None else (of(self.rotary[0]), of(self.rotary[1]))

    def append_rotary(self, cos: Tensor, sin: Tensor, seen: int, *, interleaved: bool) -> None:
        """Add a forward pass's tables, [batch or 1, new, rotary_dim], behind `seen` columns."""
        tables = [paired_tables(table, interleaved=interleaved) for table in (cos, sin)]
        if self.prompt is not None:
            tables = [table.expand(self.prompt.valid.shape[0], -1, -1) for table in tables]
        if self.rotary is not None and seen:
            tables = [torch.cat([old[:, :seen], new], 1) for old, new in zip(self.rotary, tables, strict=True)]
        self.rotary = tables[0], tables[1]
        self.interleaved = interleaved
