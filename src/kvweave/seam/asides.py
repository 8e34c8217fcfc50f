"""The model goes on aside, and is taken back: drafts here, probes in `kvweave.seam.probing`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvweave.seam.cache import CompressedCache
from kvweave.seam.frame import Frame
from kvweave.seam.lookup import show_window_alone
from kvweave.seam.names import CACHE, Call


@torch.no_grad()
def aside(
    model: nn.Module,
    cache: CompressedCache,
    step: dict[str, Any],
    most: int = 1,
    *,
    ended: Callable[[], bool] = lambda: False,
    look: Callable[[], None] = lambda: None,
) -> int:
    """Let the model go on greedily behind what the cache holds, and take it back; inside `going_aside`.

    Args:
        step: inputs of the first forward pass; most: how many there are, each of the token that the one before gave.
        ended: no further one is wanted.
        look: called before it is all taken back.
    Returns:
        Columns that were there meanwhile.
    """
    before = cache.get_seq_length()
    with rewindable(cache):
        for _ in range(most):
            step = _following(step, model(**step).logits[:, -1:].argmax(-1))
            if ended():
                break
        look()
        columns = cache.get_seq_length() - before
        cache.crop(-columns)
    return columns


@contextmanager
def rewindable(cache: CompressedCache) -> Iterator[None]:
    """Layers of fixed size keep what they would drop, so that the cache may be cropped back."""
    record = getattr(cache, "activate_past_recording", None)
    if record is not None:
        record()
    undo = [show_window_alone(layer) for layer in cache.layers if hasattr(layer, "sliding_window")]
    try:
        yield
    finally:
        for put_back in undo:
            put_back()
        for layer in cache.layers:
            if getattr(layer, "record_past", False):
                layer.record_past = False


def _following(step: dict[str, Any], token: Tensor) -> dict[str, Any]:
    """The inputs of the forward pass after `step`, of the tokens [batch, 1]."""
    following = {name: value for name, value in step.items() if name != "inputs_embeds"} | {"input_ids": token}
    if "attention_mask" in step:
        mask = step["attention_mask"]
        following["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    if "position_ids" in step:
        following["position_ids"] = step["position_ids"][..., -1:] + 1
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in step:
            following[name] = torch.zeros_like(step[name])
    return following


# -------------------------------------------------------------------- drafts


def redecode(running: Frame, model: nn.Module, cache: CompressedCache, call: Call) -> None:
    """Draft the tokens that the cut waits for, make it, and take them back.

    It happens inside the forward pass of the first decoded token, so that `generate` goes on as if nothing had been:
    sampling, streamers, beams and processors of logits see no draft. The draft itself is greedy.
    """
    step = _first_token(call, cache)
    with running.going_aside():
        aside(model, cache, step, cache.shared.method.defer - cache.decoded)


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
