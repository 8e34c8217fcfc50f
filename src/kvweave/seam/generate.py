"""What only `generate` knows: where the prompt ends, which tokens end a reply, how many are to come.

A forward pass cannot tell a prompt's last piece. So `generate` is wrapped, on the instance, and leaves what it was
asked for with the thread that runs it. Two of its helpers are wrapped too: compiled steps wait for a deferred cut,
and drafts for the moment from which tokens come out of the compressed cache.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import DynamicCache

from kvweave.cut.stream import Stream, stream_of
from kvweave.prompt import visual_mask
from kvweave.seam.cache import CompressedCache
from kvweave.seam.filling import cache_for, tokens_before_the_cut
from kvweave.seam.request import Request
from kvweave.seam.resume import resume
from kvweave.seam.stream import check_request

if TYPE_CHECKING:
    from kvweave.seam.session import Session


def wrap(session: "Session", part: Any) -> list[Callable[[], None]]:
    """Let `part`, a model that generates, tell the session what it was asked for; returns what undoes it."""
    undo = [_replace(part, "generate", _telling(session, part.generate))]
    if hasattr(part, "get_compiled_call"):
        undo.append(_replace(part, "get_compiled_call", _compiling_from_the_cut(session, part)))
    if hasattr(part, "_get_candidate_generator"):
        undo.append(_replace(part, "_get_candidate_generator", _drafting_from_the_cut(session, part)))
    if hasattr(part, "init_continuous_batching"):
        undo.append(
            _replace(part, "init_continuous_batching", _refusing_pages(session, part.init_continuous_batching))
        )
    return undo


def _replace(part: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of the instance; returns what puts back what was there."""
    own = vars(part).get(name)
    setattr(part, name, value)
    return lambda: vars(part).pop(name) if own is None else setattr(part, name, own)


def _telling(session: "Session", generate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(generate)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        request, running = Request(session.base, args, kwargs), session.running
        check_request(request, _stream(session, request))
        if running.request is None:
            _check_kind(session, request)
            resume(session, request)
        planned = _with_room(session, request) if running.request is None else None
        if planned is not None:
            request.cache = planned
        visual = None if request.ids is None else visual_mask(session.base.config, request.ids, request.kwargs)
        try:
            with running.generating(request, visual, planned):
                return generate(*args, **request.arguments())
        finally:
            if planned is not None:
                planned.shared.room = None
                planned.settle()

    return wrapped


def _stream(session: "Session", request: Request) -> Stream | None:
    """What bounds the cache that a `generate` fills, or None."""
    if isinstance(request.cache, CompressedCache):
        return request.cache.shared.stream
    return None if session.method is None else stream_of(session.method, **session.bounds)[1]


def _check_kind(session: "Session", request: Request) -> None:
    """Caches that transformers would ask a package or a scheduler for, before it does; others are refused later."""
    kind = request.setting("cache_implementation")
    if session.method is not None and kind in ("quantized", "paged"):
        raise ValueError(
            f"cache_implementation={kind!r} cannot be compressed: allowed is none or 'dynamic'"
            + (", and kvweave.Quantized(method), which packs what stays" if kind == "quantized" else "")
        )


def _refusing_pages(session: "Session", init: Callable[..., Any]) -> Callable[..., Any]:
    """Continuous batching, which `generate_batch` and a server begin alike."""

    @functools.wraps(init)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if session.method is not None:
            raise ValueError(
                "continuous batching keeps keys and values in pages, which kvweave does not read: allowed is "
                "generate, with a padded batch"
            )
        return init(*args, **kwargs)

    return wrapped


def _with_room(session: "Session", request: Request) -> CompressedCache | None:
    """The cache of a `generate` whose decode steps are to be compiled, room asked for; None: they are not."""
    uncompiled = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size", "disable_compile")
    if request.setting("compile_config") is None or any(map(request.setting, uncompiled)):
        return None
    if request.setting("use_cache") is False:
        return None
    cache = request.cache
    if session.method is not None and (cache is None or type(cache) is DynamicCache):
        cache = cache_for(session, session.base, cache)
    if request.length is None or not isinstance(cache, CompressedCache):
        return None
    beams = request.setting("num_beams") or 1
    if beams > 1:
        raise ValueError(
            f"compile_config is not allowed with num_beams={beams}, which transformers does not compile: allowed is "
            "num_beams=1"
        )
    if "flash" in session.implementation:
        raise ValueError("compile_config is not allowed with flash attention: allowed is sdpa or eager")
    if cache.shared.method.redecode:
        raise ValueError("compile_config is not allowed with redecode=True: allowed is one of them")
    cache.shared.room = request.new_tokens()
    return cache


def _compiling_from_the_cut(session: "Session", part: Any) -> Callable[..., Any]:
    """Decode steps that come before a deferred cut run as they are: memory has no fixed place yet."""
    get = part.get_compiled_call

    @functools.wraps(get)
    def get_compiled_call(config: Any) -> Callable[..., Any]:
        compiled, planned = get(config), session.running.planned
        if planned is None:
            return compiled
        return lambda *args, **kwargs: (compiled if planned.fixed else part)(*args, **kwargs)

    return get_compiled_call


def _drafting_from_the_cut(session: "Session", part: Any) -> Callable[..., Any]:
    """Drafts of look-up and assistants, but none that would be verified against more than greedy decoding sees.

    The prompt's own pass reads the whole cache, and so do the `defer` tokens after it: drafts of later tokens wait.
    """
    get = part._get_candidate_generator

    @functools.wraps(get)
    def get_candidate_generator(*args: Any, **kwargs: Any) -> Any:
        candidates, request = get(*args, **kwargs), session.running.request
        if request is None or request.length is None:
            return candidates
        behind = tokens_before_the_cut(session, request.cache, request.length)
        if behind is None:
            return candidates
        draft, most = candidates.get_candidates, request.length + behind

        def get_candidates(input_ids: Tensor, *more: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
            ids, logits = draft(input_ids, *more, **settings)
            length = input_ids.shape[1]
            if length > most or ids.shape[1] <= most:
                return ids, logits
            return ids[:, :most], None if logits is None or length == most else logits[:, : most - length]

        candidates.get_candidates = get_candidates
        return candidates

    return get_candidate_generator
