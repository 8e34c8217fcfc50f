"""Into which kept token a dropped one goes: the nearest by key cosine."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from kvweave.ops.device import fused

_SIMILARITIES = 1 << 20  # cosines at a time
_GPU_SIMILARITIES = 1 << 26  # where all heads run together
_TILE = 64  # targets among which a maximum is looked for before its place
_FAR = 4.0  # by which a target that is not allowed is farther than it is


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [batch, kv_heads, n] of `x` [batch, kv_heads, length, dim]: [batch, kv_heads, n, dim]."""
    if x.is_cuda:
        return x.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))
    out = x.new_empty(*index.shape, x.shape[-1])
    for b, h in itertools.product(*map(range, index.shape[:2])):  # copies rows, where gather copies numbers
        torch.index_select(x[b, h], 0, index[b, h], out=out[b, h])
    return out


def unit(keys: Tensor) -> Tensor:
    """Keys of length one, float32 or wider; norms are clamped at 1e-12."""
    return F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1, eps=1e-12)


@torch.no_grad()
def nearest(
    keys: Tensor,
    source: Tensor,
    target: Tensor,
    allowed: Tensor | None = None,
    label: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The target of largest key cosine for each source; ties go to the lower target (SPEC 2.2).

    Args:
        keys: [batch, kv_heads, length, dim].
        source: int64 [batch, kv_heads, sources], positions; target: int64 [batch, kv_heads, targets], ascending.
        allowed: bool [batch, kv_heads, labels, targets]: which targets a source of each label may choose.
        label: int64 [batch, kv_heads, sources], with `allowed`.
    Returns:
        index into `target`, int64 [batch, kv_heads, sources], -1 where none is allowed; and the
        cosine, 0 there.
    """
    if fused(keys):
        from kvweave.ops import kernels

        return kernels.nearest(keys, source, target, allowed, label)
    batch, kv_heads, sources = source.shape
    targets = target.shape[-1]
    goals = unit(take(keys, target))  # [batch, kv_heads, targets, dim]
    if allowed is not None:  # a label is a channel more, in which targets that it may not choose lie far off
        goals = torch.cat([goals, (~allowed).mT * -_FAR], -1)
    index = torch.empty_like(source)
    cosine = torch.empty(source.shape, dtype=goals.dtype, device=keys.device)

    width = max(1, -(-targets // _TILE)) * _TILE
    if keys.is_cuda:  # all heads together
        parts = [(slice(0, batch), slice(0, kv_heads))]
        block = max(1, _GPU_SIMILARITIES // (batch * kv_heads * width))
    else:  # a head at a time
        parts = [(slice(b, b + 1), slice(h, h + 1)) for b, h in itertools.product(range(batch), range(kv_heads))]
        block = max(1, _SIMILARITIES // width)
    block = min(block, max(1, sources))
    first = source[parts[0]]
    room = goals.new_full((*first.shape[:2], block, width), -torch.inf)
    for b, h in parts:
        for start in range(0, sources, block):
            rows = slice(start, min(sources, start + block))
            mine = unit(take(keys[b, h], source[b, h, rows]))  # [batch, kv_heads, block, dim]
            if allowed is not None:
                assert label is not None
                labels = torch.arange(allowed.shape[2], device=keys.device)
                mine = torch.cat([mine, label[b, h, rows, None] == labels], -1)
            similarity = room[:, :, : mine.shape[2]]
            torch.matmul(mine, goals[b, h].mT, out=similarity[..., :targets])
            cosine[b, h, rows], index[b, h, rows] = _first_maximum(similarity)
    nothing = cosine < -_FAR / 2
    return index.masked_fill_(nothing, -1), cosine.masked_fill_(nothing, 0)


def nearest_of_few(
    keys: Tensor, source: Tensor, target: Tensor, allowed: Tensor, label: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """As `nearest`, where many targets are allowed to nobody: those are not looked at.

    Args:
        most: no head has more than that many targets that are allowed to somebody; >= 1.
    """
    useful = allowed.any(2)
    order = (~useful).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :most]  # useful ones first
    some = allowed.gather(-1, order[:, :, None].expand(-1, -1, allowed.shape[2], -1))
    index, cosine = nearest(keys, source, target.gather(-1, order), some, label)
    return order.gather(-1, index.clamp(min=0)).masked_fill_(index < 0, -1), cosine


def _first_maximum(x: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum over the last dimension, and where it is first: by tiles, since a bare maximum vectorises.

    Args:
        x: [..., n], n a multiple of the tile.
    """
    tiles = x.unflatten(-1, (-1, _TILE))
    best, tile = tiles.amax(-1).max(-1)
    row = torch.arange(tile.numel(), device=x.device) * tiles.shape[-2]
    at = tiles.flatten(0, -2).index_select(0, tile.flatten() + row).argmax(-1)
    return best, tile * _TILE + at.view(tile.shape)
