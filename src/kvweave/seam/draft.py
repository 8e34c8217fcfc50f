"""Drafts: with `redecode`, the tokens that a deferred cut waits for are drafted, and taken back once it is made."""

from typing import Any

import torch
from torch import Tensor, nn

from kvweave.seam.asides import rewindable
from kvweave.seam.cache import CompressedCache
from kvweave.seam.frame import Frame
from kvweave.seam.names import CACHE, Call


def redecode(running: Frame, model: nn.Module, cache: CompressedCache, call: Call) -> None:
    """Draft the tokens that the cut waits for, make it, and take them back.

    It happens inside the forward pass of the first decoded token, so that `generate` goes on as if nothing had been:
    sampling, streamers, beams and processors of logits see no draft. The draft itself is greedy.
    """
    missing = cache.method.defer - cache.decoded
    step = _first_token(call, cache)
    with running.going_aside(), torch.no_grad(), rewindable(cache):
        for _ in range(missing):
            step = _next_token(step, model(**step).logits[:, -1:].argmax(-1))
        cache.crop(-missing)


def _first_token(call: Call, cache: CompressedCache) -> dict[str, Any]:
    """The inputs of a forward pass, of its first token alone."""
    step = {CACHE: cache, "use_cache": True, "return_dict": True}
    if call.mask is not None:
        if not isinstance(call.mask, Tensor) or call.mask.dim() != 2:
            raise ValueError("redecode=True is not allowed with an attention mask of one's own: allowed is a 2-D one")
        step["attention_mask"] = call.mask[:, : call.mask.shape[1] - call.new + 1]
    for name in ("input_ids", "inputs_embeds"):
        if call.kwargs.get(name) is not None:
            step[name] = call.kwargs[name][:, :1]
    for name in ("position_ids", "token_type_ids", "mm_token_type_ids"):
        if call.kwargs.get(name) is not None:
            step[name] = call.kwargs[name][..., :1]
    return step


def _next_token(step: dict[str, Any], token: Tensor) -> dict[str, Any]:
    """The inputs of the forward pass after `step`, of the tokens [batch, 1]."""
    following = {name: value for name, value in step.items() if name != "inputs_embeds"} | {"input_ids": token}
    if "attention_mask" in step:
        mask = step["attention_mask"]
        following["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    if "position_ids" in step:
        following["position_ids"] = step["position_ids"] + 1
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in step:
            following[name] = torch.zeros_like(step[name])
    return following
