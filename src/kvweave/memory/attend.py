"""Attention of one decoded token over what memory holds: each key is read once, whatever holds it.

The query heads of a KV head are the rows of one product. On a GPU kernels split the slots over the chip
(`kvweave.ops.decode`); elsewhere torch's own attention is called.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvweave.ops.device import fused


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, dropout: float = 0.0
) -> Tensor:
    """Attention over slots that all heads hold as many of.

    Args:
        query: [batch, heads, 1, dim]; key, value: [batch, kv_heads, slots, dim].
        mask: [batch or 1, 1 or kv_heads or heads, 1, slots], boolean or additive, or None.
        scaling: of the logits; None: dim ** -0.5.
        dropout: of the probabilities.
    Returns:
        [batch, 1, heads, dim].
    """
    batch, heads, _, dim = query.shape
    kv_heads = key.shape[1]
    rows = query.reshape(batch, kv_heads, -1, dim)
    if not dropout and by_kernel(mask, kv_heads, query, key, value):
        from kvweave.ops import decode

        bias = None if mask is None else as_bias(mask, query.dtype).expand(key.shape[:3])
        out = decode.attend(rows, key, value, bias, dim**-0.5 if scaling is None else scaling)
    else:
        if mask is not None and mask.shape[1] == heads:
            mask = mask.reshape(mask.shape[0], kv_heads, -1, mask.shape[-1])
        out = F.scaled_dot_product_attention(rows, key, value, mask, dropout, scale=scaling)
    return out.reshape(batch, 1, heads, value.shape[-1])


def by_kernel(mask: Tensor | None, kv_heads: int, *tensors: Tensor) -> bool:
    """A kernel reads these: on a GPU, a mask that the query heads of a KV head share, nothing to differentiate.

    What torch compiles it fuses by itself.
    """
    shared = mask is None or mask.shape[1] in (1, kv_heads)
    if not shared or torch.compiler.is_compiling():
        return False
    return fused(*tensors) and not any(x.requires_grad for x in tensors)


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask [batch or 1, 1 or kv_heads, 1, slots] as what is added to the logits, without its third dimension."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    return mask[:, :, 0]
