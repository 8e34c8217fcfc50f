"""What a forward pass's columns are: visual or text, real or padding, of the prompt or decoded."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvweave.prompt import Prompt, given_images, visual_mask, visual_token_ids
from kvweave.seam import names
from kvweave.seam.cache import CompressedCache
from kvweave.seam.guard import warn
from kvweave.seam.names import Call

if TYPE_CHECKING:
    from kvweave.seam.session import Session


def prompt_end(session: "Session", cache: CompressedCache, seen: int, new: int) -> int | None:
    """Logical length at which the prompt ends that a forward pass belongs to; None: it decodes."""
    running = session.running
    if running.aside:
        return None
    if running.request is not None and running.request.length is not None and running.own is cache:
        return running.request.length
    if cache.conversation.declared is not None:
        return cache.conversation.declared
    return seen + new if new > 1 or seen == 0 else None


def prompt_of(session: "Session", cache: CompressedCache, call: Call, seen: int, end: int) -> Prompt:
    """What is known of all columns once a forward pass has appended its own.

    Args:
        seen: columns before; end: where the prompt ends.
    """
    assert call.inputs is not None
    batch, new = call.inputs.shape[:2]
    device, prompt = call.inputs.device, cache.prompt
    visual = _visual(session, cache, call, seen, min(end, seen + new))
    mask = call.seen_columns(compiled=cache.is_compileable)
    valid = torch.ones(batch, new, dtype=torch.bool, device=device)
    if mask is not None:
        valid = mask[:, -new:].bool().to(device)
        told = seen >= end and session.running.prompted  # behind the prompt it says nothing new of the others
        if seen and prompt is not None and mask.shape[1] >= seen + new and not told:
            prompt = Prompt(prompt.visual[:, :seen], mask.bool().to(device)[:, :seen])
    if not seen or prompt is None:
        return Prompt(visual, valid)
    return prompt.cropped(seen).to(device).extended(visual, valid)


def _visual(session: "Session", cache: CompressedCache, call: Call, seen: int, end: int) -> Tensor:
    """Modalities, bool [batch, new]: as the user said, else from what the model was given."""
    assert call.inputs is not None
    batch, new = call.inputs.shape[:2]
    device, config = call.inputs.device, session.base.config
    told = session.visual
    if told is not None and told.shape[1] < end:
        raise ValueError(f"visual has {told.shape[1]} columns, and the prompt has {end}: allowed is as many")
    known = None if told is None else told[:, seen : seen + new]
    if known is None:
        known = visual_mask(config, call.ids, call.kwargs)
    if known is None and session.running.visual is not None:  # what the outer generate was given
        known = session.running.visual[:, seen : seen + new]
    if known is None:
        if cache.method.uses_modality and visual_token_ids(config) and not seen:
            warn(
                f"{cache.method.name} goes by modality, and embeddings alone do not tell which tokens are visual: "
                "all count as text unless kvweave.compress(..., visual=mask) says otherwise"
            )
        return torch.zeros(batch, new, dtype=torch.bool, device=device)
    images = given_images(call.kwargs) if cache.method.uses_modality else []
    if images and not bool(known.any()):
        warn(
            f"{cache.method.name} goes by modality, and no token was recognised as visual although "
            f"{', '.join(images)} was given: all count as text unless kvweave.compress(..., visual=mask) says "
            "otherwise"
        )
    known = known.to(device)
    if known.shape[0] != batch:  # beams and samples repeat the rows that generate was given
        if batch % known.shape[0]:
            raise ValueError(f"visual has {known.shape[0]} rows, which does not fit a batch of {batch}")
        known = known.repeat_interleave(batch // known.shape[0], 0)
    missing = known.new_zeros(batch, max(0, new - known.shape[1]))  # decoded tokens behind the prompt: text
    return torch.cat([known, missing], 1)[:, -new:]


def count_decoded(session: "Session", cache: CompressedCache, ids: Tensor | None, seen: int, new: int) -> None:
    """Tell the cache which of a forward pass's columns are decoded tokens of replies that have not ended."""
    end, prompt = cache.conversation.end or 0, cache.prompt
    first = max(seen, end)
    if prompt is None or first >= min(seen + new, end + cache.conversation.awaited):
        return
    live = prompt.valid[:, first : seen + new]
    ended = torch.zeros_like(live)
    if ids is not None:
        stops = torch.tensor(_stops(session), device=ids.device)
        ended = torch.isin(ids[:, first - seen :], stops).to(live.device)
    cache.count_decoded(first - end, live, ended)


def _stops(session: "Session") -> list[int]:
    """Tokens that end a reply, as `generate` was told or the model's settings say."""
    request = session.running.request
    settings: Any = getattr(session.base, "generation_config", None)
    return request.stops if request is not None else names.listed(getattr(settings, "eos_token_id", None))
