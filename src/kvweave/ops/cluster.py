"""Clusters of neighbouring keys: k-means from evenly spaced seeds that reach only so far (SPEC 17.3)."""

import torch
from torch import Tensor

from kvweave.ops.match import take
from kvweave.ops.merge import segment_sum

_DISTANCES = 1 << 22  # at a time


@torch.no_grad()
def clusters(keys: Tensor, weights: Tensor, places: Tensor, count: int, rounds: int, span: int | None) -> Tensor:
    """Which cluster each token is in; no cluster is empty.

    Args:
        keys: [tokens, dim], float32 or wider; weights: [tokens], what a token counts in a mean.
        places: int64 [tokens], ascending, where a token stands in the prompt.
        count: clusters; 1 <= count <= tokens.
        rounds: of assignment and means; one more assignment follows.
        span: a token may join a centre whose seed stands at most that far away; None: any.
    Returns:
        int64 [tokens], in [0, count).
    """
    tokens = len(keys)
    number = torch.arange(count, device=keys.device)
    seeds = torch.div((2 * number + 1) * tokens, 2 * count, rounding_mode="floor")
    centres = keys[seeds]
    for _ in range(rounds):
        label = _nearest(keys, centres, places, places[seeds], span)[0]
        total = torch.zeros_like(centres[:, 0]).index_add_(0, label, weights)
        sums = torch.zeros_like(centres).index_add_(0, label, keys * weights[:, None])
        centres = torch.where((total > 0)[:, None], sums / total.clamp(min=1e-30)[:, None], centres)
    label, _ = _nearest(keys, centres, places, places[seeds], span)
    return _none_empty(keys, centres, label, count)


def _nearest(keys: Tensor, centres: Tensor, places: Tensor, seeds: Tensor, span: int | None) -> tuple[Tensor, Tensor]:
    """The nearest allowed centre of each token, ties to the lower, and its squared distance."""
    squares = centres.square().sum(-1)
    labels, distances = [], []
    for block in torch.arange(len(keys), device=keys.device).split(max(1, _DISTANCES // len(centres))):
        mine = keys[block]
        distance = mine.square().sum(-1, keepdim=True) + squares - 2 * torch.matmul(mine, centres.mT)
        if span is not None:
            away = (places[block, None] - seeds).abs()
            allowed = away <= span
            nobody = ~allowed.any(-1, keepdim=True)
            lowest = torch.zeros_like(allowed).scatter_(-1, first_least(away)[:, None], True)
            distance = distance.masked_fill(~(allowed | (nobody & lowest)), torch.inf)
        labels.append(first_least(distance))
        distances.append(distance.gather(-1, labels[-1][:, None])[:, 0])
    return torch.cat(labels), torch.cat(distances)


def first_least(x: Tensor) -> Tensor:
    """Where the least of the last dimension is first."""
    return (x == x.amin(-1, keepdim=True)).to(torch.uint8).argmax(-1)


def _none_empty(keys: Tensor, centres: Tensor, label: Tensor, count: int) -> Tensor:
    """Every centre without a token takes the farthest one of the centre that has most."""
    sizes = torch.bincount(label, minlength=count).tolist()
    for empty in [n for n, size in enumerate(sizes) if not size]:
        largest = max(range(count), key=lambda n: (sizes[n], -n))
        members = (label == largest).nonzero().flatten()
        away = (keys[members] - centres[largest]).square().sum(-1)
        farthest = members[first_least(-away)]
        label[farthest] = empty
        sizes[largest] -= 1
        sizes[empty] = 1
    return label


def medoids(keys: Tensor, label: Tensor, weights: Tensor, count: int) -> Tensor:
    """Which tokens are nearest to their cluster's mean key; ties, up to rounding, to the lower position.

    Args:
        keys: [batch, kv_heads, length, dim], float32 or wider.
        label: int64 [batch, kv_heads, length], the cluster of each token, -1: none.
        weights: [batch, kv_heads, length], what a token counts in a mean.
        count: clusters of a head at most.
    Returns:
        bool [batch, kv_heads, length], one token of each cluster.
    """
    total = segment_sum(weights, label, count).clamp(min=1e-30)
    means = segment_sum(keys * weights[..., None], label, count) / total[..., None]
    at = label.clamp(min=0)
    distance = (keys - take(means, at)).square().sum(-1)
    outside = torch.where(label < 0, count, label)

    def least(x: Tensor) -> Tensor:
        """Of each cluster, at each of its tokens."""
        start = x.new_full((*x.shape[:2], count + 1), _most(x))
        return start.scatter_reduce_(-1, outside, x, "amin").gather(-1, outside)

    slack = 1e-5 * keys.square().sum(-1)  # both members of a pair are equally near
    near = distance <= least(distance) + slack * torch.finfo(keys.dtype).eps / torch.finfo(torch.float32).eps
    place = torch.arange(label.shape[-1], device=label.device).expand_as(label)
    first = least(place.masked_fill(~near, torch.iinfo(place.dtype).max))
    return (place == first) & (label >= 0)


def _most(x: Tensor) -> float | int:
    return torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).max
