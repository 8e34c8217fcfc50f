"""Attention of one decoded token over what memory holds: each key is read once, whatever holds it.

The query heads of a KV head are the rows of one product. On a GPU kernels split the slots over the chip
(`kvweave.ops.decode`); elsewhere torch's own attention is called.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvweave.memory.fixed import FixedSlots
from kvweave.memory.packed import PackedSlots
from kvweave.memory.slots import Slots
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
    if not dropout and _by_kernel(mask, kv_heads, query, key, value):
        from kvweave.ops import decode

        bias = None if mask is None else _bias(mask, query.dtype).expand(key.shape[:3])
        out = decode.attend(rows, key, value, bias, dim**-0.5 if scaling is None else scaling)
    else:
        if mask is not None and mask.shape[1] == heads:
            mask = mask.reshape(mask.shape[0], kv_heads, -1, mask.shape[-1])
        out = F.scaled_dot_product_attention(rows, key, value, mask, dropout, scale=scaling)
    return out.reshape(batch, 1, heads, value.shape[-1])


def attend_few_bits(query: Tensor, slots: PackedSlots, mask: Tensor | None, scaling: float | None) -> Tensor:
    """The same over slots in few bits, of which the whole is not written out.

    A mask of its own for each query head is: nothing but such a mask needs it.
    """
    batch, heads, _, dim = query.shape
    rest, kv_heads = slots.rest, slots.rest.keys.shape[1]
    if mask is not None and mask.shape[1] not in (1, kv_heads):
        whole = slots.unpacked()
        return attend(query, whole.keys, whole.values, mask, scaling)
    group = slots.setting.group
    if group >= 16 and group & (group - 1) == 0 and _by_kernel(mask, kv_heads, query, rest.keys, rest.values):
        from kvweave.ops.decode import attend_packed
    else:
        from kvweave.ops.packed_attention import attend_packed
    rows = query.reshape(batch, kv_heads, -1, dim)
    shape = batch, kv_heads, slots.packed + rest.count
    bias = None if mask is None else _bias(mask, query.dtype).expand(shape)
    scaling = dim**-0.5 if scaling is None else scaling
    out = attend_packed(rows, slots.keys, slots.values, (rest.keys, rest.values), bias, scaling)
    return out.reshape(batch, 1, heads, -1)


def attend_uneven(
    query: Tensor, blocks: Sequence[Slots | PackedSlots | FixedSlots], scaling: float | None
) -> Tensor | None:
    """The same where each KV head holds a count of its own; None where that is no single launch."""
    rooms = [_room(block) for block in blocks]
    keys = [block.keys for block in blocks if not isinstance(block, PackedSlots)]
    values = [block.values for block in blocks if not isinstance(block, PackedSlots)]
    biases = [bias for held, bias in rooms if held and bias is not None]
    even = all(held for held, _ in rooms) and len(biases) in (0, len(blocks))
    if not even or not _by_kernel(None, 1, query, *keys, *values):
        return None
    from kvweave.ops import decode

    batch, heads, _, dim = query.shape
    tails = {block.tail if isinstance(block, Slots) else 0 for block in blocks}
    out = decode.attend_uneven(
        query.reshape(batch, len(blocks), -1, dim),
        keys,
        values,
        biases or None,
        dim**-0.5 if scaling is None else scaling,
        tail=tails.pop() if len(tails) == 1 else 0,
    )
    return out.reshape(batch, 1, heads, -1)


def _room(block: Slots | PackedSlots | FixedSlots) -> tuple[bool, Tensor | None]:
    """Whether the block's slots begin a buffer with a bias of as many slots or without one, and that bias."""
    if isinstance(block, FixedSlots):
        return True, block.bias
    if isinstance(block, PackedSlots) or block.room is None:
        return False, None
    bias = block.added(block.keys.dtype)
    return block.room.bias is not None or bias is None, bias


def _by_kernel(mask: Tensor | None, kv_heads: int, *tensors: Tensor) -> bool:
    """A kernel reads these: on a GPU, a mask that the query heads of a KV head share, nothing to differentiate.

    What torch compiles it fuses by itself.
    """
    shared = mask is None or mask.shape[1] in (1, kv_heads)
    if not shared or torch.compiler.is_compiling():
        return False
    return fused(*tensors) and not any(x.requires_grad for x in tensors)


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask [batch or 1, 1 or kv_heads, 1, slots] as what is added to the logits, without its third dimension."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    return mask[:, :, 0]
