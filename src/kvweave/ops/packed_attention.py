"""Attention of one decoded token over packed slots, a block at a time: full precision of the whole is never made.

A number is code * scale + zero. Scales go into the query (keys) and into the probabilities (values), so that codes
are multiplied as they are; zeros are a product of their own, a group's worth at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvweave.ops.quantize import Packed

_NUMBERS = 1 << 19  # codes at a time


def attend_packed(
    queries: Tensor,
    keys: Packed,
    values: Packed,
    young: tuple[Tensor, Tensor],
    bias: Tensor | None,
    scaling: float,
) -> Tensor:
    """Attention of one token over slots in few bits, and young ones in full precision behind them.

    Args:
        queries: [batch, kv_heads, group, dim].
        keys: of [batch, kv_heads, groups, tokens, dim], one scale for a channel of a group of tokens.
        values: of [batch, kv_heads, slots, parts, channels], one scale for a part of a token's channels.
        young: keys and values [batch, kv_heads, young, dim]; may be none.
        bias: [batch, kv_heads, slots + young], added to the logits, or None.
        scaling: of the logits.
    Returns:
        [batch, kv_heads, group, value_dim] in the dtype of the queries.
    """
    batch, kv_heads, group, dim = queries.shape
    slots = values.codes.shape[2]
    wide = torch.promote_types(queries.dtype, torch.float32)
    rows = (queries.to(wide) * scaling).view(batch * kv_heads, group, dim)
    logits = rows.new_empty(batch * kv_heads, group, slots + young[0].shape[2])
    _read_keys(rows, keys, logits[..., :slots])
    torch.bmm(rows, young[0].to(wide).flatten(0, 1).mT, out=logits[..., slots:])
    if bias is not None:
        logits += bias.reshape(batch * kv_heads, 1, -1)
    weights = logits.softmax(-1)
    out = torch.bmm(weights[..., slots:], young[1].to(wide).flatten(0, 1))
    _read_values(weights[..., :slots], values, out)
    return out.view(batch, kv_heads, group, -1).to(queries.dtype)


def _read_keys(rows: Tensor, keys: Packed, logits: Tensor) -> None:
    """Logits [heads, group, slots] of `rows` [heads, group, dim]."""
    heads, group, dim = rows.shape
    tokens, count = keys.codes.shape[3], 8 // keys.bits
    codes = keys.codes.flatten(0, 1)  # [heads, groups, tokens, bytes]
    scale, zero = (x.flatten(0, 1)[:, :, 0].to(rows.dtype) for x in (keys.scale, keys.zero))  # [heads, groups, dim]
    base = zero @ rows.mT  # [heads, groups, group]
    by_place = rows.view(heads, 1, group, dim // count, count)
    for h, g in _blocks(heads, codes.shape[1], tokens * dim):
        block = base[h, g].flatten(0, 1)[:, :, None]
        factors = scale[h, g].unflatten(-1, (-1, count))[:, :, None]  # [heads, groups, 1, bytes, count]
        for place, numbers in enumerate(_numbers(codes[h, g], keys.bits, rows.dtype)):
            scaled = by_place[h, ..., place] * factors[..., place]
            block = torch.baddbmm(block, scaled.flatten(0, 1), numbers.flatten(0, 1).mT)
        block = block.view(-1, g.stop - g.start, group, tokens).transpose(1, 2)
        logits[h, :, g.start * tokens : g.stop * tokens].unflatten(-1, (-1, tokens)).copy_(block)


def _read_values(weights: Tensor, values: Packed, out: Tensor) -> None:
    """Add to `out` [heads, group, dim] what `weights` [heads, group, slots] take of the values."""
    heads, group, slots = weights.shape
    parts, width, count = *values.codes.shape[3:], 8 // values.bits
    codes = values.codes.flatten(0, 1)  # [heads, slots, parts, bytes]
    scale, zero = (x.flatten(0, 1)[..., 0].to(weights.dtype) for x in (values.scale, values.zero))
    scale = scale.mT.contiguous()  # [heads, parts, slots]
    by_part = out.view(heads, group, parts, width, count)
    by_part += torch.bmm(weights, zero)[..., None, None]
    for h, s in _blocks(heads, slots, parts * width * count):
        scaled = weights[h, None, :, s] * scale[h, :, None, s]  # [heads, parts, group, slots]
        for place, numbers in enumerate(_numbers(codes[h, s], values.bits, weights.dtype)):
            by_part[h, ..., place] += torch.matmul(scaled, numbers.transpose(1, 2)).transpose(1, 2)


def _numbers(codes: Tensor, bits: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The first code of each byte as a number, then the second: [..., bytes] each."""
    for shift in range(0, 8, bits):
        code = codes >> shift if shift else codes
        yield (code & (2**bits - 1) if shift + bits < 8 else code).to(dtype)


def _blocks(heads: int, count: int, numbers: int) -> Iterator[tuple[slice, slice]]:
    """Heads and rows that are taken together, `numbers` codes a row."""
    most = max(1, _NUMBERS // numbers)
    step = min(count, most)
    together = max(1, most // max(1, count))
    for h in range(0, heads, together):
        for start in range(0, count, step):
            yield slice(h, min(heads, h + together)), slice(start, min(count, start + step))
