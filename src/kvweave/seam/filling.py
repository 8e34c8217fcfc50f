"""The cache that a forward pass fills, and what it is told before: the columns to come, where the prompt ends."""

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvweave.methods.base import Method
from kvweave.seam import guard, names, reader
from kvweave.seam.cache import CompressedCache
from kvweave.seam.columns import count_decoded, prompt_end, prompt_of
from kvweave.seam.draft import redecode
from kvweave.seam.layer import CompressedLayer
from kvweave.seam.names import Call

if TYPE_CHECKING:
    from kvweave.seam.session import Session


def cache_of(session: "Session", part: nn.Module, call: Call) -> CompressedCache | None:
    """The compressed cache that a forward pass fills; None if it should run as it is."""
    if isinstance(call.cache, CompressedCache):
        check_bias(call.cache.method, session.implementation)
        return call.cache
    if session.method is None:
        return None
    if not call.uses_cache(part, session.base.config.get_text_config(decoder=True)):
        session.warn("use_cache", guard.NO_CACHE)
        return None
    return cache_for(session, part, call.cache)


def cache_for(session: "Session", part: Any, given: Any = None) -> CompressedCache:
    """The cache that a prompt of `part` fills: the caller's own if there is one, made over in place."""
    assert session.method is not None
    if given is not None:
        if type(given) is not DynamicCache or getattr(given, "offloading", False):
            kind = "offloaded " if getattr(given, "offloading", False) else ""
            raise ValueError(
                f"{names.CACHE}={kind}{type(given).__name__} cannot be compressed: allowed is none, an empty "
                "DynamicCache or a kvweave.CompressedCache"
            )
        if tokens := names.tokens_in(given):
            raise ValueError(
                f"{names.CACHE}=DynamicCache already holds {tokens} tokens that were not "
                "compressed: allowed is none, an empty DynamicCache or a kvweave.CompressedCache"
            )
    cache = CompressedCache(part.config, session.method, trace=session.trace)
    return cache if given is None else _in_place(given, cache)


def _in_place(given: DynamicCache, cache: CompressedCache) -> CompressedCache:
    """The caller's own object becomes `cache`: whoever holds it reads on where the model left it."""
    cache.stand_in_for(given)
    given.__class__ = CompressedCache
    vars(given).update(vars(cache))
    return given


def check_bias(method: Method, implementation: str) -> None:
    """Flash attention takes no bias on its logits."""
    if method.biases_logits and "flash" in implementation:
        why = (
            "mass_bias=True"
            if hasattr(method, "mass_bias")
            else f"method={method.name}, which adds biases to logits,"
        )
        raise ValueError(f"{why} is not allowed with flash attention: allowed is sdpa or eager")


def tokens_before_the_cut(session: "Session", cache: Any, length: int) -> int | None:
    """How many decoded tokens will read the whole prompt of `length` that comes next; None: it stays whole."""
    method = session.method
    if isinstance(cache, CompressedCache):
        method = None if cache.conversation.frozen or cache.conversation.held else cache.method
    if method is None or method.keeps_all(length):
        return None
    return 0 if method.redecode or session.probed else method.defer


def prepare(session: "Session", part: nn.Module, cache: CompressedCache, call: Call) -> None:
    """Tell the cache what the forward pass's columns are, and where the prompt ends."""
    running, talk = session.running, cache.conversation
    cache.cut_if_due()  # candidates of assisted decoding have been taken back by now
    seen, new = cache.get_seq_length(), call.new
    end = prompt_end(session, cache, seen, new)
    prompted = end is not None and seen < end
    if session.probed and prompted:
        talk.held = True
    if talk.held and prompted:
        talk.last_position = call.last_position()
    cache.session = weakref.ref(session)
    redecodes = talk.method.redecode and not talk.held and cache.waits
    if redecodes and not prompted and not running.aside:
        redecode(running, part, cache, call)
        running.cache = cache
    running.before = guard.held(cache)
    if not torch.compiler.is_compiling():
        reader.passed.layers.clear()
    talk.attached = True
    talk.spread_over(session.base)
    talk.prompt = prompt_of(session, cache, call, seen, seen + new if end is None else end)
    ended = talk.end if end is None else end  # of another cache than the one that `generate` was given
    talk.look(
        decoding=running.prompted and ended is not None and seen >= ended,
        masked=call.mask is not None and not (isinstance(call.mask, Tensor) and call.mask.dim() == 2),
    )
    if not talk.frozen and end is not None:
        talk.end = end
        if prompted:
            talk.counted = None
    if talk.declared is not None and seen + new >= talk.declared:
        talk.declared = None
    if talk.awaited and talk.end is not None:
        count_decoded(session, cache, call.ids, seen, new)


def note_rotary(session: "Session", module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook before a module's forward pass: the rotary tables, for methods that turn keys."""
    cache, place = session.running.cache, module.layer_idx
    if cache is None or not cache.conversation.turns_keys or place >= len(cache.layers):
        return
    layer = cache.layers[place]
    if not isinstance(layer, CompressedLayer) or layer.index or not getattr(module, "is_causal", True):
        return  # all compressed layers are turned by the same tables; a vision tower has its own
    tables = names.rotary_tables(kwargs, session.base.config.get_text_config(decoder=True))
    if tables is not None:
        cache.conversation.append_rotary(*tables, layer.seen, interleaved=names.interleaved(module))
