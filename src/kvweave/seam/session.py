"""A session: a model whose attention reads compressed caches, and what it must know to fill them.

A reader stands in for the model's attention (`kvweave.seam.reader`); a hook before each forward pass puts the
cache in place and notes which of the new columns are visual and which padding; `generate` is wrapped
(`kvweave.seam.generate`). All of it is undone on leaving, also by an exception.
"""

import functools
import threading
import warnings
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvweave.methods.base import Method
from kvweave.methods.registry import chosen_method
from kvweave.ops.budget import Budget
from kvweave.seam import guard, names, reader
from kvweave.seam.asides import answer_probes
from kvweave.seam.cache import CompressedCache
from kvweave.seam.filling import cache_of, check_bias, note_rotary, prepare
from kvweave.seam.frame import Frame
from kvweave.seam.generate import wrap
from kvweave.seam.layer import CompressedLayer
from kvweave.seam.names import Call, Signature
from kvweave.seam.probes import CHUNK, Probes, read_probes
from kvweave.seam.profiles import check_profiles

#: Sessions by the parts of models that they are attached to: a part has one at most.
_SESSIONS: weakref.WeakValueDictionary[int, "Session"] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()


class Session:
    """A model to which kvweave is attached; a context manager. See `compress` and `attach`.

    Attributes:
        model: as it was given; base: the model of transformers in it (PEFT wraps one).
        cache: the last compressed cache that the model filled, or None.
    """

    def __init__(
        self,
        model: Any,
        method: Method | None,
        *,
        visual: Tensor | None = None,
        trace: bool = False,
        probes: Probes | None = None,
        processor: Any = None,
    ) -> None:
        self.model, self.base = model, reader.unwrapped(model)
        self.method = method
        self.trace = trace
        self.visual = visual
        self._probes, self._processor = probes, processor
        self.cache: CompressedCache | None = None
        self.implementation = ""  # the name of the model's attention
        self.running = Frame()
        self.attached = False
        self._undo: list[Callable[[], Any]] = []
        self._inside = False  # of a `with` block
        self._used = method is None
        self._said: set[str] = set()

    # ------------------------------------------------------------ attaching and detaching

    def attach(self) -> "Session":
        """Let the model's attention read compressed caches.

        Raises:
            RuntimeError: kvweave is attached to this model already.
            TypeError, ValueError: a model that kvweave cannot compress; the message says why.
        """
        self._used = True
        model = self.base
        decoder = reader.decoder_of(model)
        base = names.implementation(decoder)
        if self.method is not None:
            check_bias(self.method, base)
            check_profiles(self.method, model)
        parts = [p for p in model.modules() if isinstance(p, PreTrainedModel) and reader.decodes(p, decoder)]
        with _LOCK:
            if any(id(part) in _SESSIONS for part in parts):
                raise RuntimeError(
                    f"kvweave is already attached to this {type(model).__name__}; sessions do not nest: "
                    "kvweave.detach(model) ends the one there is"
                )
            _SESSIONS.update({id(part): self for part in parts})
        self._undo += [functools.partial(_SESSIONS.pop, id(part), None) for part in parts]
        try:
            reader.attach(base, model)
            self._undo.append(lambda: reader.detach(base))
            self.implementation = base
            for part in parts:
                self._hook(part)
            for part in parts:
                if hasattr(part, "generate"):
                    self._undo += wrap(self, part)
            if self.method is None or self.method.turns_keys:
                self._hook_rotary()
        except BaseException:
            self.detach()
            raise
        self.attached = True
        return self

    def detach(self) -> None:
        """Leave the model as it was found."""
        self.attached = False
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> "Session":
        if self._inside:
            raise RuntimeError("this session was entered already; sessions do not nest")
        if not self.attached:
            self.attach()
        self._inside = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside = False
        self.detach()

    def _hook(self, part: PreTrainedModel) -> None:
        """Hook the model, and each model in it that may be called by itself: an inner stack, an inner generator."""
        signature = Signature.of(part)
        if signature.cache is None:
            return  # it hands the inputs on to a part that takes a cache
        before = functools.partial(self._before_forward, signature=signature)
        for hook in (
            part.register_forward_pre_hook(before, with_kwargs=True),
            part.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        ):
            self._undo.append(hook.remove)

    def _hook_rotary(self) -> None:
        note = functools.partial(note_rotary, self)
        for module in self.base.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                self._undo.append(module.register_forward_pre_hook(note, with_kwargs=True).remove)

    # ------------------------------------------------------------ what users ask

    @property
    def report(self) -> dict[str, Any]:
        """What the last compression did, JSON-able: see `CompressedCache.report`. Empty before any."""
        if not self._used:
            self.warn("unused", guard.UNUSED)
        return self.cache.report if self.cache is not None else {}

    def __repr__(self) -> str:
        what = "caches that bring a method" if self.method is None else self.method.spelling()
        state = "attached to" if self.attached else "not attached to"
        return f"<kvweave.Session {what}, {state} {type(self.model).__name__}: {guard.saved(self.cache)}>"

    def __del__(self) -> None:
        if not getattr(self, "_used", True):
            warnings.warn(guard.UNUSED, stacklevel=2)

    def warn(self, about: str, text: str) -> None:
        """Warn, once of each thing."""
        if about not in self._said:
            self._said.add(about)
            guard.warn(text)

    # ------------------------------------------------------------ what happens while the model runs

    def _before_forward(
        self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, signature: Signature
    ) -> Any:
        running = self.running
        if not running.begin(part):
            return None  # the outer model's hook knows more: ids, token types
        call = Call(signature, args, kwargs)
        cache = cache_of(self, part, call)
        running.cache = None
        if call.inputs is None or cache is None:
            return ((), call.arguments(call.cache)) if call.misnamed else None
        running.cache = cache
        if running.request is not None and running.own is None:
            running.own = cache
        if running.request is None or running.own is cache:  # not the other branch of classifier-free guidance
            self.cache = cache
        if any(isinstance(layer, CompressedLayer) for layer in cache.layers):
            prepare(self, part, cache, call)
        return (), call.arguments(cache)

    def asks(self, method: Method) -> bool:
        """Probes are answered before a prompt is cut by this method."""
        return self._probes is not None or method.replays

    def _after_forward(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        running = self.running
        if not running.end(part):
            return
        cache, running.cache = running.cache, None
        if cache is None:
            return
        cache.shared.attached = False
        if out is None or cache.fixed:
            return  # the forward pass raised, or changed tensors alone
        guard.check_filled(self.base, cache, running.before, kwargs, out)
        guard.check_read(self.base, self.base.config.get_text_config(decoder=True), cache)
        cache.finish_prompt()
        ids = kwargs.get("input_ids")
        if (ids if ids is not None else kwargs["inputs_embeds"]).shape[1] == 1:
            cache.cut_if_due()
        named = self._probes is not None or not cache.shared.hold  # else `cache.compress` asks
        if named and self.asks(cache.method) and cache.waits and cache.decoded >= 0 and not running.aside:
            self._answer(cache, self._probes)
        if not cache.compressed_layers:
            kinds = sorted({layer["kind"] for layer in cache.report["layers"]})
            self.warn("nothing", f"kvweave compressed no layer of {type(self.base).__name__}: {'; '.join(kinds)}")

    # ------------------------------------------------------------ probes

    def answer_probes(self, cache: CompressedCache, probes: Probes | None) -> None:
        """For `CompressedCache.compress`: ask the model, and cut the cache by what it looked at.

        Args:
            probes: None: what its method asks by itself.
        """
        if not self.attached:
            raise ValueError("probes: the model is not attached any more: allowed is after kvweave.attach(model)")
        if cache.waits:
            self._answer(cache, probes)

    def _answer(self, cache: CompressedCache, probes: Probes | None) -> None:
        if cache.decoded:
            raise ValueError("probes: the prompt came with tokens behind it: allowed is a forward pass of the prompt")
        asked = probes or read_probes("replay", self._processor, Probes.most)
        with self.running.going_aside():
            answer_probes(self.base, cache, asked)


# -------------------------------------------------------------------- what users call


def compress(
    model: Any,
    method: Method | str | None = None,
    *,
    budget: Budget | None = None,
    visual: Tensor | None = None,
    trace: bool = False,
    probes: Any = None,
    processor: Any = None,
    probe_tokens: int = 32,
    replay_chunk: int = CHUNK,
) -> Session:
    """Compress the KV cache of everything that `model` is given inside the `with` block.

        with kvweave.compress(model, kvweave.FlowMM(budget=0.2)) as session:
            out = model.generate(**inputs, max_new_tokens=64)
        session.report

    Args:
        model: any decoder of transformers, with an image encoder or without; or PEFT's wrapper of one.
        method: what decides which entries stay, or its spelling, such as "flowmm:budget=0.2".
        budget: in place of a method: `Weave(budget=budget)`.
        visual: bool [batch, length], which tokens are visual, where only embeddings are passed; else it is read
            from the inputs.
        trace: keep what became of each token, for pictures.
        probes: for contexts whose question is not known: what the model is asked about a prompt before it is cut;
            what it then looks at stays (SPEC 13.2, 15.5). A list of texts or of token ids; "default": to describe
            the images and repeat the text; "replay": the prompt's text is read again behind it, then images are
            described; "template": the tokens that end a user's turn. They take the place of `defer`, which is
            ignored. A method that reads no attention is none the wiser. None: nothing, but kvzip asks "replay".
        processor: the model's, or its tokenizer, where probes are texts. Without it "replay" comes without an
            instruction, and images are not described.
        probe_tokens: most tokens of an answer to a probe.
        replay_chunk: tokens of the prompt that "replay" reads at once.
    Raises:
        TypeError: `method` is none, `model` is none.
        ValueError, RuntimeError: on entering, where the model cannot be compressed or already is.
    """
    chosen = chosen_method(method, budget)
    if visual is not None and (visual.dtype != torch.bool or visual.dim() != 2):
        raise ValueError(f"visual must be bool [batch, length], got {visual.dtype} {list(visual.shape)}")
    asked = None if probes is None else read_probes(probes, processor, probe_tokens, replay_chunk)
    return Session(model, chosen, visual=visual, trace=trace, probes=asked, processor=processor)


def attach(model: Any) -> Session:
    """Let `model` read every `CompressedCache` that it is given, until `kvweave.detach(model)`, or inside `with`.

    cache = kvweave.CompressedCache(model.config, method)
    with kvweave.attach(model):
        out = model.generate(**inputs, past_key_values=cache)
    """
    return Session(model, None).attach()


def detach(model: Any) -> None:
    """End whatever session is attached to `model`; nothing happens where there is none."""
    session = _SESSIONS.get(id(reader.unwrapped(model)))
    if session is not None:
        session.detach()
