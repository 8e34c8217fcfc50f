"""A model's mask, which speaks of logical columns, at the slots that memory holds."""

import torch
import torch.nn.functional as F
from torch import Tensor


def at_columns(mask: Tensor, positions: Tensor, heads: int, new: int) -> Tensor:
    """`mask` [batch or 1, heads or 1, new, columns] at the slots' `positions` [batch, kv_heads, slots]."""
    batch, kv_heads, count = positions.shape
    columns = positions.clamp(min=0)[:, :, None].expand(batch, kv_heads, new, count)
    if mask.shape[1] not in (1, kv_heads):  # a mask of its own for each query head
        columns = columns.repeat_interleave(heads // kv_heads, 1)
    return mask.expand(batch, columns.shape[1], new, mask.shape[-1]).gather(-1, columns)


def by_head(x: Tensor, heads: int) -> Tensor:
    """[batch, kv_heads or heads, ...] -> [batch, heads, ...]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def biased_mask(mask: Tensor, positions: Tensor, bias: Tensor, heads: int) -> Tensor:
    """A model's mask of one new token at slots of fixed number, and what is added to their logits.

    Args:
        mask: [batch or 1, heads or 1, 1, columns], boolean or additive.
        positions, bias: [batch, kv_heads, slots].
    Returns:
        [batch, kv_heads or heads, 1, slots] in the dtype of `bias`.
    """
    shown = at_columns(mask, positions, heads, 1)
    bias, least = by_head(bias[:, :, None], shown.shape[1]), torch.finfo(bias.dtype).min
    return bias.masked_fill(~shown, least) if shown.dtype == torch.bool else (shown + bias).clamp(min=least)


def slot_mask(
    positions: Tensor, bias: Tensor | None, has_empty: bool, mask: Tensor | None, queries: Tensor
) -> Tensor:
    """What hides slots and adds to their logits.

    Args:
        positions: int64 [batch, kv_heads, slots], -1: empty; bias: alike, or None.
        mask: [batch or 1, heads or 1, new, columns], boolean or additive; of all columns, or of the new ones alone;
            None: causal, the new slots being last.
        queries: [batch, heads, new, dim].
    Returns:
        [batch, kv_heads or heads, new, slots].
    """
    heads, new = queries.shape[1], queries.shape[2]
    batch, kv_heads, count = positions.shape
    if mask is None:
        row = torch.arange(count - new, count, device=positions.device)[:, None]
        visible = torch.arange(count, device=positions.device) <= row  # every old slot, and the new ones so far
        visible = visible.expand(batch, kv_heads, new, count)
    elif mask.shape[-1] == new < count:  # of the new columns alone, which are the last slots: all old ones are seen
        is_bool = mask.dtype == torch.bool
        full_mask = F.pad(mask, (count - new, 0), value=is_bool)
        visible = full_mask.expand(batch, kv_heads if mask.shape[1] == 1 else heads, new, count)
    else:
        visible = at_columns(mask, positions, heads, new)
    least = torch.finfo(queries.dtype).min
    if has_empty:
        hidden = by_head(positions[:, :, None] < 0, visible.shape[1])
        visible = (
            visible & ~hidden
            if visible.dtype == torch.bool
            else visible.masked_fill(hidden, torch.finfo(visible.dtype).min)
        )
    if bias is not None:
        bias = by_head(bias[:, :, None].to(queries.dtype), visible.shape[1])
        return torch.where(visible, bias, least) if visible.dtype == torch.bool else visible + bias
    return visible
