"""That a model's rows decode in a pool as they do alone: found out by letting it do both once, before it serves."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvweave.methods.full import Full
from kvweave.prompt import visual_token_ids
from kvweave.seam.row_pool import RowPool, refusal
from kvweave.serve.engine.reading import Reading, read_on, read_prompt

_LENGTHS, _STEPS = (13, 7), 2
#: How far logits may lie apart, as root mean square over their spread. Half precision rounds by that much; rows that
#: read one entry less than they hold, or each other's, lie further apart.
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


def prove(model: Any, tokenizer: Any) -> Proof:
    """Decode two short texts of different lengths, alone and as rows of a pool.

    Args:
        model: to which kvweave is attached.
    """
    words = _words(model, tokenizer)
    readings = []
    for length in _LENGTHS:
        ids = torch.tensor([[words[n % len(words)] for n in range(length)]])
        readings.append(read_prompt(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, Full()))
    token_bytes = max(1, readings[0].nbytes // _LENGTHS[0])
    why = refusal(model, readings[0].cache)
    if not why and any(reading.position is None for reading in readings):
        why = "the model is given no positions"
    return Proof(why or _differs(model, readings, words), token_bytes, len(readings[0].cache.layers))


def _differs(model: Any, readings: list[Reading], words: list[int]) -> str:
    """Why rows of a pool do not decode as they do alone; empty: they do."""
    pool = RowPool(len(readings[0].cache.layers), len(readings))
    alone = []
    for reading in readings:
        assert reading.position is not None
        pool.admit(reading.cache, _STEPS, reading.position)
        said = reading.fork().cache
        at: Tensor | None = reading.position
        for n in range(_STEPS):
            step = read_on(model, said, [words[-1 - n]], at)
            at = step.position
        alone.append(step.logits)
    try:
        for n in range(_STEPS):
            together = pool.decode(model, [words[-1 - n]] * len(readings))
    except Exception as error:  # whatever a model makes of a mask that is not its own
        return f"its forward pass does not take rows of a pool ({type(error).__name__})"
    near = _NEAR.get(together.dtype, 1e-3)
    for row, own in zip(together.float(), torch.stack(alone).float(), strict=True):
        if not float((row - own).square().mean().sqrt() / own.std().clamp(min=1e-6)) <= near:
            return "its rows decode otherwise in a pool than alone"
    return ""


def _words(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that are neither special nor stand for images."""
    out = {*tokenizer.all_special_ids, *visual_token_ids(model.config)}
    found = [token for token in range(min(len(tokenizer), 4096)) if token not in out]
    return found[-64:]
