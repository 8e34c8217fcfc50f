"""The cache that a forward pass fills: what it is told before, as where the prompt ends, and what follows after."""

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvweave.methods.base import Method
from kvweave.prompt import Prompt, given_images, visual_mask, visual_token_ids
from kvweave.seam import guard, latents, lookup, names, reader
from kvweave.seam.asides import redecode
from kvweave.seam.cache import CompressedCache
from kvweave.seam.foresight import foresee
from kvweave.seam.layer import CompressedLayer
from kvweave.seam.names import Call
from kvweave.seam.probing import answer_if_due
from kvweave.seam.profiles import check_profiles
from kvweave.seam.stream import begin_stream, may_be_narrow
from kvweave.seam.turn import State

if TYPE_CHECKING:
    from kvweave.seam.session import Session


def cache_of(session: "Session", part: nn.Module, call: Call) -> CompressedCache | None:
    """The compressed cache that a forward pass fills; None if it should run as it is."""
    if isinstance(call.cache, CompressedCache):
        if call.cache.shared.turn.prompt is None:
            _check_layers(call.cache, session.base, part)
            call.cache.work_on(session.base)
            check_profiles(call.cache.shared.method, session.base)
            latents.check(call.cache.shared.method, session.base)
        check_bias(call.cache.shared.method, session.implementation)
        return call.cache
    if session.method is None:
        return None
    if not call.uses_cache(part, session.base.config.get_text_config(decoder=True)):
        session.warn("use_cache", guard.NO_CACHE)
        return None
    return cache_for(session, part, call.cache)


def _check_layers(cache: CompressedCache, *models: Any) -> None:
    """Refuse a cache of another model, as far as it has fewer layers or more."""
    counts = {len(DynamicCache(config=model.config.get_text_config(decoder=True)).layers) for model in models}
    if len(cache.layers) not in counts:
        raise ValueError(
            f"{names.CACHE} has {len(cache.layers)} layers, the model {max(counts)}: allowed is a "
            "kvweave.CompressedCache(model.config, method) of this model"
        )


def cache_for(session: "Session", part: Any, own: Any = None) -> CompressedCache:
    """The cache that a prompt of `part` fills: the caller's own if there is one, made over in place."""
    assert session.method is not None
    if own is not None:
        if type(own) is not DynamicCache or getattr(own, "offloading", False):
            kind = "offloaded " if getattr(own, "offloading", False) else ""
            raise ValueError(
                f"{names.CACHE}={kind}{type(own).__name__} cannot be compressed: allowed is none, an empty "
                "DynamicCache or a kvweave.CompressedCache"
            )
        if tokens := max((x.get_seq_length() for x in own.layers if hasattr(x, "get_seq_length")), default=0):
            raise ValueError(
                f"{names.CACHE}=DynamicCache already holds {tokens} tokens that were not "
                "compressed: allowed is none, an empty DynamicCache or a kvweave.CompressedCache"
            )
    cache = CompressedCache(part.config, session.method, trace=session.trace, **session.bounds)
    if cache.shared.method is not session.working:
        cache.shared.go_by(session.working or session.method)
    return cache if own is None else _in_place(own, cache)


def _in_place(own: DynamicCache, cache: CompressedCache) -> CompressedCache:
    """The caller's own object becomes `cache`: whoever holds it reads on where the model left it."""
    cache.stand_in_for(own)
    own.__class__ = CompressedCache
    vars(own).update(vars(cache))
    return own


def check_bias(method: Method, implementation: str) -> None:
    """Flash attention takes no bias on its logits."""
    if "flash" in implementation and method.biases_logits:
        why = (
            "mass_bias=True"
            if hasattr(method, "mass_bias")
            else f"method={method.name}, which adds biases to logits,"
        )
        raise ValueError(f"{why} is not allowed with flash attention: allowed is sdpa or eager")


def tokens_before_the_cut(session: "Session", cache: Any, length: int) -> int | None:
    """How many decoded tokens will read the whole prompt of `length` that comes next; None: it stays whole."""
    method = session.working
    if isinstance(cache, CompressedCache):
        if cache.prompt is None:
            cache.work_on(session.base)
        method = None if cache.shared.turn.frozen or cache.shared.turn.on_request else cache.shared.method
    if method is None or method.keeps_all(length):
        return None
    return 0 if method.redecode or session.asks(method.needs) else method.defer


def begin(session: "Session", part: nn.Module, call: Call) -> CompressedCache | None:
    """A forward pass begins: the compressed cache that it fills, told what comes; None if it should run as it is."""
    running = session.running
    cache = cache_of(session, part, call)
    running.cache, running.new, running.fixed = None, call.new, False
    if cache is None or call.inputs is None:
        return None
    running.cache = cache
    if running.request is not None and running.own is None:
        running.own = cache
    if running.request is None or running.own is cache:  # not the other branch of classifier-free guidance
        session.cache = cache
    if any(isinstance(layer, CompressedLayer) for layer in cache.layers):
        prepare(session, part, cache, call)
    return cache


def prepare(session: "Session", part: nn.Module, cache: CompressedCache, call: Call) -> None:
    """Tell the cache what the forward pass's columns are, and where the prompt ends.

    Raises:
        ValueError: a batch of other rows than the cache holds.
    """
    assert call.inputs is not None
    running, shared, turn = session.running, cache.shared, cache.shared.turn
    if session.expansions:
        latents.introduce(session.expansions, cache)
    running.fixed = call.new == 1 and cache.fixed
    if running.fixed:  # buffers take the token in, and nothing else changes
        shared.attached = True
        turn.trust_room(running.prompted)
        return
    if call.new != 1:
        cache.settle()
    if turn.state is State.WAITING:
        cache.cut_if_due()  # candidates of assisted decoding have been taken back by now
    past, new = cache.get_seq_length(), call.new
    if past and turn.prompt is not None and len(turn.prompt.valid) != len(call.inputs):
        rows, held = len(call.inputs), len(turn.prompt.valid)
        raise ValueError(f"{rows} rows follow a cache of {held}: allowed is as many, row for row")
    running.before = past
    end = prompt_end(session, cache, past, new)
    prompted = end is not None and past < end
    if shared.stream is not None:
        begin_stream(session, shared.stream, past + new)
    elif prompted and session.asks(shared.needs):
        turn.hold()
    if (turn.on_request or prompted) and not running.aside and shared.stream is None:
        turn.append_ids(call.ids, past)
    cache.session = weakref.ref(session)
    drafts = turn.state is State.WAITING and shared.method.redecode and not turn.on_request
    if drafts and not prompted and not running.aside:
        redecode(running, part, cache, call)
        running.cache, running.new = cache, new
    if not torch.compiler.is_compiling():
        reader.passed.layers.clear()
    shared.attached, shared.filled = True, False
    if session.tensor_parallel:
        shared.spread_over(session.base)
    prompt = prompt_of(session, cache, call, past, past + new if end is None else end)
    asks = shared.stream is not None and shared.stream.asks and not running.aside
    if asks or (shared.may_replay and prompted):
        turn.places.note_last(call.last_position())
    turn.begin(
        prompt,
        end,
        past,
        generating=running.prompted,
        masked=call.mask is not None and not (isinstance(call.mask, Tensor) and call.mask.dim() == 2),
        narrow=shared.stream is not None and may_be_narrow(session, cache, new),
    )
    if (turn.on_request or shared.method.defer) and turn.end is not None:
        count_decoded(session, cache, call.ids, past, new)


def end(session: "Session", part: nn.Module, cache: CompressedCache, kwargs: dict[str, Any], out: Any) -> None:
    """It has ended, and returned `out`; None: it raised. What is due is cut."""
    running = session.running
    cache.shared.attached = False
    if out is None or running.fixed:
        return  # or it changed tensors alone
    guard.check(session, cache, kwargs, out)
    _note_what_was_read(session, cache)
    if cache.target is not None and not running.aside:
        foresee(session, part, cache, kwargs, getattr(out, "logits", None))
    if cache.finish_pass(running.new) and not running.aside:
        answer_if_due(session, cache)


def _note_what_was_read(session: "Session", cache: CompressedCache) -> None:
    """What the pass told of tokens and positions; nothing may grow with a stream, which has no end."""
    running, turn = session.running, cache.shared.turn
    embeddings, hidden = running.embeddings, running.hidden
    running.embeddings = running.hidden = None
    if turn.prompt is None:
        return
    prompted = turn.end is None or running.before < turn.end
    if prompted and cache.shared.may_replay and not turn.is_cut and not running.aside:
        needs = cache.shared.needs
        embeddings, hidden = embeddings if needs.images else None, hidden if needs.surprise else None
        turn.append_read(embeddings, hidden, running.before)
    like = turn.prompt.valid
    if session.keepers and running.new != 1:
        turn.places.note_ahead(lookup.offsets(session.keepers), len(like))
    if cache.shared.stream is None and (running.new > 1 or not running.before):
        turn.places.note(running.positions, running.before, running.new, like)


# -------------------------------------------------------------------- what its columns are


def prompt_end(session: "Session", cache: CompressedCache, past: int, new: int) -> int | None:
    """Logical length at which the prompt ends that a forward pass belongs to; None: it decodes."""
    running = session.running
    if running.aside:
        return None
    if running.request is not None and running.request.length is not None and running.own is cache:
        return running.request.length
    if cache.shared.turn.declared is not None:
        return cache.shared.turn.declared
    return past + new if new > 1 or past == 0 else None


def prompt_of(session: "Session", cache: CompressedCache, call: Call, past: int, end: int) -> Prompt:
    """What is known of all columns once a forward pass has appended its own.

    Args:
        past: columns before; end: where the prompt ends.
    """
    assert call.inputs is not None
    batch, new = call.inputs.shape[:2]
    device, prompt = call.inputs.device, cache.shared.turn.prompt
    visual = _visual(session, cache, call, past, min(end, past + new))
    mask = None if call.mask is None else call.seen_columns(compiled=cache.is_compileable)
    valid = torch.ones(batch, new, dtype=torch.bool, device=device)
    if mask is not None:
        valid = mask[:, -new:].bool().to(device)
        decoding = past >= end and session.running.prompted  # behind the prompt it says nothing new of the others
        if past and prompt is not None and mask.shape[1] >= past + new and not decoding:
            prompt = Prompt(prompt.visual[:, :past], mask.bool().to(device)[:, :past])
    if not past or prompt is None:
        return Prompt(visual, valid)
    return prompt.extended(visual, valid, past)


def _visual(session: "Session", cache: CompressedCache, call: Call, past: int, end: int) -> Tensor:
    """Modalities, bool [batch, new]: as the user said, else from what the model was given."""
    assert call.inputs is not None
    batch, new = call.inputs.shape[:2]
    device, config, method = call.inputs.device, session.base.config, cache.shared.method
    if session.running.aside:  # probes and drafts are text
        return torch.zeros(batch, new, dtype=torch.bool, device=device)
    users = session.visual
    if users is not None and users.shape[1] < end:
        raise ValueError(f"visual has {users.shape[1]} columns, and the prompt has {end}: allowed is as many")
    marks = None if users is None else users[:, past : past + new]
    if marks is None:
        marks = visual_mask(config, call.ids, call.kwargs)
    if marks is None and session.running.visual is not None:  # what the outer generate was given
        marks = session.running.visual[:, past : past + new]
    if marks is None:
        if not past and method.uses_modality and visual_token_ids(config):
            guard.warn(
                f"{method.name} goes by modality, and embeddings alone do not tell which tokens are visual: "
                "all count as text unless kvweave.compress(..., visual=mask) says otherwise"
            )
        return torch.zeros(batch, new, dtype=torch.bool, device=device)
    images = given_images(call.kwargs) if method.uses_modality else []
    if images and not bool(marks.any()):
        guard.warn(
            f"{method.name} goes by modality, and no token was recognised as visual although "
            f"{', '.join(images)} was given: all count as text unless kvweave.compress(..., visual=mask) says "
            "otherwise"
        )
    marks = marks.to(device)
    if marks.shape[0] != batch:  # beams and samples repeat the rows that generate was given
        if batch % marks.shape[0]:
            raise ValueError(f"visual has {marks.shape[0]} rows, which does not fit a batch of {batch}")
        marks = marks.repeat_interleave(batch // marks.shape[0], 0)
    missing = marks.new_zeros(batch, max(0, new - marks.shape[1]))  # decoded tokens behind the prompt: text
    return torch.cat([marks, missing], 1)[:, -new:]


def count_decoded(session: "Session", cache: CompressedCache, ids: Tensor | None, past: int, new: int) -> None:
    """Tell the cache which of a forward pass's columns are decoded tokens of replies that have not ended."""
    end, prompt = cache.shared.turn.end or 0, cache.prompt
    first = max(past, end)
    if prompt is None or first >= min(past + new, end + cache.shared.awaited):
        return
    live = prompt.valid[:, first : past + new]
    ended = torch.zeros_like(live)
    if ids is not None:
        stops = torch.tensor(_stops(session), device=ids.device)
        ended = torch.isin(ids[:, first - past :], stops).to(live.device)
    cache.shared.turn.count(first - end, live, ended, cache.shared.awaited)


def _stops(session: "Session") -> list[int]:
    """Tokens that end a reply, as `generate` was users or the model's settings say."""
    request = session.running.request
    settings: Any = getattr(session.base, "generation_config", None)
    return request.stops if request is not None else names.listed(getattr(settings, "eos_token_id", None))
