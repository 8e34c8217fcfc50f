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

from torch import Tensor, nn
from transformers import PreTrainedModel

from kvweave.methods.base import Method
from kvweave.methods.needs import Needs
from kvweave.seam import guard, latents, lookup, reader, rotary
from kvweave.seam.cache import CompressedCache
from kvweave.seam.filling import begin, check_bias, end
from kvweave.seam.frame import Frame
from kvweave.seam.generate import wrap
from kvweave.seam.names import Call, Signature
from kvweave.seam.probes import Probes
from kvweave.seam.probing import answer
from kvweave.seam.profiles import check_profiles, working

#: Sessions by the parts of models that they are attached to: a part has one at most.
_SESSIONS: weakref.WeakValueDictionary[int, "Session"] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()


class Session:
    """A model to which kvweave is attached; a context manager. See `compress` and `attach`.

    Attributes:
        model: as it was given; base: the model of transformers in it (PEFT wraps one).
        method: as it was given; working: as it works on this model.
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
        bounds: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.base = model, reader.unwrapped(model)
        self.method = method
        self.working = method
        self.trace = trace
        self.visual = visual
        self.probes, self.processor = probes, processor
        self.bounds = bounds or {}  # of caches over endless input: every, total, stream_sinks
        self.cache: CompressedCache | None = None
        self.keepers = lookup.keepers_of_offsets(self.base) if isinstance(self.base, nn.Module) else []
        self.implementation = ""  # the name of the model's attention
        self.tensor_parallel = (getattr(self.base, "_tp_size", None) or 1) > 1
        self.expansions: dict[int, latents.Expansion] = {}
        self.running = Frame()
        self.attached = False
        self._undo: list[Callable[[], Any]] = []
        self._inside = False  # of a `with` block
        self._used = method is None
        self._warnings: set[str] = set()

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
        base = lookup.implementation(decoder)
        if self.method is not None:
            self.working = working(self.method, model)
            check_bias(self.working, base)
            check_profiles(self.working, model)
            latents.check(self.working, model)
        parts = reader.parts_of(model, decoder)
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
            self._undo += latents.attach(model)
            self.expansions = latents.expansions(model)
            self.implementation = base
            if self.method is not None:
                self._undo += reader.watch(self)
            for part in parts:
                self._hook(part)
            for part in parts:
                if hasattr(part, "generate"):
                    self._undo += wrap(self, part)
            if self.working is None or self.working.needs.rotary:
                self._undo += rotary.watch(self)
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

    def __reduce__(self) -> Any:  # hooks would lead a copy of the model to this session
        raise TypeError(
            f"kvweave is attached to this {type(self.model).__name__}: allowed is to copy or pickle it before, or "
            "after kvweave.detach(model)"
        )

    def __del__(self) -> None:
        if not getattr(self, "_used", True):
            warnings.warn(guard.UNUSED, stacklevel=2)

    def warn(self, about: str, text: str) -> None:
        """Warn, once of each thing."""
        if about not in self._warnings:
            self._warnings.add(about)
            guard.warn(text)

    # ------------------------------------------------------------ what happens while the model runs

    def _before_forward(
        self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, signature: Signature
    ) -> Any:
        forwards = self.running.forwards
        if part in forwards:  # it was left by an exception, without a word
            del forwards[forwards.index(part) :]
        forwards.append(part)
        if len(forwards) > 1:
            self.running.note_inputs(kwargs)
            return None  # the outer model's hook knows more: ids, token types, but for this
        call = Call(signature, args, kwargs)
        self.running.note_inputs(call.kwargs, outermost=True)
        cache = begin(self, part, call)
        if cache is None:
            return ((), call.arguments(call.cache)) if call.misnamed else None
        return (), call.arguments(cache)

    def _after_forward(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        running = self.running
        if not running.forwards or running.forwards[-1] is not part:
            return  # a hook that raised before ours: the forward pass never began
        running.forwards.pop()
        running.note_output(out)
        if running.forwards:
            return
        cache, running.cache = running.cache, None
        if cache is not None:
            end(self, part, cache, kwargs, out)

    # ------------------------------------------------------------ probes

    def asks(self, needs: Needs) -> bool:
        """Probes are answered before a prompt is cut by a method that needs this."""
        return self.probes is not None or needs.replay

    def answer_probes(self, cache: CompressedCache, probes: Probes | None) -> None:
        """For `CompressedCache.compress`: ask the model, and cut the cache by what it looked at.

        Args:
            probes: None: what its method asks by itself.
        """
        if not self.attached:
            raise ValueError("probes: the model is not attached any more: allowed is after kvweave.attach(model)")
        if cache.waits:
            answer(self, cache, probes)


def attached_to(model: Any) -> Session | None:
    """The session that is attached to `model`, or None."""
    return _SESSIONS.get(id(reader.unwrapped(model)))
