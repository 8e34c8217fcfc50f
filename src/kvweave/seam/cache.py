"""A transformers cache whose layers hold fewer slots than the tokens they have seen (`kvweave.seam.layer`)."""

import os
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from kvweave.cut.record import Record
from kvweave.methods.base import Method
from kvweave.ops.device import writable
from kvweave.prompt import Prompt
from kvweave.seam.layer import CompressedLayer, Pending
from kvweave.seam.reader import unwrapped
from kvweave.seam.saved import read, write
from kvweave.seam.turn import Conversation


class CompressedCache(Cache):
    """A cache that compresses every prompt it is given, to be kept over many turns.

    A further prompt compresses the whole again, decoded tokens included, to the budget of the whole conversation;
    what was evicted does not return. Layers that are no full attention (sliding, linear, cross attention) are
    transformers' own and stay as they are.

    Args:
        config: the model's.
        method: what decides, such as `FlowMM(budget=0.2)`.
        trace: keep what became of each token, for pictures (`layers[i].fate`).
        hold: prompts stay whole until `compress` is called, which may ask probes first.
    """

    def __init__(self, config: Any, method: Method, *, trace: bool = False, hold: bool = False) -> None:
        if not isinstance(method, Method):
            raise TypeError(f"method={method!r} is not a kvweave method: allowed is one of kvweave.get_method(...)")
        self.method = method
        decoder = config.get_text_config(decoder=True)
        crossed = set(getattr(decoder, "cross_attention_layers", None) or ())
        layers: list[Any] = list(DynamicCache(config=config).layers)
        places = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer and i not in crossed]
        self.conversation = Conversation(method, layers=len(places), trace=trace, hold=hold)
        self.session: Callable[[], Any] | None = None  # a weak reference to who attached the model that fills it
        for index, place in enumerate(places):
            layers[place] = CompressedLayer(index, self.conversation)
        self._kinds = [
            "cross_attention" if i in crossed else kind for i, kind in enumerate(_layer_kinds(decoder, layers))
        ]
        super().__init__(layers=layers)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied, saved and sent: everything but the session that runs here."""
        return vars(self) | {"session": None}

    def save(self, path: str | os.PathLike[str], model: Any = None) -> None:
        """Write the cache to a file, safetensors without pickle, for `load` in this or another process.

        The file is there whole or not at all. It holds what the cache holds, the method, the masks, whatever waits
        for a cut, and what tells the model from others.

        Args:
            model: that filled the cache; None: the one that kvweave is attached to.
        Raises:
            ValueError: no model, or a forward pass is filling the cache.
            TypeError: the method keeps what cannot be saved.
        """
        session = None if self.session is None else self.session()
        owner = model if model is not None else getattr(session, "model", None)
        if owner is None:
            raise ValueError("save: no model is attached to this cache: allowed is cache.save(path, model)")
        write(self, path, unwrapped(owner))

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any) -> "CompressedCache":
        """The cache that `save` wrote, equal to the bit, for the model that filled it.

        Raises:
            ValueError: another model, another format, or a file that was cut short or altered.
        """
        return read(cls, path, unwrapped(model))

    def stand_in_for(self, given: Cache) -> None:
        """Take the place of an empty cache: layers that are not compressed stay its own, with all they were told.

        `generate` tells a cache that it made, before the first forward pass, to record the past of its sliding
        layers where drafts may be taken back.
        """
        for place, layer in enumerate(given.layers[: len(self.layers)]):
            if type(layer) is type(self.layers[place]):
                self.layers[place] = layer

    @property
    def prompt(self) -> Prompt | None:
        """Visual and padding masks of everything seen; None before the first forward pass."""
        return self.conversation.prompt

    @property
    def compressed_layers(self) -> list[CompressedLayer]:
        """The layers that are compressed."""
        return [x for x in self.layers if isinstance(x, CompressedLayer) and x.kind == "full"]

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile decode steps: room for them is laid out, in every layer."""
        whole = all(isinstance(layer, CompressedLayer) for layer in self.layers)
        return self.conversation.room is not None and whole and self.method.storage is None

    @property
    def fixed(self) -> bool:
        """Memory lies in fixed buffers."""
        return any(isinstance(layer, CompressedLayer) and layer.fixed for layer in self.layers)

    def reserve(self, tokens: int) -> None:
        """Lay what the layers hold in buffers of fixed shape and address, with room for `tokens` tokens to come.

        A decode step then changes tensors alone, and can be compiled once or captured in a CUDA graph. Leave it with
        `settle()`; a forward pass of more than one token does so by itself. In `generate` both are done where
        `compile_config` is given.

        Args:
            tokens: that are decoded at most before `settle()`.
        """
        if not isinstance(tokens, int) or tokens < 1:
            raise ValueError(f"tokens={tokens!r} is not allowed: allowed is an int of at least 1")
        if self.method.storage is not None:
            raise ValueError(f"method={self.method.name} packs what it keeps, and has no fixed buffers")
        if self.prompt is None:
            raise ValueError("nothing is cached yet: reserve room after the prompt")
        self.settle()
        for layer in self.compressed_layers:
            layer.reserve(tokens)

    def settle(self) -> None:
        """Leave the buffers of `reserve`; what was decoded is then known to the host."""
        if not self.fixed:
            return
        talk = self.conversation
        assert talk.prompt is not None
        for layer in self.compressed_layers:
            layer.settle()
        new = self.compressed_layers[0].seen - talk.prompt.length
        valid = talk.prompt.valid.new_ones(talk.prompt.valid.shape[0], new)
        talk.prompt = talk.prompt.extended(torch.zeros_like(valid), valid)

    def declare_prompt(self, length: int) -> None:
        """Say how long the prompt is that comes next in pieces, so that it is compressed once, when it is complete.

        Inside `generate` this is known; elsewhere every forward of more than one token ends a prompt.

        Args:
            length: logical length of the conversation when the prompt ends, padding included.
        """
        if not isinstance(length, int) or length <= self.get_seq_length():
            raise ValueError(
                f"length={length!r} is not allowed: an int above the {self.get_seq_length()} tokens seen"
            )
        self.conversation.declared = length

    def freeze(self) -> None:
        """Compress no more: further prompts are appended whole, as one context serves many questions.

        Ask one, then `crop` the cache back to the length it had, and ask the next.
        """
        self._cut_deferred()
        self.conversation.frozen = True

    @property
    def waits(self) -> bool:
        """The prompt's cut is deferred and has not come yet."""
        return any(layer.waiting is not None for layer in self.compressed_layers)

    def cut_if_due(self) -> None:
        """Make the deferred cut, once as many tokens have been decoded as the method asks for.

        Called when the tokens at hand are the reply's, and not candidates that may be taken back.
        """
        if self.waits and not self.conversation.held and self.decoded >= self.method.defer:
            self._cut_deferred()

    def compress(self, probes: Any = None, *, processor: Any = None, probe_tokens: int = 32) -> None:
        """Cut the prompt that a cache made with `hold=True` holds whole.

        Args:
            probes: what the model is asked before, as in `kvweave.compress`; None: nothing.
            processor: the model's, where probes are texts.
            probe_tokens: most tokens of an answer to a probe.
        Raises:
            ValueError: there is no prompt, it was cut already, or probes that are not allowed.
        """
        talk = self.conversation
        if talk.end is None or self.decoded < 0:
            raise ValueError("compress: the cache holds no whole prompt: allowed is one that a model has read")
        if probes is not None:
            if not talk.held or talk.deferred is not None or self.decoded:
                raise ValueError(
                    f"probes={probes!r} is not allowed: the cache was cut already, or a reply has begun; allowed is "
                    "right after the prompt, on CompressedCache(config, method, hold=True)"
                )
            session = None if self.session is None else self.session()
            if session is None:
                raise ValueError("probes: no model is attached to this cache: allowed is after kvweave.attach(model)")
            session.answer_probes(self, probes, processor, probe_tokens)
        elif not talk.held or talk.deferred is not None:
            raise ValueError(
                "compress: the cache was cut already; allowed is CompressedCache(config, method, hold=True)"
            )
        self._cut_deferred()

    @property
    def decoded(self) -> int:
        """Tokens behind the last prompt."""
        end = self.conversation.end
        return 0 if end is None else self.get_seq_length() - end

    def count_decoded(self, start: int, live: Tensor, ended: Tensor) -> None:
        """Note which of the first decoded tokens belong to a reply that has not ended.

        Args:
            start: number of the first of them; the first decoded token is 0.
            live: bool [batch, new], tokens that the attention mask shows; ended: alike, tokens that end a reply.
        """
        talk = self.conversation
        if talk.counted is None:
            talk.counted = torch.zeros(len(live), talk.awaited, dtype=torch.bool, device=live.device)
        talk.counted = writable(talk.counted)
        for n in range(min(live.shape[1], talk.awaited - start)):
            at = start + n
            going = live[:, n] if at < talk.asked else live[:, n] & ~ended[:, n]  # a probe may hold an end of turn
            talk.counted[:, at] = going & talk.counted[:, at - 1] if at else going

    def expect(self, asked: int, most: int) -> None:
        """A probe of `asked` tokens comes, with an answer of `most`, whose end ends the counting."""
        tokens = asked + most
        self.conversation.expected, self.conversation.asked, self.conversation.counted = tokens, asked, None
        for layer in self.compressed_layers:
            if layer.waiting is not None:
                layer.waiting.expect(tokens)

    def answered(self) -> bool:
        """The answers to the probe have ended in all rows."""
        counted = self.conversation.counted
        return counted is None or not bool(counted[:, self.decoded - 1].any())

    def take_back(self, tokens: int) -> None:
        """Note what the probe and its answer looked at, and forget them, `tokens` together."""
        talk = self.conversation
        assert talk.counted is not None
        for layer in self.compressed_layers:
            layer.count_attention(talk.counted)
        self.crop(-tokens)
        talk.expected, talk.asked, talk.counted = 0, 0, None

    def cut_probed(self, cost: dict[str, Any]) -> None:
        """Make the cut that waited for probes; `cost` goes into the report."""
        self.conversation.probes = cost
        self._cut_deferred()

    @torch.compiler.disable
    def _cut_deferred(self) -> None:
        talk = self.conversation
        layers = [layer for layer in self.compressed_layers if layer.waiting is not None]
        if not layers:
            return
        first = layers[0].waiting
        assert first is not None
        if self.method.pools:  # what decides is known once all layers have been told
            pending = [layer.due(None, talk.counted) for layer in layers]
            self._cut_together(layers, pending)
        else:
            lengths = first.prompt.lengths
            shares: list[list[Any]] = []  # of each row, by layer
            for row, (budget, length) in enumerate(zip(first.budgets, lengths, strict=True)):
                if self.method.layer_adaptive:
                    weights = [layer.waiting.weights[row] for layer in layers if layer.waiting is not None]
                    shares.append(self.method.allocate(weights, budget, length))
                else:
                    whole = self.method.layer_budgets(budget, length, talk.layers)
                    shares.append([whole[layer.index] for layer in layers])
            for place, layer in enumerate(layers):
                share = [of_row[place] for of_row in shares]
                layer.cut(layer.due(share, talk.counted), share)
        talk.deferred = self.decoded

    def finish_prompt(self) -> None:
        """Cut the layers of a layer-adaptive method, once all of them have been observed."""
        if self.fixed:
            return
        self._cut_pending()
        talk = self.conversation
        if (
            talk.room is not None
            and self.is_compileable
            and talk.end is not None
            and self.get_seq_length() >= talk.end
            and not self.waits
        ):
            self.reserve(talk.room)

    def _cut_pending(self) -> None:
        layers = self.compressed_layers
        pending = [layer.pending for layer in layers if layer.pending is not None]
        if not layers or len(pending) < len(layers):
            return
        self._cut_together(layers, pending)

    def _cut_together(self, layers: list[CompressedLayer], pending: list[Pending]) -> None:
        """Cut layers whose budgets depend on what was observed of all of them."""
        first = pending[0]
        shares: list[list[Any]] = [[] for _ in first.lengths]
        for n, group in enumerate(first.groups):
            row = group.index[0]
            weights = [p.weights[n] for p in pending]
            shares[row] = self.method.allocate(weights, first.budgets[row], first.lengths[row])
        for place, (layer, p) in enumerate(zip(layers, pending, strict=True)):
            layer.cut(p, [share[place] for share in shares])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.conversation.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, all of them if there are no more; a positive number (older transformers) is the
        length to crop to.

        What a prompt has lost is gone: what is left of it counts as the prompt, and is not cut again before another
        one comes.
        """
        self.settle()
        seen, asked = self.get_seq_length(), int(tokens_to_remove)
        asked = max(asked, -seen)
        super().crop(asked)
        length = min(asked, seen) if asked > 0 else seen + asked
        if length < seen:
            self.conversation.crop(length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.conversation.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.prompt is not None:
            self.conversation.select(torch.arange(self.prompt.valid.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.conversation.select(indices)

    @property
    def report(self) -> dict[str, Any]:
        """What the last cut did, JSON-able.

        `layers`: for each layer its length, how many tokens were kept, merged and evicted (means over rows and KV
        heads, they add up to the length), tokens in the heaviest entry, bytes after the cut, flow ratio and scope;
        `rows`: the same for each row of a batch. `totals`: over the compressed layers; `peak_bytes`: most that they
        held at once. `deferred`: tokens decoded before the cut, None: it has not come. `probes`: how many were asked,
        their tokens and the seconds that they took.
        """
        layers = [self._described(place) for place in range(len(self.layers))]
        done = [layer for layer in layers if layer["compressed"]]
        totals: dict[str, Any] = {
            name: sum(layer[name] for layer in done)
            for name in ("length", "kept", "merged", "evicted", "bytes", "bytes_before")
        }
        totals["layers"] = len(done)
        totals["peak_bytes"] = self._peak([x.record for x in self.compressed_layers if x.record is not None])
        deferred = None if self.waits else self.conversation.deferred or 0
        report = {"method": self.method.to_dict(), "layers": layers, "totals": totals, "deferred": deferred}
        for record in (x.record for x in self.compressed_layers if x.record is not None):
            report |= record.words
        return report | ({"probes": self.conversation.probes} if self.conversation.probes else {})

    def _peak(self, records: list[Record]) -> int:
        """Most bytes held at once while these layers were filled and cut."""
        if (
            self.method.layer_adaptive or self.method.defer or self.conversation.held
        ):  # none is cut before all are filled
            return sum(record.bytes_before + record.bytes_behind for record in records)
        cut = [0, *accumulate(record.bytes_after for record in records)]
        return max((done + record.bytes_before for done, record in zip(cut, records, strict=False)), default=0)

    def _described(self, place: int) -> dict[str, Any]:
        """One layer's part of the report."""
        layer, kind = self.layers[place], self._kinds[place]
        if isinstance(layer, CompressedLayer) and layer.kind == "full" and layer.record is not None:
            return {"layer": place, "kind": kind, "compressed": True, **layer.record.described()}
        why = layer.kind if isinstance(layer, CompressedLayer) and layer.kind != "full" else kind
        return {"layer": place, "kind": why, "compressed": False}


def _layer_kinds(decoder: Any, layers: Sequence[Any]) -> list[str]:
    """What each layer's attention is called, by the config, else by transformers' choice of a cache for it."""
    named = list(getattr(decoder, "layer_types", None) or [])
    if len(named) == len(layers):
        return named
    return ["sliding_attention" if getattr(layer, "is_sliding", False) else "full_attention" for layer in layers]
