"""What all layers of a compressed cache share: the method, the prompt, and where it ends."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvweave.methods.base import Method
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
        held: prompts stay whole until `CompressedCache.compress` is called, or probes have been answered.
        expected: tokens of the probe that is being answered; 0: none is.
        last_position: position ids of the prompt's last tokens, [..., batch, 1], where the model was given them.
        probes: what answering the probes before the last cut took; empty: there were none.
        known: views' statistics by what they are of, for caches that are filled with one and the same prompt.
        sees_all: a token that is decoded sees every slot, whatever the model's mask says of padding.
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
    held: bool = False
    expected: int = 0
    last_position: Tensor | None = None
    probes: dict[str, Any] = field(default_factory=dict)
    known: dict[Any, dict[Any, Any]] | None = None
    sees_all: bool = False
    room: int | None = None

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

    def append_rotary(self, cos: Tensor, sin: Tensor, seen: int, *, interleaved: bool) -> None:
        """Add a forward pass's tables, [batch or 1, new, rotary_dim], behind `seen` columns."""
        tables = [paired_tables(table, interleaved=interleaved) for table in (cos, sin)]
        if self.prompt is not None:
            tables = [table.expand(self.prompt.valid.shape[0], -1, -1) for table in tables]
        if self.rotary is not None and seen:
            tables = [torch.cat([old[:, :seen], new], 1) for old, new in zip(self.rotary, tables, strict=True)]
        self.rotary = tables[0], tables[1]
        self.interleaved = interleaved
