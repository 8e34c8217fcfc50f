"""Into which kept token a dropped one goes: the nearest by key cosine."""

import torch
import torch.nn.functional as F
from torch import Tensor

_SIMILARITIES = 1 << 20  # cosines at a time


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [batch, kv_heads, n] of `x` [batch, kv_heads, length, dim]: [batch, kv_heads, n, dim]."""
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))


def unit(keys: Tensor) -> Tensor:
    """Keys of length one, float32 or wider; norms are clamped at 1e-12."""
    return F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1, eps=1e-12)


def nearest(
    keys: Tensor,
    source: Tensor,
    target: Tensor,
    allowed: Tensor | None = None,
    label: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The target of largest key cosine for each source; ties go to the lower target (METHODS 2.2).

    Args:
        keys: [batch, kv_heads, length, dim].
        source: int64 [batch, kv_heads, sources], positions; target: int64 [batch, kv_heads, targets], ascending.
        allowed: bool [batch, kv_heads, labels, targets]: which targets a source of each label may choose.
        label: int64 [batch, kv_heads, sources], with `allowed`.
    Returns:
        index into `target`, int64 [batch, kv_heads, sources], -1 where none is allowed; and the
        cosine, 0 there.
    """
    batch, kv_heads, sources = source.shape
    goals = unit(take(keys, target))  # [batch, kv_heads, targets, dim]
    index = torch.empty_like(source)
    cosine = torch.empty(source.shape, dtype=goals.dtype, device=keys.device)
    step = max(1, _SIMILARITIES // max(1, batch * kv_heads * target.shape[-1]))
    for start in range(0, sources, step):
        part = source[..., start : start + step]
        similarity = torch.matmul(unit(take(keys, part)), goals.mT)  # [batch, kv_heads, step, targets]
        if allowed is not None:
            assert label is not None
            which = label[..., start : start + step, None].expand(*part.shape, target.shape[-1])
            similarity.masked_fill_(~allowed.gather(2, which), -torch.inf)
        best, at = similarity.max(-1)
        nothing = best == -torch.inf
        index[..., start : start + step] = at.masked_fill_(nothing, -1)
        cosine[..., start : start + step] = best.masked_fill_(nothing, 0)
    return index, cosine
