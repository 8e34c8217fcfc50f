"""A transformers cache whose layers hold fewer slots than the tokens they have seen (`kvweave.seam.layer`)."""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from kvweave.cut.shares import by_row, share_out
from kvweave.cut.stream import SINKS, stream_of
from kvweave.cut.stream_cut import StreamCut
from kvweave.cut.terms import Pending
from kvweave.methods.base import Method
from kvweave.ops.budget import kl_target
from kvweave.prompt import Prompt
from kvweave.seam.export import export
from kvweave.seam.layer import CompressedLayer
from kvweave.seam.probes import CHUNK, read_probes
from kvweave.seam.profiles import working
from kvweave.seam.question import open_question
from kvweave.seam.reader import unwrapped
from kvweave.seam.report import described, layer_kinds
from kvweave.seam.saved import read, write
from kvweave.seam.shared import Shared
from kvweave.seam.turn import State
from kvweave.seam.window import fix, fixes, release


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
        every: bounded over endless input: after so many new tokens the cache is brought back to its budget, inside
            long prompts and while decoding; a method's default `defer` is 0 then. The budget is in tokens or bytes.
        total: with `every`, tokens of the whole input, for a budget that is a share of it.
        stream_sinks: with `every`, first tokens of the whole input that stay.
    """

    def __init__(
        self,
        config: Any,
        method: Method,
        *,
        trace: bool = False,
        hold: bool = False,
        every: int | None = None,
        total: int | None = None,
        stream_sinks: int = SINKS,
    ) -> None:
        if not isinstance(method, Method):
            raise TypeError(f"method={method!r} is not a kvweave method: allowed is one of kvweave.get_method(...)")
        if not callable(getattr(config, "get_text_config", None)):
            raise TypeError(
                f"config={type(config).__name__} is no configuration of transformers: allowed is model.config"
            )
        method, stream = stream_of(method, every, total, stream_sinks, trace=trace, hold=hold)
        self.method = method
        decoder = config.get_text_config(decoder=True)
        crossed = set(getattr(decoder, "cross_attention_layers", None) or ())
        layers: list[Any] = list(DynamicCache(config=config).layers)
        places = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer and i not in crossed]
        self.shared = Shared(method, layers=len(places), trace=trace, hold=hold, stream=stream)
        self.target = kl_target(method.budget)  # of the mean KL, where the budget is to be found by what it costs
        if self.target is not None and (hold or stream is not None):
            raise ValueError(f"budget={method.budget!r} is not allowed with hold=True or every: allowed is a number")
        self.steps: list[Any] = []  # of the tokens that it is found by (`kvweave.seam.foresight`)
        self.session: Callable[[], Any] | None = None  # a weak reference to who attached the model that fills it
        for index, place in enumerate(places):
            layers[place] = CompressedLayer(index, self.shared)
        self.kinds = [
            "cross_attention" if i in crossed else kind for i, kind in enumerate(layer_kinds(decoder, layers))
        ]
        super().__init__(layers=layers)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied, saved and sent: everything but the session that runs here."""
        return vars(self) | {"session": None, "steps": []}

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
        write(self, path, self._owner("save", model))

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any) -> "CompressedCache":
        """The cache that `save` wrote, equal to the bit, for the model that filled it.

        Raises:
            ValueError: another model, another format, or a file that was cut short or altered.
        """
        return read(cls, path, unwrapped(model))

    def work_on(self, model: Any) -> None:
        """Let the method be what it is on this model; `method` stays as it was given."""
        self.shared.go_by(working(self.method, model))

    def export(
        self,
        path: str | os.PathLike[str],
        model: Any = None,
        *,
        row: int | None = None,
        first_token: int | None = None,
    ) -> dict[str, Any]:
        """Write what the cache holds for a stock engine with paged attention, such as vLLM; the cache stays as it is.

        Of each layer i, keys `k{i}` and values `v{i}` [kv_heads, slots, dim] in safetensors, in the cache's dtype.
        Keys are turned by slots - next_position positions, in float32, so that a request of `slots` tokens with these
        keys and values, followed by the next token, is at the positions that the engine counts. Layers without rotary
        stay as they are. The same cache gives the same file.

        Args:
            path: a file, or a folder, in which the file is named DIGEST.safetensors.
            model: that filled the cache; None: the one that kvweave is attached to.
            row: of a batch; its padding is left out.
            first_token: what the model answered to the prompt, for whoever decodes on; None: a question comes first.
        Returns:
            What the file says of itself: `slots`, `next_position`, `first_token`, `tokens` (real ones seen, of which
            `slots` entries are left), `layers`, `method`, `model`, `format`, `digest`.
        Raises:
            ValueError: counts that differ by layer or head, entries with a bias, a cut that waits, layers that are no
                full attention, positions that are no pure rotation (learned ones, ALiBi, dynamic NTK, attention
                scaled by position), a batch without `row`, a tensor parallel model, or no model.
        """
        return export(self, path, self._owner("export", model), row=row, first_token=first_token)

    def _owner(self, act: str, model: Any) -> Any:
        """The model that the cache belongs to, as the caller says, or else the one that is attached."""
        session = None if self.session is None else self.session()
        owner = model if model is not None else getattr(session, "model", None)
        if owner is None:
            raise ValueError(f"{act}: no model is attached to this cache: allowed is cache.{act}(path, model)")
        return unwrapped(owner)

    def stand_in_for(self, other: Cache) -> None:
        """Take the place of an empty cache: layers that are not compressed stay its own, with all they were told.

        `generate` tells a cache that it made, before the first forward pass, to record the past of its sliding
        layers where drafts may be taken back.
        """
        for place, layer in enumerate(other.layers[: len(self.layers)]):
            if type(layer) is type(self.layers[place]):
                self.layers[place] = layer

    # ---------------------------------------------------------------- what it holds

    @property
    def prompt(self) -> Prompt | None:
        """Visual and padding masks of everything seen; None before the first forward pass."""
        return self.shared.turn.prompt

    @property
    def compressed_layers(self) -> list[CompressedLayer]:
        """The layers that are compressed."""
        return [x for x in self.layers if isinstance(x, CompressedLayer) and not x.why]

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile decode steps: room for them is laid out, in every layer."""
        every = all(isinstance(x, CompressedLayer) or fixes(x) or x.is_compileable for x in self.layers)
        return self.shared.room is not None and every and self.shared.method.storage is None

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
        if self.shared.stream is not None:
            raise ValueError(
                f"reserve is not allowed with every={self.shared.stream.every}, which cuts as it decodes"
            )
        if self.shared.method.storage is not None:
            raise ValueError(f"method={self.shared.method.name} packs what it keeps, and has no fixed buffers")
        if self.prompt is None:
            raise ValueError("nothing is cached yet: reserve room after the prompt")
        self.settle()
        for layer in self.compressed_layers:
            layer.reserve(tokens)
        fix(self)

    def settle(self) -> None:
        """Leave the buffers of `reserve`; what was decoded is then known to the host."""
        release(self)
        if not self.fixed:
            return
        for layer in self.compressed_layers:
            layer.settle()
        assert self.prompt is not None
        self.shared.turn.extend(self.compressed_layers[0].seen - self.prompt.length)

    # ---------------------------------------------------------------- when it is cut

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
        self.shared.turn.declare(length)

    def freeze(self) -> None:
        """Compress no more: further prompts are appended whole. `question` asks one and takes it back.

        A prompt that `weave` still holds whole is read again first, if the model is attached: no reply is to come
        that would tell what matters.
        """
        self.cut_unasked()
        self.shared.turn.freeze()

    def question(self, ids: Tensor | None = None) -> AbstractContextManager[dict[str, Any]]:
        """Ask something about what is cached, and forget it again, as one context serves many questions.

            with cache.question(ids) as inputs:  # the question's own tokens, without the context's
                out = model.generate(**inputs, max_new_tokens=32)
            with cache.question():  # the same, given the whole conversation
                out = model.generate(**processor(...), past_key_values=cache, max_new_tokens=32)

        Inside, nothing is cut: what is asked and answered is appended whole, to all layers, sliding ones too. On
        leaving, by an exception too, the cache is what it was. Questions nest. Pictures that the cache has read need
        not be given again, and are ignored if they are.

        Args:
            ids: int64 [batch, tokens], from the first token behind the context.
        Yields:
            With `ids` the inputs for `generate`, this cache among them; else an empty dict.
        Raises:
            ValueError: there is no context or half of one, it waits for `compress`, or its tokens are not known.
        """
        return open_question(self, ids)

    @property
    def waits(self) -> bool:
        """The prompt's cut is deferred and has not come yet."""
        return self.shared.turn.state is State.WAITING

    def cut_if_due(self) -> None:
        """Make the deferred cut, once as many tokens have been decoded as the method asks for.

        Called when the tokens at hand are the reply's, and not candidates that may be taken back.
        """
        if self.waits and not self.shared.turn.on_request and self.decoded >= self.shared.method.defer:
            self.cut_waiting()

    def compress(
        self, probes: Any = None, *, processor: Any = None, probe_tokens: int = 32, replay_chunk: int = CHUNK
    ) -> None:
        """Cut the prompt that a cache made with `hold=True` holds whole.

        Args:
            probes, processor, probe_tokens, replay_chunk: what the model is asked before, as in `kvweave.compress`.
        Raises:
            ValueError: there is no prompt, it was cut already, or probes that are not allowed.
        """
        turn = self.shared.turn
        if turn.end is None or self.decoded < 0:
            raise ValueError("compress: the cache holds no whole prompt: allowed is one that a model has read")
        probe_set = None if probes is None else read_probes(probes, processor, probe_tokens, replay_chunk)
        session = None if self.session is None else self.session()
        if probe_set is not None:
            if not turn.on_request or turn.deferred is not None or self.decoded:
                raise ValueError(
                    f"probes={probes!r} is not allowed: the cache was cut already, or a reply has begun; allowed is "
                    "right after the prompt, on CompressedCache(config, method, hold=True)"
                )
            if session is None:
                raise ValueError("probes: no model is attached to this cache: allowed is after kvweave.attach(model)")
            session.answer_probes(self, probe_set)
        elif not turn.on_request or turn.deferred is not None:
            raise ValueError(
                "compress: the cache was cut already; allowed is CompressedCache(config, method, hold=True)"
            )
        self.cut_unasked()

    @property
    def decoded(self) -> int:
        """Tokens behind the last prompt."""
        end = self.shared.turn.end
        return 0 if end is None else self.get_seq_length() - end

    def cut_unasked(self) -> None:
        """Cut the layers that wait; where no reply has begun that tells what matters, read the prompt again first."""
        session = None if self.session is None else self.session()
        needs, unasked = self.shared.needs, self.waits and not self.decoded and self.target is None
        if unasked and (needs.replay or needs.unasked) and session is not None and session.attached:
            session.answer_probes(self, None)
        self.cut_waiting()

    @torch.compiler.disable
    def cut_waiting(self) -> None:
        """Cut the layers that wait, if any."""
        layers = [layer for layer in self.compressed_layers if layer.prompt_cut.waiting is not None]
        waiting = [layer.prompt_cut.waiting for layer in layers if layer.prompt_cut.waiting is not None]
        if not waiting:
            return
        if self.target is not None and not self.shared.turn.choice:
            raise ValueError(
                f"budget={self.method.budget!r} is found from the first {self.shared.method.defer} tokens of a "
                f"reply, and {self.decoded} have been decoded: allowed is after them, or a number as the budget"
            )
        counted, first = self.shared.turn.counted, waiting[0]
        if self.shared.method.pools:  # what decides is known once all layers have been told, one at a time
            of_layers = [layer.weigh(counted) for layer in layers]
            lengths = first.prompt.lengths
            for layer, share in zip(
                layers, share_out(self.shared.method, first.budgets, lengths, len(layers), of_layers), strict=True
            ):
                layer.cut(layer.due(share, None), share)
        else:
            adaptive = self.shared.method.layer_adaptive
            weights = [prompt.weights for prompt in waiting] if adaptive else None
            shares = share_out(self.shared.method, first.budgets, first.prompt.lengths, self.shared.layers, weights)
            for place, layer in enumerate(layers):
                share = shares[place if adaptive else layer.index]
                layer.cut(layer.due(share, counted), share)
        self.shared.turn.finish(deferred=self.decoded)

    def finish_pass(self, new: int) -> bool:
        """A forward pass of `new` columns has ended: cut what is due, and lay out room to decode in.

        Returns:
            Whether a cut waits for the answers to probes.
        """
        if self.shared.stream is not None:
            return self._finish_pass_of_stream()
        layers = self.compressed_layers
        pending = [layer.prompt_cut.pending for layer in layers if layer.prompt_cut.pending is not None]
        if layers and len(pending) == len(layers):  # all have been observed
            self._cut_together(layers, pending)
        turn, room = self.shared.turn, self.shared.room
        turn.finish()
        complete = room is not None and turn.end is not None and self.get_seq_length() >= turn.end
        if room is not None and complete and self.is_compileable and not self.waits:
            self.reserve(room)
        if new == 1:
            self.cut_if_due()
        return self.waits

    def _finish_pass_of_stream(self) -> bool:
        """The same of a stream."""
        stream, cuts = self.shared.stream, [layer.prompt_cut for layer in self.compressed_layers]
        assert stream is not None
        streams = [cut for cut in cuts if isinstance(cut, StreamCut)]
        stream.peak = max(stream.peak, sum(cut.read for cut in streams) / max(1, len(streams)))
        due = any(cut.due_by is not None for cut in streams)
        if due and not stream.asks:
            self.cut_stream(self.ready())
        if stream.tables.grown:
            stream.tables.keep([x for x in (layer.positions for layer in self.compressed_layers) if x is not None])
        return due and stream.asks

    def ready(self, probing: int = 0) -> list[Pending]:
        """What the cuts of a stream's layers need that are made when all have read a pass.

        Args:
            probing: columns at the end that are probes', and are forgotten before the cut.
        """
        return [layer.ready(probing) for layer in self.compressed_layers]

    def cut_stream(self, pending: Sequence[Pending]) -> None:
        """Make those cuts."""
        layers, stream = self.compressed_layers, self.shared.stream
        assert stream is not None
        if self.shared.method.layer_adaptive:
            self._cut_together(layers, pending)
            return
        for layer, prompt in zip(layers, pending, strict=True):
            layer.cut(prompt, stream.shares(self.shared.method, prompt.budgets, layer.index, len(layers)))

    @property
    def speaks_of_slots(self) -> bool:
        """Every layer but sliding ones knows the columns of its slots: a mask need not speak of all columns."""
        layers = [layer for layer in self.layers if not getattr(layer, "is_sliding", False)]
        ours = [layer.block for layer in layers if isinstance(layer, CompressedLayer) and layer.compressed]
        return len(ours) == len(layers) and all(block is not None and block.has_positions for block in ours)

    def _cut_together(self, layers: Sequence[CompressedLayer], pending: Sequence[Pending]) -> None:
        """Cut layers whose budgets depend on what was observed of all of them."""
        first, weights = pending[0], [by_row(prompt.groups, prompt.weights) for prompt in pending]
        lengths = [max(of_row) for of_row in zip(*(prompt.lengths for prompt in pending), strict=True)]
        shares = share_out(self.shared.method, first.budgets, lengths, len(layers), weights)
        for layer, prompt, share in zip(layers, pending, shares, strict=True):
            layer.cut(prompt, share)

    # ---------------------------------------------------------------- columns and rows go

    def reset(self) -> None:
        """Forget everything."""
        release(self)
        super().reset()
        self.shared.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, all of them if there are no more; a positive number (older transformers) is the
        length to crop to.

        What a prompt has lost is gone: what is left of it counts as the prompt, and is not cut again before another
        one comes.
        """
        self.settle()
        total, removed = self.get_seq_length(), int(tokens_to_remove)
        removed = max(removed, -total)
        super().crop(removed)
        length = min(removed, total) if removed > 0 else total + removed
        if length < total:
            self.shared.crop(length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.settle()
        super().reorder_cache(beam_idx)
        self.steps = []
        self.shared.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.settle()
        super().batch_repeat_interleave(repeats)
        self.steps = []
        if self.prompt is not None:
            self.shared.select(torch.arange(self.prompt.valid.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.settle()
        super().batch_select_indices(indices)
        self.steps = []
        self.shared.select(indices)

    @property
    def report(self) -> dict[str, Any]:
        """What the last cut did, JSON-able.

        `layers`: for each layer its length, how many tokens were kept, merged and evicted (means over rows and KV
        heads, they add up to the length), tokens in the heaviest entry, bytes after the cut, flow ratio and scope;
        `rows`: the same for each row of a batch. `totals`: over the compressed layers; `peak_bytes`: most that they
        held at once. `auto`: with a budget such as "auto:kl=0.05" its target, and for each row the entries that were
        chosen, their share and the KL that was estimated. `deferred`: tokens decoded before the cut, None: it has not
        come. `probes`: how many were asked, their tokens and the seconds that they took.

        With `every` all counts are of the whole input, at this moment; `cuts`, `seen` (tokens), `held` and
        `peak_entries` (entries of a KV head on average, now and the most ever), of each layer and of all on average.
        """
        return described(self)
