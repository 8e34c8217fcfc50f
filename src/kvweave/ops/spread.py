"""How widely attention spreads: entropy across modalities, density of rows. Streamed over blocks of rows."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvweave.ops.device import exact
from kvweave.ops.statistics import AttentionRule, these

_LOGITS = 1 << 18  # logits at a time: a core's cache
_GPU_LOGITS = 1 << 24


def _logits(
    queries: Tensor, keys: Tensor, rule: AttentionRule, *, causal: bool
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows: which they are, their logits [batch, heads, block, length], and where they cannot see."""
    batch, heads, rows, dim = queries.shape
    kv_heads, length = keys.shape[1:3]
    wide = torch.promote_types(keys.dtype, torch.float32)
    keys = keys.to(wide)
    step = max(1, (_GPU_LOGITS if keys.is_cuda else _LOGITS) // (batch * heads * length))
    columns = torch.arange(length, device=keys.device)
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        q = queries[:, :, block].to(wide).reshape(batch, kv_heads, -1, dim) * rule.scaling
        logits = torch.matmul(q, keys.mT).view(batch, heads, -1, length)
        if rule.softcap is not None:
            logits = rule.softcap * torch.tanh(logits / rule.softcap)
        column = length - rows + torch.arange(block.start, block.stop, device=keys.device)
        hidden = torch.zeros(1, 1, len(column), length, dtype=torch.bool, device=keys.device)
        if causal and rule.mask is not None:
            mask = rule.mask(block.start, block.stop)
            hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
            if mask.dtype != torch.bool:
                logits = logits + mask
        elif causal:
            hidden = (columns > column[:, None])[None, None]
        yield block, logits, hidden


@exact
def cross_entropy(
    queries: Tensor,
    keys: Tensor,
    rule: AttentionRule,
    visual: Tensor,
    row_visual: Tensor,
    over_heads: Callable[[Tensor], Tensor] = these,
    *,
    causal: bool,
) -> Tensor:
    """Entropy, in nats, of attention restricted to the other modality (MEDA; SPEC 7).

    Args:
        queries: [batch, heads, rows, dim]; keys: [batch, kv_heads, length, dim].
        visual: bool [batch, kv_heads, length]; row_visual: bool [batch, rows].
        over_heads: gathers [batch, heads here, ...] of all heads.
        causal: only over tokens that a row can see; a row without any counts 0.
    Returns:
        [batch]: mean over heads of the mean over text rows plus the mean over visual rows; 0 where a modality is
        absent.
    """
    batch, heads = queries.shape[:2]
    other = visual.repeat_interleave(heads // visual.shape[1], 1)[:, :, None]  # [batch, heads, 1, length]
    sums = torch.zeros(batch, heads, 2, dtype=torch.promote_types(keys.dtype, torch.float32), device=keys.device)
    for block, logits, hidden in _logits(queries, keys, rule, causal=causal):
        rows = row_visual[:, None, block, None]
        closed = hidden | (other == rows)
        scores = logits.masked_fill(closed, -torch.inf)
        total = scores.logsumexp(-1)  # -inf for a row without candidates
        weights = (scores - total[..., None]).exp().masked_fill(closed, 0)
        entropy = total - (weights * logits.masked_fill(closed, 0)).sum(-1)
        entropy = entropy.masked_fill(total == -torch.inf, 0)  # [batch, heads, block]
        kind = rows[..., 0]
        sums[:, :, 0] += (entropy * ~kind).sum(-1)
        sums[:, :, 1] += (entropy * kind).sum(-1)
    counts = torch.stack([(~row_visual).sum(-1), row_visual.sum(-1)], -1)  # [batch, 2]
    both = (counts > 0).all(-1) & over_heads(visual.any(-1) & (~visual).any(-1)).all(-1)
    return over_heads((sums / counts[:, None].clamp(min=1)).sum(-1)).mean(1) * both


@exact
def row_density(
    queries: Tensor,
    keys: Tensor,
    rule: AttentionRule,
    share: float,
    over_heads: Callable[[Tensor], Tensor] = these,
) -> Tensor:
    """Fraction of the entries that rows can see whose probability is at least `share` of their row's largest.

    Args:
        queries: [batch, heads, rows, dim], the last rows; keys: [batch, kv_heads, length, dim].
        over_heads: gathers [batch, heads here, ...] of all heads.
    Returns:
        [batch], over all heads and rows (VL-Cache; SPEC 10.6).
    """
    dense = torch.zeros(queries.shape[:2], dtype=torch.float64, device=keys.device)
    seen = torch.zeros_like(dense)
    limit = torch.log(torch.tensor(share, dtype=torch.float64)).item() if share > 0 else -torch.inf
    for _, logits, hidden in _logits(queries, keys, rule, causal=True):
        scores = logits.masked_fill(hidden, -torch.inf)
        above = (scores >= scores.amax(-1, keepdim=True) + limit) & ~hidden
        dense += above.sum((2, 3))
        seen += (~hidden).expand_as(above).sum((2, 3))
    return over_heads(dense).sum(1) / over_heads(seen).sum(1)
