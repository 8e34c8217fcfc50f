"""What a thread is in the middle of: calls of `generate` and forward passes may nest, and run in several threads."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvweave.seam.cache import CompressedCache
from kvweave.seam.request import Request


class Frame(threading.local):
    """One for each thread.

    Attributes:
        request: the innermost `generate`, or None.
        visual: visual tokens of the ids that it, or one around it, was given.
        own: of all conversations that it runs, the one it was asked for; None: its first forward pass is to come.
        planned: the cache whose decode steps it compiles, or None.
        forwards: forward passes, the outermost first.
        cache: what the outermost fills.
        new: columns of that pass; fixed: it writes to fixed buffers, and changes tensors alone.
        prompted: it is inside of a `generate` that knows how long its prompt is.
        before: tokens that the cache held before that pass.
        positions: position ids that the innermost stack was given, [..., batch or 1, new], or None.
        embeddings: what that stack was given in the tokens' place, [batch, new, hidden], or None.
        hidden: what it made of them, alike.
        aside: the model is drafting, or answering a probe.
    """

    def __init__(self) -> None:
        self.request: Request | None = None
        self.visual: Tensor | None = None
        self.own: CompressedCache | None = None
        self.planned: CompressedCache | None = None
        self.forwards: list[nn.Module] = []
        self.cache: CompressedCache | None = None
        self.new, self.fixed = 0, False
        self.prompted = False
        self.before = 0
        self.positions: Tensor | None = None
        self.embeddings: Tensor | None = None
        self.hidden: Tensor | None = None
        self.aside = False

    @contextmanager
    def generating(self, request: Request, visual: Tensor | None, planned: CompressedCache | None) -> Iterator[None]:
        """Inside, this is the innermost `generate`."""
        outer = self.request, self.visual, self.own, self.planned, self.forwards, self.prompted
        self.request, self.own, self.planned, self.forwards = request, None, planned, []
        self.prompted = request.length is not None
        self.visual = self.visual if visual is None else visual
        try:
            yield
        finally:
            self.request, self.visual, self.own, self.planned, self.forwards, self.prompted = outer

    @contextmanager
    def going_aside(self) -> Iterator[None]:
        """Inside, forward passes belong to no prompt and to no reply."""
        outer = self.forwards, self.positions, self.embeddings, self.hidden
        self.forwards, self.aside = [], True
        try:
            yield
        finally:
            (self.forwards, self.positions, self.embeddings, self.hidden), self.aside = outer, False

    def note_inputs(self, kwargs: dict[str, Any], *, outermost: bool = False) -> None:
        """A stack was given these: what it says of tokens replaces what those around it said.

        Args:
            outermost: a pass begins; of the stacks inside, steps that are compiled note nothing.
        """
        positions, embeddings = kwargs.get("position_ids"), kwargs.get("inputs_embeds")
        compiled = torch.compiler.is_compiling()
        if outermost:
            self.positions = self.embeddings = self.hidden = None
        if isinstance(positions, Tensor) and (outermost or not compiled):
            self.positions = positions
        if isinstance(embeddings, Tensor) and not compiled:
            self.embeddings = embeddings.detach()

    def note_output(self, output: Any) -> None:
        """A stack made this of its tokens, if it says so; None: it raised."""
        hidden = getattr(output, "last_hidden_state", None)
        if isinstance(hidden, Tensor) and not torch.compiler.is_compiling():
            self.hidden = hidden.detach()
