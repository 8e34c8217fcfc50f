"""Where models look their attention up: a reader stands under its name while something is attached.

Keys that come from a compressed layer go to `kvweave.seam.attention`; all other calls pass straight on to the
function that stood there before. The name stays, because models ask for it: under another one some drop their masks.
"""

import functools
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from kvweave.seam import lookup
from kvweave.seam.attention import reader_of

if TYPE_CHECKING:
    from kvweave.seam.session import Session

LOOP = (
    "attention of {} was called outside of its forward pass, as by a loop over its layers: kvweave does not see such "
    "a loop's cache, and compresses nothing of it; allowed is to call the model, or the model inside it"
)


def unwrapped(model: Any) -> Any:
    """The transformers model in one of PEFT's, which runs it with its adapters inside."""
    return model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model


def decoder_of(model: Any) -> Any:
    """The decoder's config, of a model that kvweave can read."""
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model={kind} is not a transformers model")
    if model.config.is_encoder_decoder:
        raise ValueError(f"model={kind} is an encoder-decoder: kvweave compresses decoders only")
    decoder = model.config.get_text_config(decoder=True)
    if lookup.implementation(decoder) == "flex_attention":
        raise ValueError("attn_implementation='flex_attention' is not supported: allowed is sdpa, eager or flash")
    if not lookup.lets_attention_be_chosen(model, decoder):
        raise ValueError(f"model={kind} does not let its attention be chosen: kvweave cannot read its keys")
    return decoder


def parts_of(model: Any, decoder: Any) -> list[PreTrainedModel]:
    """Models in it, itself included, that run the decoder, alone or behind their encoders; the innermost is last."""
    parts = [part for part in lookup.modules_of(model) if isinstance(part, PreTrainedModel)]
    return [x for x in parts if x.config is decoder or x.config.get_text_config(decoder=True) is decoder]


class Reader:
    """Reads compressed layers' keys, in place of one implementation of attention.

    Attributes:
        base: the implementation's name.
        original: the function that stood under it; None: each module's own file has one.
        users: how many sessions want it.
    """

    def __init__(self, base: str) -> None:
        self.base, self.original, self.users = base, lookup.registered(base), 0
        self._own: dict[type, Callable[..., Any]] = {}
        self.function = reader_of(base, self.original, self.own, _pass_on)

    def own(self, kind: type) -> Callable[..., Any]:
        """The function that modules of this class would have called."""
        if self.original is not None:
            return self.original
        if kind not in self._own:
            function = lookup.eager_function(kind)
            if function is None:
                raise ValueError(f"{kind.__name__}: no eager attention function is found in its file")
            self._own[kind] = function
        return self._own[kind]


class _Passed(threading.local):
    """Modules whose attention was called in this thread with keys that carry no link, since it was last cleared."""

    def __init__(self) -> None:
        self.layers: set[tuple[int, Any]] = set()

    def note(self, module: nn.Module) -> None:
        self.layers.add((id(getattr(module, "config", None)), getattr(module, "layer_idx", None)))


passed = _Passed()
#: Sessions that compress, by the attention modules of their decoders.
_WATCHERS: "weakref.WeakValueDictionary[int, Session]" = weakref.WeakValueDictionary()


def _pass_on(module: nn.Module) -> None:
    """Attention was called with keys that carry no link: of an uncompressed layer, or behind the session's back."""
    passed.note(module)
    session = _WATCHERS.get(id(module))
    if session is not None and not session.running.forwards and not module.training:
        session.warn("loop", LOOP.format(type(session.base).__name__))


def watch(session: "Session") -> list[Callable[[], Any]]:
    """Tell the session of attention that is called outside of its model's forward pass; returns what undoes it."""
    modules = lookup.layers_of(session.base)
    _WATCHERS.update({id(module): session for module in modules})
    return [functools.partial(_WATCHERS.pop, id(module), None) for module in modules]


_LOCK = threading.Lock()
_READERS: dict[str, Reader] = {}


def attach(base: str, model: nn.Module) -> None:
    """Read what a compressed layer holds wherever models look up the attention of this name; `detach` ends it.

    Raises:
        ValueError: a model whose file looks the name up elsewhere.
    """
    modules = lookup.modules_of(model)
    for module in modules:
        if lookup.has_table_of_its_own(module, base):
            raise ValueError(
                f"attn_implementation={base!r} is {type(module).__name__}'s own: kvweave cannot read its keys"
            )
    with _LOCK:
        if base not in _READERS:
            _READERS[base] = Reader(base)
            lookup.register(base, _READERS[base].function)
        _READERS[base].users += 1
        if _READERS[base].original is None:  # known before a step is compiled
            for kind in {type(module) for module in modules}:
                if lookup.eager_function(kind) is not None:
                    _READERS[base].own(kind)


def detach(base: str) -> None:
    """One user less; the last one's leaving puts back what stood there."""
    with _LOCK:
        reader = _READERS[base]
        reader.users -= 1
        if reader.users:
            return
        del _READERS[base]
        if lookup.registered(base) is reader.function:  # nobody has put another there meanwhile
            lookup.register(base, reader.original)
