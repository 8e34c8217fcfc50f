"""Heads of unlike counts in one pair of buffers, while a token after the other is decoded on a CPU.

What a token costs beside reading what is kept is mostly Python and the calls into torch, for each part anew. Here a
token is written to all heads at once, and a part is a view of the buffers and one call of SDPA.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvweave.memory.slots import Slots


class Lane(NamedTuple):
    """A part, as it lies in the buffers: heads that hold equally many, side by side, with room behind each.

    Attributes:
        keys, values: [batch, heads, capacity, dim].
        bias: [batch, heads, 1, capacity], added to the logits; None: nothing is.
        size: slots of each head before any token came.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None
    size: int


class HeadRoom(NamedTuple):
    """Buffers that begin with the slots of a layer's parts.

    Attributes:
        keys, values: [batch, slots of all lanes, dim].
        lanes: one for each part.
        sizes: how many heads each lane has.
        next: int64 [kv_heads], by head, where its first new token goes.
        spare: tokens that there is room for.
    """

    keys: Tensor
    values: Tensor
    lanes: tuple[Lane, ...]
    sizes: list[int]
    next: Tensor
    spare: int

    @classmethod
    @torch.inference_mode(False)  # decoding writes to the buffers, in inference mode or outside
    def of(cls, parts: Sequence[Slots], back: Tensor | None, spare: int) -> "HeadRoom":
        """Room for `spare` tokens behind what the parts hold.

        Args:
            back: int64 [kv_heads], where each head is in the parts; None: in order.
        """
        batch, sizes = parts[0].keys.shape[0], [part.keys.shape[1] for part in parts]
        total = sum(heads * (part.count + spare) for part, heads in zip(parts, sizes, strict=True))
        keys, values = (x.new_empty(batch, total, x.shape[-1]) for x in (parts[0].keys, parts[0].values))
        lanes: list[Lane] = []
        ends: list[int] = []
        start = 0
        for part, heads in zip(parts, sizes, strict=True):
            capacity, stop = part.count + spare, start + heads * (part.count + spare)
            own = [x[:, start:stop].unflatten(1, (heads, capacity)) for x in (keys, values)]
            for whole, old in zip(own, (part.keys, part.values), strict=True):
                whole[:, :, : part.count] = old
            bias = part.added(part.keys.dtype)
            if bias is not None:
                bias = F.pad(bias, (0, spare))[:, :, None]
            lanes.append(Lane(own[0], own[1], bias, part.count))
            ends += range(start + part.count, stop, capacity)
            start = stop
        following = torch.tensor(ends, device=keys.device)
        return cls(keys, values, tuple(lanes), sizes, following if back is None else following[back], spare)

    def write(self, keys: Tensor, values: Tensor, before: int) -> None:
        """Put new tokens [batch, kv_heads, new, dim] behind the `before` that came before them."""
        at, new = self.next + before, keys.shape[2]
        if new > 1:
            at = (at[:, None] + torch.arange(new, device=at.device)).flatten()
        self.keys.index_copy_(1, at, keys.flatten(1, 2))
        self.values.index_copy_(1, at, values.flatten(1, 2))

    def attend(self, query: Tensor, new: int, scaling: float | None) -> Tensor:
        """Attention of one token.

        Args:
            query: [batch, kv_heads, group, dim], heads as the lanes hold them.
            new: tokens behind what the lanes held.
        Returns:
            [batch, kv_heads, group, value_dim], alike.
        """
        outs = []
        for (keys, values, bias, size), own in zip(self.lanes, query.split(self.sizes, 1), strict=True):
            slots = size + new
            mask = None if bias is None else bias.narrow(3, 0, slots)
            keys, values = keys.narrow(2, 0, slots), values.narrow(2, 0, slots)
            outs.append(F.scaled_dot_product_attention(own, keys, values, mask, scale=scaling))
        return torch.cat(outs, 1)
