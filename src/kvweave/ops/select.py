"""Which tokens stay: the best by a score, and those that stay by force."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvweave.ops.budget import floor


def top(scores: Tensor, count: int) -> Tensor:
    """Ascending positions of the `count` best in each head; ties go to the lower position.

    Args:
        scores: [batch, kv_heads, length].
    Returns:
        int64 [batch, kv_heads, count].
    """
    best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]
    return best.sort(-1).values


def ranks(scores: Tensor) -> Tensor:
    """Rank of each entry along the last dimension, 0 the best; ties to the lower position."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def last(like: Tensor, count: int) -> Tensor:
    """Positions of the last `count` tokens of `like` [batch, kv_heads, length]: int64 [batch, kv_heads, count]."""
    length = like.shape[-1]
    positions = torch.arange(length - count, length, device=like.device)
    return positions.expand(*like.shape[:-1], count)


def top_and_recent(scores: Tensor, count: int, recent: int, length: int | None = None) -> Tensor:
    """Ascending positions of the last `recent` tokens and of the best before them, `count` together.

    Args:
        scores: [batch, kv_heads, length], or of the tokens before the recent ones alone; those of the recent
            tokens are not read.
        count, recent: 0 <= recent <= count <= length.
        length: of the row, where `scores` is shorter.
    """
    length = scores.shape[-1] if length is None else length
    recents = torch.arange(length - recent, length, device=scores.device)
    best = top(scores[..., : length - recent], count - recent)
    return torch.cat([best, recents.expand(*scores.shape[:-1], recent)], -1)


def lowest(scores: Tensor, quantile: float | None) -> Tensor:
    """Which entries score no more than the lower order statistic at `quantile`; None: all do (SPEC 3, step 4).

    Args:
        scores: [batch, kv_heads, n], n >= 1.
    Returns:
        bool [batch, kv_heads, n].
    """
    if quantile is None:
        return torch.ones_like(scores, dtype=torch.bool)
    rank = floor(quantile * (scores.shape[-1] - 1))
    return scores <= scores.sort(-1).values[..., rank, None]


def modality_ranks(scores: Tensor, visual: Tensor) -> Tensor:
    """Rank of each token among those of its own modality, best first, ties to the lower position.

    Args:
        scores, visual: [batch, kv_heads, n].
    Returns:
        int64 [batch, kv_heads, n].
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    sorted_visual = visual.gather(-1, order)
    rank = torch.where(sorted_visual, sorted_visual.cumsum(-1), (~sorted_visual).cumsum(-1)) - 1
    return torch.empty_like(order).scatter_(-1, order, rank)


def top_by_modality(scores: Tensor, visual: Tensor, visual_count: Tensor, count: int) -> Tensor:
    """Ascending positions of the best `visual_count` visual tokens and the best `count - visual_count` text ones.

    Args:
        scores, visual: [batch, kv_heads, n].
        visual_count: int64 [batch, kv_heads]; both counts must be at hand.
    Returns:
        int64 [batch, kv_heads, count].
    """
    quota = torch.where(visual, visual_count[..., None], count - visual_count[..., None])
    stays = modality_ranks(scores, visual) < quota
    return (~stays).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :count]


def complement(keep: Tensor, length: int) -> Tensor:
    """Ascending positions of [0, length) that are not in `keep`.

    Args:
        keep: int64 [batch, kv_heads, kept], distinct.
    Returns:
        int64 [batch, kv_heads, length - kept].
    """
    kept = torch.zeros(*keep.shape[:-1], length, dtype=torch.uint8, device=keep.device)
    kept.scatter_(-1, keep, 1)
    return kept.sort(dim=-1, stable=True).indices[..., : length - keep.shape[-1]]


def pool(scores: Tensor, kernel: int) -> Tensor:
    """Average over `kernel` neighbours, stride 1, zero padding, divisor always `kernel` (SnapKV).

    Args:
        scores: [batch, kv_heads, length]; kernel: odd.
    """
    if kernel == 1 or scores.shape[-1] == 0:
        return scores
    return F.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2, count_include_pad=True)


def chosen(mask: Tensor) -> Tensor:
    """Ascending positions of a mask's True entries; heads with fewer have -1 in front.

    Args:
        mask: bool [batch, kv_heads, length].
    Returns:
        int64 [batch, kv_heads, most].
    """
    most = int(mask.sum(-1).max())
    order = mask.to(torch.uint8).sort(dim=-1, stable=True).indices[..., mask.shape[-1] - most :]  # True ones last
    return order.masked_fill(~mask.gather(-1, order), -1)
