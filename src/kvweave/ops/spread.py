"""How widely attention spreads: entropy across modalities, density of rows. Streamed over blocks of rows."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvweave.ops.device import exact
from kvweave.ops.statistics import AttentionRule, these

_LOGITS = 1 << 18  # logits at a time: a core's cache
_GPU_LOGITS = 1 << 24


def _parts(keys: Tensor, alike: bool) -> Iterator[tuple[int, slice]]:
    """Rows of the batch and KV heads that are taken together: one of each, for a core's cache; on a GPU all heads.

    Args:
        alike: the heads may be taken together.
    """
    batch, kv_heads = keys.shape[:2]
    width = kv_heads if keys.is_cuda and alike else 1
    for b in range(batch):
        for h in range(0, kv_heads, width):
            yield b, slice(h, h + width)


def _mask(rule: AttentionRule, b: int, of: slice, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
    """What rows [start, stop) of row `b` of the batch cannot see, and what is added to their logits or None.

    Args:
        of: query heads.
    Returns:
        [1 or heads, stop - start, length] each.
    """
    assert rule.mask is not None
    mask = rule.mask(start, stop)
    mask = mask[b if mask.shape[0] > 1 else 0]
    mask = mask if mask.shape[0] == 1 else mask[of]
    if mask.dtype == torch.bool:
        return ~mask, None
    return mask <= torch.finfo(mask.dtype).min / 2, mask


def _products(queries: Tensor, keys: Tensor, rule: AttentionRule) -> Tensor:
    """Logits [kv_heads, group, rows, columns] of [kv_heads * group, rows, dim] and [kv_heads, columns, dim]."""
    heads, rows, dim = queries.shape
    kv_heads = keys.shape[0]
    grouped = queries.to(keys.dtype).reshape(kv_heads, -1, dim) * rule.scaling
    logits = torch.matmul(grouped, keys.mT)
    if rule.softcap is not None:
        logits.div_(rule.softcap).tanh_().mul_(rule.softcap)
    return logits.view(kv_heads, heads // kv_heads, rows, keys.shape[1])


def _step(keys: Tensor, logits: int) -> int:
    """Rows at a time that have so many logits each."""
    return max(1, (_GPU_LOGITS if keys.is_cuda else _LOGITS) // max(1, logits))


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

    Only the other modality's keys are multiplied.

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
    group = heads // keys.shape[1]
    sums = torch.zeros(batch, heads, 2, dtype=torch.promote_types(keys.dtype, torch.float32), device=keys.device)
    alike = bool((visual == visual[:, :1]).all())
    columns_of = [_both(mask) for mask in (visual[:, 0] if alike else visual.flatten(0, 1))]
    rows_of = [_both(mask) for mask in row_visual]
    for b, h in _parts(keys, alike):
        of = slice(h.start * group, h.stop * group)
        for kind in range(2):
            columns = columns_of[b if alike else b * keys.shape[1] + h.start][1 - kind]
            rows = rows_of[b][kind]
            if len(columns) and len(rows):
                others = keys[b, h].index_select(1, columns).to(sums.dtype)
                for part in rows.split(_step(keys, (of.stop - of.start) * len(columns))):
                    block = queries[b, of].index_select(1, part)
                    hidden = _hidden(rule, b, of, part, columns, keys.shape[2] - queries.shape[2]) if causal else None
                    sums[b, of, kind] += _entropy(_products(block, others, rule), hidden).flatten(0, 1)
    counts = torch.stack([(~row_visual).sum(-1), row_visual.sum(-1)], -1)  # [batch, 2]
    both = (counts > 0).all(-1) & over_heads(visual.any(-1) & (~visual).any(-1)).all(-1)
    return over_heads((sums / counts[:, None].clamp(min=1)).sum(-1)).mean(1) * both


def _both(visual: Tensor) -> tuple[Tensor, Tensor]:
    """Places of text and of visual tokens, of a mask."""
    return (~visual).nonzero().flatten(), visual.nonzero().flatten()


def _hidden(
    rule: AttentionRule, b: int, of: slice, rows: Tensor, columns: Tensor, first: int
) -> tuple[Tensor, Tensor | None]:
    """As `_mask`, of some rows and columns; `first` is the first row's own column."""
    if rule.mask is None:
        return (columns > (first + rows)[:, None])[None], None
    low = int(rows[0])
    hidden, added = _mask(rule, b, of, low, int(rows[-1]) + 1)

    def some(x: Tensor) -> Tensor:
        return x.index_select(1, rows - low).index_select(2, columns)

    return some(hidden), None if added is None else some(added)


def _entropy(logits: Tensor, masks: tuple[Tensor, Tensor | None] | None) -> Tensor:
    """Entropy of the softmax of [kv_heads, group, rows, columns], summed over rows; a row that sees nothing has none.

    Args:
        masks: what rows cannot see, and what is added to their logits, [1 or heads, rows, columns] each.
    """
    hidden = None
    if masks is not None:
        hidden, added = (None if x is None else x.unflatten(0, (-1, min(logits.shape[1], len(x)))) for x in masks)
        assert hidden is not None
        logits = logits if added is None else logits.add_(added)
        logits.masked_fill_(hidden, -torch.inf)
    weights = logits.softmax(-1)
    top = logits.amax(-1)
    total = top - weights.amax(-1).log()  # of the exponentials, as a logarithm
    if hidden is not None:
        logits.masked_fill_(hidden, 0)
    return (total - torch.linalg.vecdot(weights, logits)).masked_fill(top == -torch.inf, 0).sum(-1)


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
    entries = torch.zeros_like(dense)
    limit = torch.log(torch.tensor(share, dtype=torch.float64)).item() if share > 0 else -torch.inf
    group, rows, length = queries.shape[1] // keys.shape[1], queries.shape[2], keys.shape[2]
    for b, h in _parts(keys, alike=True):
        of = slice(h.start * group, h.stop * group)
        wide = keys[b, h].to(torch.promote_types(keys.dtype, torch.float32))
        step = _step(keys, (of.stop - of.start) * length)
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            visible = length if rule.mask is not None else length - rows + stop
            logits = _products(queries[b, of, start:stop], wide[:, :visible], rule).flatten(0, 1)
            if rule.mask is None:
                hidden, added = torch.ones_like(logits[:1], dtype=torch.bool).triu_(length - rows + start + 1), None
            else:
                hidden, added = _mask(rule, b, of, start, stop)
            logits = logits if added is None else logits.add_(added)
            logits.masked_fill_(hidden, -torch.inf)
            above = (logits >= logits.amax(-1, keepdim=True) + limit) & ~hidden
            dense[b, of] += above.sum((1, 2))
            entries[b, of] += (~hidden).sum((1, 2))
    return over_heads(dense).sum(1) / over_heads(entries).sum(1)
