"""One batch's prefill with the full cache, kept so that many methods can be tried on it.

A prefill is the same whatever is cut afterwards. `recording` gives a cache that keeps all, and what each layer's
attention was called with; inside `Prefill.replayed` the model's first forward pass puts that into the cache at hand,
which cuts it as it would have cut it then. The rest is the model's own `generate`.
"""

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvweave.cache import CompressedCache, CompressedLayer, Conversation
from kvweave.methods.full import Full
from kvweave.ops.statistics import AttentionRule

#: What an attention was called with: queries [batch, heads, new, dim], its rule, and its mask.
Call = tuple[Tensor, AttentionRule, Tensor | None]


@dataclass(frozen=True)
class Whole(Full):
    """The full cache, its rotary tables noted for methods that turn keys."""

    @property
    def turns_keys(self) -> bool:
        return True


class RecordedLayer(CompressedLayer):
    """A layer that keeps all that it is given.

    Attributes:
        given: keys and values [batch, kv_heads, length, dim] of the prompt.
        first: the prompt's call of attention.
        later: the calls since, until somebody takes them.
    """

    def __init__(self, index: int, conversation: Conversation) -> None:
        super().__init__(index, conversation)
        self.given: tuple[Tensor, Tensor] | None = None
        self.first: Call | None = None
        self.later: list[Call] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.given is None:
            self.given = key_states, value_states
        return super().update(key_states, value_states, *args, **kwargs)

    def after_attention(self, queries: Tensor, rule: AttentionRule, mask: Tensor | None) -> None:
        call = queries, rule, mask
        if self.unread and self.first is None:
            self.first = call
        elif self.unread:
            self.later.append(call)
        super().after_attention(queries, rule, mask)


@dataclass(frozen=True)
class Prefill:
    """What a prefill left behind.

    Attributes:
        layers: of the cache in order; recorded ones, and others as the prefill left them.
        output: of the first forward pass.
        rotary, interleaved: as in `Conversation`.
        start: columns of the prompt.
        paid: for each recorded layer the largest attention that what came later paid to the prompt's slots, float
            [batch, kv_heads, start] (`oracle.paid_attention`), over all that was asked.
        known: statistics that methods asked for, kept for the next ones and other budgets.
    """

    layers: list[Any]
    output: Any
    rotary: tuple[Tensor, Tensor] | None
    interleaved: bool
    start: int
    paid: list[Tensor] = field(default_factory=list)
    known: dict[Any, dict[Any, Any]] = field(default_factory=dict)

    @property
    def recorded_layers(self) -> list[RecordedLayer]:
        """The layers that a method may cut."""
        return [layer for layer in self.layers if isinstance(layer, RecordedLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of the recorded keys, values and queries."""
        given = [x for layer in self.recorded_layers for x in layer.given or ()]
        queries = [layer.first[0] for layer in self.recorded_layers if layer.first is not None]
        return sum(x.nbytes for x in (*given, *queries))

    @contextmanager
    def replayed(self, model: PreTrainedModel, memory: Sequence[Tensor] = ()) -> Iterator[None]:
        """The model's next prefill is this one; inside a session, with the inputs that it was recorded with.

        Args:
            memory: for each recorded layer what its views shall remember (`LayerView.memory`), or none.
        """
        forward = model.forward
        own = model.__dict__.get("forward")

        @functools.wraps(forward)
        def replay(*args: Any, **kwargs: Any) -> Any:
            cache = kwargs.get("past_key_values")
            if not isinstance(cache, CompressedCache) or cache.get_seq_length():
                return forward(*args, **kwargs)
            self._fill(cache, memory)
            return type(self.output)(**{**self.output, "past_key_values": cache})

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
        cache.conversation.known = self.known
        if cache.conversation.turns_keys:
            cache.conversation.rotary, cache.conversation.interleaved = self.rotary, self.interleaved
        remembered = iter(memory)
        for place, layer in enumerate(self.layers):
            if not isinstance(layer, RecordedLayer):
                cache.layers[place] = copy.deepcopy(layer)
                continue
            target = cache.layers[place]
            target.memory = next(remembered, None)
            if layer.given is not None:
                target.update(*layer.given)
                target.rotated = layer.rotated
                if layer.first is not None:
                    target.after_attention(*layer.first)


def recorded_bytes(model: PreTrainedModel, tokens: int) -> int:
    """About what a recorded prefill of so many tokens holds: their queries, keys and values."""
    config: Any = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rows = heads + 2 * (getattr(config, "num_key_value_heads", None) or heads)
    return tokens * config.num_hidden_layers * rows * dim * model.dtype.itemsize


class Recorder:
    """A full cache whose layers keep what they are given, for one prompt and whatever is asked about it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.cache = CompressedCache(model.config, Whole())
        for place, layer in enumerate(self.cache.layers):
            if isinstance(layer, CompressedLayer):
                self.cache.layers[place] = RecordedLayer(layer.index, self.cache.conversation)
        self.prefill: Prefill | None = None

    @property
    def made(self) -> Prefill:
        """What was recorded, once the prompt was read."""
        assert self.prefill is not None
        return self.prefill

    def note(self, model: Any, args: Any, output: Any) -> None:
        """Forward hook: what the first pass left."""
        if self.prefill is not None:
            return
        layers = [x if isinstance(x, RecordedLayer) else copy.deepcopy(x) for x in self.cache.layers]
        talk = self.cache.conversation
        start = self.cache.get_seq_length()
        self.prefill = Prefill(layers, output, talk.rotary, talk.interleaved, start)


@contextmanager
def recording(model: PreTrainedModel) -> Iterator[Recorder]:
    """A `Recorder` whose cache is to be passed to the model's next prefill, in a session of `Whole`."""
    recorder = Recorder(model)
    noted = model.register_forward_hook(recorder.note)
    try:
        yield recorder
    finally:
        noted.remove()
