"""A compressed cache as a stock engine takes it: as many slots everywhere, and positions that end where they do.

An engine with paged attention knows one length, of all layers and heads, and counts positions by it. Rotary attention
sees no more of two positions than their difference. So where every layer and head has kept `slots` entries, and the
next token's position is `next_position`, each key is turned by slots - next_position positions, the same for all axes
of a position: a request of so many tokens, whose keys and values are these, is the compressed one.
"""

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from kvweave.memory import saved
from kvweave.seam.layer import CompressedLayer
from kvweave.seam.positions import rotations
from kvweave.seam.saved import fingerprint

if TYPE_CHECKING:
    from kvweave.seam.cache import CompressedCache

FORMAT = "kvweave context 1"
#: The one text of the file's header. One, because several would come in no order that is always the same.
HEADER = "kvweave"


def export(
    cache: "CompressedCache",
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    *,
    row: int | None = None,
    first_token: int | None = None,
) -> dict[str, Any]:
    """Write one row of `cache`, which belongs to `model`; see `CompressedCache.export`."""
    if first_token is not None and type(first_token) is not int:
        raise ValueError(f"first_token={first_token!r} is not allowed: allowed is a token's id, or None")
    if cache.shared.stream is not None:
        raise ValueError(
            f"export is not allowed with every={cache.shared.stream.every}: allowed is a cache without it"
        )
    number = _row(cache, row)
    valid = _settled(cache)
    entries = [_entries(layer, place, number, valid) for place, layer in enumerate(cache.layers)]
    slots = _slots(entries)
    positions = cache.shared.turn.places.of(valid.shape[1])
    if positions is None:
        raise ValueError("export: the position of the next token is not known; allowed is a cache filled by a model")
    following = int(positions[number].max()) + 1
    tensors: dict[str, Tensor] = {}
    for place, ((keys, values), rotation) in enumerate(zip(entries, rotations(model), strict=True)):
        turned = keys if rotation is None else rotation.turned(keys, slots - following).to(keys.dtype)
        tensors |= {f"k{place}": turned.contiguous(), f"v{place}": values.contiguous()}
    facts = {
        "format": FORMAT,
        "slots": slots,
        "next_position": following,
        "first_token": first_token,
        "tokens": int(valid[number].sum()),
        "layers": len(entries),
        "method": cache.method.spelling(),
        "model": mark(model),
    }
    text, goal = json.dumps(facts | {"digest": saved.NO_DIGEST}, sort_keys=True), Path(path)
    named = goal.is_dir()
    unnamed = goal / f".{uuid.uuid4().hex}" if named else goal
    digest = saved.write(unnamed, tensors, {HEADER: text})
    if named:
        os.replace(unnamed, goal / f"{digest}.safetensors")
    return facts | {"digest": digest}


def mark(model: PreTrainedModel) -> str:
    """What tells the model from others, in 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(fingerprint(model), sort_keys=True).encode()).hexdigest()


def _row(cache: "CompressedCache", row: int | None) -> int:
    if cache.prompt is None:
        raise ValueError("export: nothing is cached yet; allowed is a cache that a model has filled")
    rows = len(cache.prompt.valid)
    if row is None and rows > 1:
        raise ValueError(f"export: the cache holds a batch of {rows} rows; allowed is row=0 to row={rows - 1}")
    if row is not None and (not isinstance(row, int) or isinstance(row, bool) or not 0 <= row < rows):
        raise ValueError(f"row={row!r} is not allowed: allowed is an int of 0 to {rows - 1}")
    return row or 0


def _settled(cache: "CompressedCache") -> Tensor:
    """Real tokens among all columns, bool [batch, columns], of a cache of which no part is still to come."""
    turn, length = cache.shared.turn, cache.get_seq_length()
    ours = [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]
    end = turn.end if turn.declared is None else turn.declared
    if any(layer.unread or layer.prompt_cut.pending for layer in ours):
        raise ValueError("export: a forward pass is filling the cache; allowed is between two of them")
    if end is not None and length < end:
        raise ValueError(f"export: {length} of the prompt's {end} tokens are cached; allowed is a whole prompt")
    if cache.waits:
        raise ValueError(
            f"export: the cut of {cache.method.name} waits; allowed is after cache.cut_waiting(), cache.compress() "
            f"or defer={cache.method.defer} decoded tokens"
        )
    if cache.shared.heads.size > 1:
        raise ValueError(
            "export: the model is tensor parallel; allowed is a cache whose heads are all in one process"
        )
    assert cache.prompt is not None
    valid = cache.prompt.valid
    return F.pad(valid, (0, int(length) - valid.shape[1]), value=True)  # decoded into fixed buffers


def _entries(layer: Any, place: int, row: int, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [kv_heads, slots, dim] of a layer's filled slots; those of padding are left out.

    Args:
        valid: bool [batch, columns], real tokens.
    """
    if not isinstance(layer, CompressedLayer) or layer.why:
        why = getattr(layer, "why", "") or type(layer).__name__
        raise ValueError(f"export: layer {place} is not compressed ({why}); allowed is full attention in every layer")
    if layer.block is None:
        raise ValueError(f"export: layer {place} holds nothing; allowed is a cache that the whole model has filled")
    slots = layer.block.as_slots(valid).rows(torch.tensor([row]))
    filled = (slots.all_positions() >= 0) & ~slots.stands_for_others_than(valid[row : row + 1])
    if slots.bias is not None and bool(slots.bias[filled].any()):
        raise ValueError(
            f"export: entries of layer {place} add a bias to their logits, which no stock engine can; allowed is a "
            "method without one (mass_bias=false, where it is an option)"
        )
    counts = filled[0].sum(-1).tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"export: KV heads of layer {place} keep {min(counts)} to {max(counts)} entries; allowed is a method "
            "that keeps as many in every head"
        )
    keys, values = (x[filled].unflatten(0, (len(counts), counts[0])) for x in (slots.keys, slots.values))
    return keys, values


def _slots(entries: list[tuple[Tensor, Tensor]]) -> int:
    """How many every layer has."""
    counts = [keys.shape[1] for keys, _ in entries]
    if len(set(counts)) > 1:
        raise ValueError(
            f"export: layers keep {min(counts)} to {max(counts)} entries; allowed is a method that keeps as many "
            "in every layer"
        )
    return counts[0]
