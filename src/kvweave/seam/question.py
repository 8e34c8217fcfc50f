"""A question about what is cached: asked on the cache itself, which is then as it was before."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvweave.seam.layer import CompressedLayer
from kvweave.seam.names import CACHE

if TYPE_CHECKING:
    from kvweave.seam.cache import CompressedCache


@contextmanager
def open_question(cache: "CompressedCache", ids: Tensor | None) -> Iterator[dict[str, Any]]:
    """Inside, what comes is appended whole; afterwards it is forgotten, whatever happened to the cache.

    Args:
        ids: int64 [batch, tokens], those of the question alone; or None.
    Yields:
        What to give `generate` for them; empty without.
    """
    _check(cache)
    cache.settle()
    cache.cut_unasked()
    inputs = {} if ids is None else _behind(cache, ids)
    put_back = remember(cache)
    cache.shared.turn.freeze()
    try:
        yield inputs
    finally:
        put_back()


def _check(cache: "CompressedCache") -> None:
    turn = cache.shared.turn
    if turn.prompt is None:
        raise ValueError(
            "question: the cache holds nothing yet: allowed is after a model has read the context into it"
        )
    if turn.declared is not None:
        raise ValueError(
            f"question: {turn.prompt.length} of the {turn.declared} tokens that were declared are there: allowed is "
            "when the context is complete"
        )
    if turn.on_request and turn.deferred is None:
        raise ValueError("question: the cache holds its context whole: allowed is after cache.compress()")


def _behind(cache: "CompressedCache", ids: Tensor) -> dict[str, Any]:
    """What to give `generate` so that these tokens come behind what the cache has read."""
    turn, length = cache.shared.turn, cache.get_seq_length()
    assert turn.prompt is not None
    rows = len(turn.prompt.valid)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] != rows or not ids.shape[1]:
        what = f"shape {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"question: ids of {what} are not allowed: allowed is a tensor [{rows}, tokens]")
    if turn.ids is None or turn.ids.shape[1] < length:
        raise ValueError(
            "question(ids): the tokens before the question are not known, since they came as embeddings or hold a "
            "reply: allowed is cache.question(), with the whole conversation given to the model inside"
        )
    before, valid = turn.ids[:, :length].to(ids.device), turn.prompt.valid[:, :length].to(ids.device)
    mask = torch.cat([valid, torch.ones_like(ids, dtype=torch.bool)], 1).long()
    return {"input_ids": torch.cat([before, ids], 1), "attention_mask": mask, CACHE: cache}


def remember(cache: "CompressedCache") -> Callable[[], None]:
    """Returns what makes the cache what it is now.

    Compressed layers replace their blocks, and write only behind the slots that a block speaks of: the blocks are
    kept as they are. Transformers' own layers may write in place, and hold little: they are copied.
    """
    shared, layers = cache.shared, list(cache.layers)
    turn = shared.turn
    kept = [(vars(x), dict(vars(x)) if isinstance(x, CompressedLayer) else _copied(vars(x))) for x in layers]
    shared.turn = copy.copy(turn)
    for layer in layers:
        if isinstance(layer, CompressedLayer):
            layer.prompt_cut = copy.copy(layer.prompt_cut)

    def put_back() -> None:
        shared.room, shared.turn = None, turn
        cache.layers = layers
        for attributes, before in kept:
            attributes.clear()
            attributes.update(before)

    return put_back


def _copied(x: Any) -> Any:
    """`x` with its tensors copied."""
    if isinstance(x, Tensor):
        return x.clone()
    if isinstance(x, dict):
        return {key: _copied(value) for key, value in x.items()}
    return x
