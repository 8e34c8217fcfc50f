"""Which tokens stay: the best by a score, and those that stay by force."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvweave.ops.budget import floor

_FEW = 512  # entries of a head up to which calls take longer than what they compute


def _bound_by_calls(x: Tensor) -> bool:
    """True where one call that computes more takes less time than a dozen that compute less: on a GPU, and of few."""
    return x.is_cuda or x.shape[-1] <= _FEW


def best(scores: Tensor, count: int) -> Tensor:
    """Which entries are the `count` best along the last dimension; ties go to the lower position.

    Args:
        scores: [..., length]; 0 <= count <= length.
    Returns:
        bool [..., length].
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = scores.topk(count, sorted=False).values.amin(-1, keepdim=True)
    above, tied = ~(scores <= least), scores == least
    return above | (tied & (tied.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def places(mask: Tensor, count: int) -> Tensor:
    """Ascending positions of the first `count` True entries along the last dimension, which has as many.

    Args:
        mask: bool [..., length].
    Returns:
        int64 [..., count].
    """
    if _bound_by_calls(mask):
        return mask.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :count]
    rank = (mask.cumsum(-1) - 1).masked_fill_(~mask, count).clamp_(max=count)  # a place beyond for all others
    columns = torch.arange(mask.shape[-1], device=mask.device).expand_as(mask)
    return rank.new_zeros(*mask.shape[:-1], count + 1).scatter_(-1, rank, columns)[..., :count]


def top(scores: Tensor, count: int) -> Tensor:
    """Ascending positions of the `count` best in each head; ties go to the lower position.

    Args:
        scores: [batch, kv_heads, length].
    Returns:
        int64 [batch, kv_heads, count].
    """
    if _bound_by_calls(scores):
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(-1).values
    return places(best(scores, count), count)


def ranks(scores: Tensor) -> Tensor:
    """Rank of each entry along the last dimension, 0 the best; ties to the lower position."""
    return ranks_by([scores])


def first(like: Tensor, count: int) -> Tensor:
    """Positions of the first `count` tokens of `like` [batch, kv_heads, length]: int64 [batch, kv_heads, count]."""
    return torch.arange(count, device=like.device).expand(*like.shape[:-1], count)


def last(like: Tensor, count: int) -> Tensor:
    """Positions of the last `count` tokens of `like` [batch, kv_heads, length]: int64 [batch, kv_heads, count]."""
    length = like.shape[-1]
    positions = torch.arange(length - count, length, device=like.device)
    return positions.expand(*like.shape[:-1], count)


def top_and_recent(scores: Tensor, count: int, recent: int, length: int | None = None, *, sinks: int = 0) -> Tensor:
    """Ascending positions of the first `sinks` and last `recent` tokens, and of the best between, `count` together.

    Args:
        scores: [batch, kv_heads, length], or of the tokens before the recent ones alone; those of tokens that stay
            by force are not read.
        count, recent, sinks: 0 <= sinks + recent <= count <= length.
        length: of the row, where `scores` is shorter.
    """
    length = scores.shape[-1] if length is None else length
    recents = torch.arange(length - recent, length, device=scores.device)
    best = top(scores[..., sinks : length - recent], count - recent - sinks)
    parts = [best, recents.expand(*scores.shape[:-1], recent)]
    if sinks:
        parts = [first(scores, sinks), best + sinks, parts[1]]
    return torch.cat(parts, -1)


def top_and_recent_of_each(scores: Tensor, counts: Sequence[Sequence[int]], recent: int, *, sinks: int = 0) -> Tensor:
    """As `top_and_recent`, where each head keeps a count of its own; heads that keep less have -1 in front.

    Args:
        scores: [batch, kv_heads, length].
        counts: by row and head; sinks + recent <= count <= length.
    Returns:
        int64 [batch, kv_heads, most], most being the largest count.
    """
    length = scores.shape[-1]
    free = torch.tensor(counts, device=scores.device)[..., None] - sinks - recent
    most = max(map(max, counts)) - sinks - recent
    order = scores[..., sinks : length - recent].sort(dim=-1, descending=True, stable=True).indices[..., :most]
    behind = torch.arange(most, device=scores.device) >= free
    parts = [(order + sinks).masked_fill_(behind, -1), last(scores, recent)]
    if sinks:
        parts.insert(0, first(scores, sinks))
    return torch.cat(parts, -1).sort(-1).values


def of_some(keys: Sequence[Tensor], some: Tensor) -> list[Tensor]:
    """The keys with the entries `some` (bool, alike) before all others."""
    first = keys[0]
    return [first.masked_fill(~some, -torch.inf)] if len(keys) == 1 else [some.to(first.dtype), *keys]


def best_by(keys: Sequence[Tensor], count: int) -> Tensor:
    """As `best`, by several keys, the first of which decides, the next among its equals, and so on.

    Args:
        keys: [..., length] each, at least one.
    """
    return best(keys[0], count) if len(keys) == 1 else ranks_by(keys) < count


def ranks_by(keys: Sequence[Tensor]) -> Tensor:
    """As `ranks`, by several keys, the first of which decides."""
    order = torch.sort(keys[-1], dim=-1, descending=True, stable=True).indices
    for key in reversed(keys[:-1]):
        sorted_again = torch.sort(key.gather(-1, order), dim=-1, descending=True, stable=True).indices
        order = order.gather(-1, sorted_again)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def lend(scores: Tensor, ahead: int, behind: int, fade: float = 1.0) -> Tensor:
    """Each score lent to the `ahead` tokens behind it and the `behind` tokens before it; the largest counts.

    Args:
        scores: [batch, kv_heads, length]; where scores fade, none is below 0.
        fade: in (0, 1], what a score is multiplied by for each token that it is lent across.
    Returns:
        [batch, kv_heads, length]: s'_j = max over -behind <= d <= ahead of fade^|d| s_(j - d) (SPEC 17.7).
    """
    if not ahead and not behind:
        return scores
    ahead, behind = (min(n, scores.shape[-1]) for n in (ahead, behind))
    if fade < 1:
        lent = _lend_fading(scores, ahead, fade)
        return torch.maximum(lent, _lend_fading(scores.flip(-1), behind, fade).flip(-1)) if behind else lent
    padded = F.pad(scores, (ahead, behind), value=-torch.inf)
    return F.max_pool1d(padded, ahead + behind + 1, stride=1)


def _lend_fading(scores: Tensor, ahead: int, fade: float) -> Tensor:
    """max over 0 <= d <= ahead of fade^d s_(j - d), by twice as many tokens at a time."""
    reach = 0
    while reach < ahead:
        step = min(reach + 1, ahead - reach)
        lent = F.pad(scores, (step, 0), value=-torch.inf)[..., : scores.shape[-1]]
        scores, reach = torch.maximum(scores, lent * fade**step), reach + step
    return scores


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


def lowest_of(scores: Tensor, some: Tensor, quantile: float | None) -> Tensor:
    """As `lowest` among the entries `some`, of which heads may have different counts.

    Args:
        scores, some (bool): [batch, kv_heads, n].
    Returns:
        bool [batch, kv_heads, n], all of them in `some`.
    """
    if quantile is None:
        return some
    ascending = scores.masked_fill(~some, torch.inf).sort(-1).values
    rank = torch.floor(quantile * (some.sum(-1) - 1).clamp(min=0).double() + 1e-9).long()
    return some & (scores <= ascending.gather(-1, rank[..., None]))


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
    return places(modality_ranks(scores, visual) < quota, count)


def complement(keep: Tensor, length: int) -> Tensor:
    """Ascending positions of [0, length) that are not in `keep`.

    Args:
        keep: int64 [batch, kv_heads, kept], distinct.
    Returns:
        int64 [batch, kv_heads, length - kept].
    """
    rest = torch.ones(*keep.shape[:-1], length, dtype=torch.bool, device=keep.device).scatter_(-1, keep, False)
    return places(rest, length - keep.shape[-1])


def pool(scores: Tensor, kernel: int) -> Tensor:
    """Average over `kernel` neighbours, stride 1, zero padding, divisor always `kernel` (SnapKV).

    Args:
        scores: [batch, kv_heads, length]; kernel: odd.
    """
    length = scores.shape[-1]
    if kernel == 1 or length == 0:
        return scores
    if _bound_by_calls(scores):
        return F.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2, count_include_pad=True)
    padded = F.pad(scores, (kernel // 2, kernel // 2))
    sums = padded[..., :length].clone()
    for shift in range(1, kernel):  # whole rows, where avg_pool1d adds numbers
        sums += padded[..., shift : shift + length]
    return sums.div_(kernel)


def ragged_places(mask: Tensor) -> Tensor:
    """Ascending positions of a mask's True entries; heads with fewer have -1 in front.

    Args:
        mask: bool [batch, kv_heads, length].
    Returns:
        int64 [batch, kv_heads, most].
    """
    count = mask.sum(-1, keepdim=True)
    most = int(count.max())
    rank = (mask.cumsum(-1) - 1 + most - count).masked_fill_(~mask, most)
    columns = torch.arange(mask.shape[-1], device=mask.device).expand_as(mask)
    return rank.new_full((*mask.shape[:-1], most + 1), -1).scatter_(-1, rank, columns)[..., :most]
