"""One batch's prefill with the full cache, kept so that many methods can be tried on it.

A prefill is the same whatever is cut afterwards. `Prefill.recorded` lets the model answer once with everything in its
cache and keeps what each layer's attention was called with; inside `Prefill.replayed` the model's first forward pass
puts that into the cache at hand, which cuts it as it would have cut it then. The rest is the model's own `generate`.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvweave.methods.full import Full
from kvweave.methods.needs import Needs
from kvweave.ops.statistics import AttentionRule
from kvweave.seam.cache import CompressedCache
from kvweave.seam.entry import compress
from kvweave.seam.layer import CompressedLayer
from kvweave.seam.names import CACHE
from kvweave.seam.shared import Shared

#: What an attention was called with: queries [batch, heads, new, dim], its rule, and its mask.
Call = tuple[Tensor, AttentionRule, Tensor | None]


@dataclass(frozen=True)
class _Full(Full):
    """The full cache, its rotary tables noted for methods that turn keys."""

    needs = Needs(rotary=True)


class RecordedLayer(CompressedLayer):
    """A layer that keeps all that it is given.

    Attributes:
        states: keys and values [batch, kv_heads, length, dim] of the prompt.
        calls: of attention, the prompt's first, then one for each decoded token.
    """

    def __init__(self, index: int, shared: Shared) -> None:
        super().__init__(index, shared)
        self.states: tuple[Tensor, Tensor] | None = None
        self.calls: list[Call] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.states is None:
            self.states = key_states, value_states
        return super().update(key_states, value_states, *args, **kwargs)

    def after_attention(self, queries: Tensor, rule: AttentionRule, mask: Tensor | None) -> None:
        if self.unread:
            self.calls.append((queries, rule, mask))
        super().after_attention(queries, rule, mask)


@dataclass(frozen=True)
class Prefill:
    """A prefill, and the answer that the full cache gave after it.

    Attributes:
        layers: of the cache in order; recorded ones, and others as the prefill left them.
        output: of the first forward pass.
        rotary, interleaved, embeddings, hidden: as in `Turn`.
        tokens: int64 [batch, prompt + answer], what `generate` returned.
        start: columns of the prompt.
        memo: statistics that methods asked for, kept for the next ones and other budgets.
    """

    layers: list[Any]
    output: Any
    rotary: tuple[Tensor, Tensor] | None
    interleaved: bool
    tokens: Tensor
    start: int
    embeddings: Tensor | None = None
    hidden: Tensor | None = None
    memo: dict[Any, dict[Any, Any]] = field(default_factory=dict)

    @classmethod
    def recorded(cls, model: Any, answer: Callable[..., Tensor]) -> "Prefill":
        """Let the model answer with the full cache, and keep what it did.

        Args:
            answer: calls `model.generate` with the keywords that it is given; returns the tokens.
        Raises:
            ValueError: the model does not call its forward pass then.
        """
        method = _Full()
        cache = CompressedCache(model.config, method)
        for place, layer in enumerate(cache.layers):
            if isinstance(layer, CompressedLayer):
                cache.layers[place] = RecordedLayer(layer.index, cache.shared)
        first: dict[str, Any] = {}

        def note(module: Any, args: Any, output: Any) -> None:
            if not first:
                others = [None if isinstance(x, RecordedLayer) else copy.deepcopy(x) for x in cache.layers]
                first.update(output=output, others=others, rotary=cache.shared.turn.rotary)
                running = session.running
                first.update(start=cache.get_seq_length(), embeddings=running.embeddings, hidden=running.hidden)

        noted = model.register_forward_hook(note)
        try:
            with compress(model, method) as session:
                tokens = answer(past_key_values=cache)
        finally:
            noted.remove()
        if not first:
            raise ValueError(
                f"{type(model).__name__} generates without calling its own forward pass: its prefill cannot be "
                "noted for evaluations and fits; allowed is a model that calls it"
            )
        layers = [
            layer if other is None else other for layer, other in zip(cache.layers, first["others"], strict=True)
        ]
        told = {name: first[name] for name in ("output", "rotary", "start", "embeddings", "hidden")}
        return cls(layers, interleaved=cache.shared.turn.interleaved, tokens=tokens, **told)

    @property
    def recorded_layers(self) -> list[RecordedLayer]:
        """The layers that a method may cut."""
        return [layer for layer in self.layers if isinstance(layer, RecordedLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of the recorded keys, values and queries."""
        tensors = [
            x for layer in self.recorded_layers for x in (*(layer.states or ()), *(call[0] for call in layer.calls))
        ]
        return sum(x.nbytes for x in tensors)

    @contextmanager
    def replayed(self, model: Any, memory: Sequence[Tensor] = ()) -> Iterator[None]:
        """The model's next prefill is this one; inside a session, with the inputs that it was recorded with.

        Args:
            memory: for each recorded layer what its views shall remember (`LayerView.memory`), or none.
        """
        forward = model.forward
        own = model.__dict__.get("forward")

        @functools.wraps(forward)
        def replay(*args: Any, **kwargs: Any) -> Any:
            cache = kwargs.get(CACHE)
            if not isinstance(cache, CompressedCache) or cache.get_seq_length():
                return forward(*args, **kwargs)
            self._fill(cache, memory)
            return type(self.output)(**{**self.output, CACHE: cache})

        model.forward = replay
        try:
            yield
        finally:
            if own is None:
                del model.forward
            else:
                model.forward = own

    @torch.no_grad()
    def _fill(self, cache: CompressedCache, memory: Sequence[Tensor]) -> None:
        """What the forward pass would have done to an empty cache."""
        cache.shared.memo = self.memo
        session = None if cache.session is None else cache.session()
        if session is not None:
            running = session.running
            running.embeddings = running.embeddings if self.embeddings is None else self.embeddings
            running.hidden = running.hidden if self.hidden is None else self.hidden
        if cache.shared.needs.rotary:
            cache.shared.turn.recall_rotary(self.rotary, interleaved=self.interleaved)
        remembered = iter(memory)
        for place, layer in enumerate(self.layers):
            if not isinstance(layer, RecordedLayer):
                cache.layers[place] = copy.deepcopy(layer)
                continue
            target = cache.layers[place]
            target.prompt_cut.memory = next(remembered, None)
            if layer.states is not None:
                target.update(*layer.states)
                target.prompt_cut.rotated = layer.prompt_cut.rotated
                if layer.calls:
                    target.after_attention(*layer.calls[0])
                else:  # nobody read them then either
                    target.unread, target.why = False, layer.why
