"""What the prompt's own attention says about its tokens, streamed: no [length, length] tensor is ever made.

Every statistic is computed in float32 or wider from the queries of a row's last `rows` tokens and all of its
keys, both after rotary, as the model's attention used them.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvweave.ops.device import exact, fused

_BLOCK = 128  # query rows at a time: logits of a block stay in a core's cache
_LOGITS = 1 << 18  # logits at a time where a head has few
_GPU_LOGITS = 1 << 26  # logits at a time where all heads run together


@dataclass(frozen=True)
class AttentionRule:
    """How a layer turns queries and keys into probabilities.

    Attributes:
        scaling: factor of the logits.
        mask: `mask(start, stop)` gives rows [start, stop) of the model's own mask, [batch, 1 or heads,
            stop - start, length], boolean (True: visible) or additive; None: causal.
        softcap: bound of the logits, `softcap * tanh(logits / softcap)`.
        sinks: [heads], a logit of no key that takes part in the softmax (gpt-oss).
    """

    scaling: float
    mask: Callable[[int, int], Tensor] | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _parts(keys: Tensor, logits: int) -> list[tuple[slice, slice]]:
    """Rows of the batch and KV heads that are taken together: all on a GPU, else few, for a core's cache.

    Args:
        logits: of one KV head.
    """
    batch, kv_heads = keys.shape[:2]
    if keys.is_cuda:
        return [(slice(0, batch), slice(0, kv_heads))]
    heads = min(kv_heads, max(1, _LOGITS // logits))
    starts = range(0, kv_heads, heads)
    return [(slice(b, b + 1), slice(h, min(kv_heads, h + heads))) for b in range(batch) for h in starts]


@dataclass(frozen=True)
class _Room:
    """What blocks of rows share: memory for their logits, and which columns lie ahead of a row of a full block.

    Attributes:
        logits: [batch * kv_heads * group * block * (length + 1)], float32 or wider.
        ahead: bool [block, block].
    """

    logits: Tensor
    ahead: Tensor

    @staticmethod
    def of(keys: Tensor, group: int, block: int) -> "_Room":
        """For blocks of `block` rows of the queries that read `keys` [batch, kv_heads, length, dim]."""
        batch, kv_heads, length, _ = keys.shape
        wide = torch.promote_types(keys.dtype, torch.float32)
        logits = keys.new_empty(batch * kv_heads * group * block * (length + 1), dtype=wide)
        return _Room(logits, torch.ones(block, block, dtype=torch.bool, device=keys.device).triu_(1))


def _products(queries: Tensor, keys: Tensor, scaling: float, out: Tensor) -> None:
    """Scaled products of [batch, kv_heads, rows, dim] and [batch, kv_heads, columns, dim] into `out`.

    On a GPU half-precision numbers are multiplied as they are and summed in float32; elsewhere they are widened.
    """
    if queries.is_cuda and queries.dtype != out.dtype:
        products = torch.bmm(queries.flatten(0, 1), keys.flatten(0, 1).mT, out_dtype=out.dtype)
        torch.mul(products.view_as(out), scaling, out=out)
    else:
        torch.matmul(_wide(queries) * scaling, _wide(keys).mT, out=out)


def _probabilities(
    queries: Tensor, keys: Tensor, rule: AttentionRule, start: int, rows: int, heads: slice, room: _Room
) -> Tensor:
    """Attention of a block of rows; a row that sees no key at all attends to none.

    Args:
        queries: [batch, kv_heads, group, block, dim], rows [start, start + block) of `rows`.
        keys: [batch, kv_heads, length, dim]; length >= rows.
        heads: which of the layer's query heads these are.
    Returns:
        [batch, kv_heads, group, block, visible], columns that no row of the block sees left off; lives in `room`.
    """
    batch, kv_heads, group, block = queries.shape[:4]
    length = keys.shape[-2]
    first = length - rows + start  # the column of the block's first row
    visible = length if rule.mask is not None else first + block
    extra = 0 if rule.sinks is None else 1  # the sink is a column of its own, before the others
    shape = (batch, kv_heads, group * block, extra + visible)
    everything = room.logits[: math.prod(shape)].view(shape)
    _products(queries.flatten(2, 3), keys[:, :, :visible], rule.scaling, everything[..., extra:])
    everything = everything.view(batch, kv_heads, group, block, extra + visible)
    logits = everything[..., extra:]
    if rule.softcap is not None:
        logits.div_(rule.softcap).tanh_().mul_(rule.softcap)
    blind = None
    if rule.mask is None:
        logits[..., first:].masked_fill_(room.ahead[:block, :block], -torch.inf)
    else:
        mask = rule.mask(start, start + block)
        shared = mask.shape[1] == 1
        mask = mask[:, :, None] if shared else mask[:, heads].view(batch, kv_heads, group, block, length)
        hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
        if mask.dtype != torch.bool:
            logits.add_(mask)
        logits.masked_fill_(hidden, -torch.inf)
        blind = hidden.all(-1, keepdim=True)
    if rule.sinks is not None:
        everything[..., 0] = _wide(rule.sinks)[heads].view(kv_heads, group, 1)
    # A row's maximum, exponentials and sum while the row is in the cache; in place where rows are taken one by one.
    everything = torch.softmax(everything, -1, out=everything if everything.is_cpu else None)
    weights = everything[..., extra:]
    return weights if blind is None else weights.masked_fill_(blind, 0)


def _grouped(queries: Tensor, kv_heads: int) -> Tensor:
    """[batch, heads, rows, dim] -> [batch, kv_heads, group, rows, dim]."""
    batch, heads, rows, dim = queries.shape
    return queries.view(batch, kv_heads, heads // kv_heads, rows, dim)


@exact
def window_attention(
    queries: Tensor, keys: Tensor, rule: AttentionRule, window: int, rows_by: str = "mean", heads_by: str = "mean"
) -> Tensor:
    """Attention that each token receives from the last `window` rows, over heads first, then over rows (SPEC 2.1).

    Args:
        queries: [batch, heads, rows, dim], the last `rows` tokens; keys: [batch, kv_heads, length, dim].
        rows_by: "max": the largest of any row; "mean": the sum over rows.
        heads_by: "mean" or "max" over the query heads of a group.
    Returns:
        float [batch, kv_heads, length].
    """
    batch, kv_heads, length, _ = keys.shape
    rows = queries.shape[2]
    window = min(window, rows)
    grouped = _grouped(queries[:, :, rows - window :], kv_heads)
    group = grouped.shape[2]
    parts = _parts(keys, group * window * length)
    room = _Room.of(keys[parts[0]], group, window)
    out = room.logits.new_empty(batch, kv_heads, length)
    for b, h in parts:
        of = slice(h.start * group, h.stop * group)
        weights = _probabilities(grouped[b, h], keys[b, h], _rows_of(rule, b), rows - window, rows, of, room)
        if rows_by == heads_by == "mean":
            torch.sum(weights, (2, 3), out=out[b, h]).div_(group)
        else:
            by_row = weights.mean(2) if heads_by == "mean" else weights.amax(2)
            out[b, h] = by_row.sum(2) if rows_by == "mean" else by_row.amax(2)
    return out


@exact
def column_sums(queries: Tensor, keys: Tensor, rule: AttentionRule, row_weights: Tensor) -> Tensor:
    """Attention that each token receives from all rows, each row counted with its weight (SPEC 11).

    With weights [is text, is visual] one pass serves the column sums and the exact flow ratio.

    Args:
        queries: [batch, heads, rows, dim]; keys: [batch, kv_heads, length, dim].
        row_weights: [batch, kinds, rows].
    Returns:
        float [batch, heads, kinds, length].
    """
    batch, kv_heads, length, _ = keys.shape
    heads, kinds = queries.shape[1], row_weights.shape[1]
    if fused(queries, keys) and rule == AttentionRule(rule.scaling) and rule.scaling > 0 and kinds <= 2:
        from kvweave.ops import kernels

        return kernels.column_sums(queries, keys, rule.scaling, row_weights)
    wide = torch.promote_types(keys.dtype, torch.float32)
    out = keys.new_zeros(batch, kv_heads, heads // kv_heads, kinds, length, dtype=wide)
    row_weights = row_weights.to(wide)
    for b, h, rows, weights in _blocks(queries, keys, rule):
        received = torch.matmul(row_weights[b, None, None, :, rows], weights)
        out[b, h, ..., : weights.shape[-1]] += received  # [batch, kv_heads, group, kinds, visible]
    return out.view(batch, heads, kinds, length)


@exact
def received(
    queries: Tensor,
    keys: Tensor,
    rule: AttentionRule,
    rows_by: str,
    heads_by: str,
    row_weights: Tensor | None = None,
    reach: int = 0,
) -> Tensor:
    """Attention that each token receives, over the heads of a group first, then over all rows.

    Args:
        queries: [batch, heads, rows, dim]; keys: [batch, kv_heads, length, dim].
        rows_by: "max": the largest of any row (SPEC 13.2); "mean": the sum over rows.
        heads_by: "mean" or "max".
        row_weights: [batch, 1 or kv_heads, rows], factors of the rows' attention, 0 for rows that do not count.
        reach: only what is paid to tokens that lie so far before the row, or farther, counts.
    Returns:
        float [batch, kv_heads, length].
    """
    batch, kv_heads, length, _ = keys.shape
    if row_weights is not None:
        row_weights = row_weights.expand(-1, kv_heads, -1)
    out = keys.new_zeros(batch, kv_heads, length, dtype=torch.promote_types(keys.dtype, torch.float32))
    for b, h, rows, weights in _blocks(queries, keys, rule):
        if reach:
            first = length - queries.shape[2] + rows.start - reach + 1  # too near for the block's first row
            near = weights[..., max(0, first) :]
            too_near = torch.ones(near.shape[-2:], dtype=torch.bool, device=near.device).triu_(min(0, first))
            near.masked_fill_(too_near, 0)
        by_row = weights.mean(2) if heads_by == "mean" else weights.amax(2)
        if row_weights is not None:
            by_row = by_row * row_weights[b, h, rows, None]
        out_rows = out[b, h, : weights.shape[-1]]
        if rows_by == "max":
            torch.maximum(out_rows, by_row.amax(2), out=out_rows)
        else:
            out_rows += by_row.sum(2)
    return out


@exact
def column_peaks(queries: Tensor, keys: Tensor, rule: AttentionRule) -> Tensor:
    """The largest attention that each token receives from any row, means over heads of a group (SPEC 13.2).

    Args:
        queries: [batch, heads, rows, dim]; keys: [batch, kv_heads, length, dim].
    Returns:
        float [batch, kv_heads, length].
    """
    return received(queries, keys, rule, "max", "mean")


def _blocks(queries: Tensor, keys: Tensor, rule: AttentionRule) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Attention of all rows, a block at a time: rows of the batch, KV heads, rows of queries, their attention.

    The last is [batch, kv_heads, group, block, visible], and is overwritten by the next.
    """
    batch, kv_heads, length, _ = keys.shape
    heads, rows = queries.shape[1], queries.shape[2]
    group = heads // kv_heads
    grouped = _grouped(queries, kv_heads)
    block = max(1, _GPU_LOGITS // (batch * heads * length) if keys.is_cuda else _BLOCK // group)
    block = min(block, rows)
    parts = _parts(keys, group * block * length)
    room = _Room.of(keys[parts[0]], group, block)
    for b, h in parts:
        part_keys = keys[b, h] if keys.is_cuda else _wide(keys[b, h])
        part_rule, of = _rows_of(rule, b), slice(h.start * group, h.stop * group)
        for start in range(0, rows, block):
            stop = min(rows, start + block)
            weights = _probabilities(grouped[b, h, :, start:stop], part_keys, part_rule, start, rows, of, room)
            yield b, h, slice(start, stop), weights


def _rows_of(rule: AttentionRule, batch: slice) -> AttentionRule:
    mask = rule.mask
    if mask is None:
        return rule

    def part(start: int, stop: int) -> Tensor:
        block = mask(start, stop)
        return block[batch] if block.shape[0] > 1 else block

    return AttentionRule(rule.scaling, part, rule.softcap, rule.sinks)


@dataclass(frozen=True)
class Flow:
    """Cross-modal information flow of a layer, by row of the batch: float [batch] each, in [0, 1].

    Attributes:
        literal: share of all attention that crosses modalities (FlowMM, Eqs. 6-7).
        balanced: mean of the two crossing shares, each modality's rows counted as one.
        nosink: `literal` without the first four key columns.
    """

    literal: Tensor
    balanced: Tensor
    nosink: Tensor


SINK_COLUMNS = 4


def these(x: Tensor) -> Tensor:
    """All heads are here."""
    return x


def flow_ratio(
    sums: Tensor, visual: Tensor, row_visual: Tensor, over_heads: Callable[[Tensor], Tensor] = these
) -> Flow:
    """Flow ratios from column sums kept apart by the rows' modality (SPEC 3, step 1).

    Args:
        sums: [batch, heads, 2, length]: attention received from text rows and from visual rows.
        visual: bool [batch, kv_heads, length]; row_visual: bool [batch, rows].
        over_heads: gathers [batch, heads here, ...] of all heads.
    """
    heads = sums.shape[1]
    to_visual = visual.repeat_interleave(heads // visual.shape[1], 1)  # [batch, heads, length]
    from_text, from_visual = sums[:, :, 0], sums[:, :, 1]
    text_to_visual = from_text * to_visual
    visual_to_text = from_visual * ~to_visual
    crossing = text_to_visual + visual_to_text
    everything = from_text + from_visual
    visual_rows = row_visual.sum(-1)
    text_rows = row_visual.shape[-1] - visual_rows
    both = over_heads(visual.any(-1) & (~visual).any(-1)).all(-1).to(sums.dtype)  # else there is nothing to cross
    rest = everything[..., SINK_COLUMNS:].sum(-1)
    ours = [
        crossing.sum(-1) / row_visual.shape[-1],
        text_to_visual.sum(-1),
        visual_to_text.sum(-1),
        crossing[..., SINK_COLUMNS:].sum(-1) / rest.clamp(min=torch.finfo(sums.dtype).tiny),
    ]
    literal, to_visual, to_text, nosink = over_heads(torch.stack(ours, -1)).mean(1).unbind(-1)
    balanced = 0.5 * (to_visual / text_rows.clamp(min=1) + to_text / visual_rows.clamp(min=1))
    return Flow(literal * both, balanced * both, nosink * both)
