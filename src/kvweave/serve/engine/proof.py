"""That a model's rows decode in a pool as they do alone: found out by letting it do both once, before it serves."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvweave.methods.base import Method
from kvweave.methods.full import Full
from kvweave.ops.separation import share_of_way
from kvweave.prompt import visual_token_ids
from kvweave.seam.row_pool import RowPool, refusal
from kvweave.serve.engine.reading import Reading, read_on, read_prompt

_LENGTHS, _STEPS = (13, 7), 2
#: How far logits may lie apart, as root mean square over their spread. Half precision rounds by that much; rows that
#: read one entry less than they hold, or each other's, lie further apart. An error of one position may come to less:
#: so they must also lie nearer to what is right than to what that makes of it.
_NEAR = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


@dataclass(frozen=True)
class Proof:
    """What was found out.

    Attributes:
        alone: why no reply of this model decodes together with others; empty: they may.
        token_bytes: bytes of one token's keys and values, over all layers.
        layers: of its cache.
    """

    alone: str
    token_bytes: int
    layers: int

    @classmethod
    def of(cls, whole: Reading, alone: str) -> "Proof":
        """What a text tells that was read and not cut."""
        return cls(alone, max(1, whole.nbytes // whole.length), len(whole.cache.layers))


def prove(model: Any, tokenizer: Any) -> Proof:
    """Decode two short texts of different lengths, alone and as rows of a pool.

    Args:
        model: to which kvweave is attached.
    """
    words = _words(model, tokenizer)
    readings = [text_reading(model, tokenizer, length) for length in _LENGTHS]
    why = refusal(model, readings[0].cache)
    if not why and any(reading.position is None for reading in readings):
        why = "the model is given no positions"
    return Proof.of(readings[0], why or _differs(model, readings, words))


def text_reading(model: Any, tokenizer: Any, length: int, method: Method | None = None) -> Reading:
    """What a model has read of a text of so many tokens; all of it, where there is no method."""
    words = _words(model, tokenizer)
    ids = torch.tensor([[words[n % len(words)] for n in range(length)]])
    return read_prompt(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, method or Full())


def _differs(model: Any, readings: list[Reading], words: list[int]) -> str:
    """Why rows of a pool do not decode as they do alone; empty: they do."""
    pool = RowPool(len(readings[0].cache.layers), len(readings))
    for reading in readings:
        assert reading.position is not None
        pool.admit(reading.cache, _STEPS, reading.position)
    alone = [_decoded_alone(model, reading, words, 0) for reading in readings]
    try:
        for n in range(_STEPS):
            together = pool.decode(model, [words[-1 - n]] * len(readings))
    except Exception as error:  # whatever a model makes of a mask that is not its own
        return f"its forward pass does not take rows of a pool ({type(error).__name__})"
    near = _NEAR.get(together.dtype, 1e-3)
    for row, own, reading in zip(together, alone, readings, strict=True):
        shifted = [_decoded_alone(model, reading, words, shift) for shift in (-1, 1)]
        if not _apart(row, own) <= near or any(share_of_way(row, own, off) >= 0.5 for off in shifted):
            return "its rows decode otherwise in a pool than alone"
    return ""


def _decoded_alone(model: Any, reading: Reading, words: list[int], shift: int) -> Tensor:
    """Logits [vocabulary] after some tokens, at positions that are `shift` too far."""
    cache, at = reading.fork().cache, reading.position
    assert at is not None
    at = at + shift
    for n in range(_STEPS):
        step = read_on(model, cache, [words[-1 - n]], at)
        at = step.position
    return step.logits


def _apart(logits: Tensor, right: Tensor) -> float:
    """How far logits [vocabulary] lie apart, as root mean square over their spread."""
    right = right.float()
    return float((logits.float() - right).square().mean().sqrt() / right.std().clamp(min=1e-6))


def _words(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that are neither special nor stand for images."""
    out = {*tokenizer.all_special_ids, *visual_token_ids(model.config)}
    found = [token for token in range(min(len(tokenizer), 4096)) if token not in out]
    return found[-64:]
