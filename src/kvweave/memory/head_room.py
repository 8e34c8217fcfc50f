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


class Layout(NamedTuple):
    """A layer's parts in one pair of buffers, one head after the other, with room behind each.

    Attributes:
        keys, values: [batch, slots of all heads, dim]; what lies in the room is not written.
        views: of each part's keys and values, [batch, heads, capacity, dim].
        ends: int64 [kv_heads], by head as the parts hold them, where its room begins.
    """

    keys: Tensor
    values: Tensor
    views: list[tuple[Tensor, Tensor]]
    ends: Tensor

    @classmethod
    def of(cls, parts: Sequence[Slots], capacities: Sequence[int]) -> "Layout":
        """Parts whose heads take so many slots each, room included."""
        sizes = [part.keys.shape[1] for part in parts]
        lengths = [heads * capacity for heads, capacity in zip(sizes, capacities, strict=True)]
        keys, values = (x.new_empty(x.shape[0], sum(lengths), x.shape[3]) for x in parts[0].tensors)
        views: list[tuple[Tensor, Tensor]] = []
        ends: list[int] = []
        start = 0
        for part, heads, capacity in zip(parts, sizes, capacities, strict=True):
            stop = start + heads * capacity
            own = keys[:, start:stop].unflatten(1, (heads, capacity)), values[:, start:stop].unflatten(1, (heads, -1))
            for view, old in zip(own, part.tensors, strict=True):
                view[:, :, : part.count] = old
            views.append(own)
            ends += range(start + part.count, stop + part.count, capacity)
            start = stop
        return cls(keys, values, views, torch.tensor(ends, device=keys.device))


class HeadRoom(NamedTuple):
    """Buffers that begin with the slots of a layer's parts.

    Attributes:
        keys, values: [batch, slots of all lanes, dim].
        lanes: one for each part.
        sizes: how many heads each lane has.
        places: for each token to come int64 [kv_heads], by head, where it goes.
    """

    keys: Tensor
    values: Tensor
    lanes: tuple[Lane, ...]
    sizes: list[int]
    places: tuple[Tensor, ...]

    @property
    def spare(self) -> int:
        """Tokens that there is room for."""
        return len(self.places)

    @classmethod
    @torch.inference_mode(False)  # decoding writes to the buffers, in inference mode or outside
    def of(cls, parts: Sequence[Slots], back: Tensor | None, spare: int) -> "HeadRoom":
        """Room for `spare` tokens behind what the parts hold.

        Args:
            back: int64 [kv_heads], where each head is in the parts; None: in order.
        """
        layout = Layout.of(parts, [part.count + spare for part in parts])
        biases = [part.added(part.keys.dtype) for part in parts]
        padded = [None if bias is None else F.pad(bias, (0, spare))[:, :, None] for bias in biases]
        lanes = [
            Lane(keys, values, bias, part.count)
            for part, (keys, values), bias in zip(parts, layout.views, padded, strict=True)
        ]
        ends = layout.ends if back is None else layout.ends[back]
        places = ends + torch.arange(spare, device=ends.device)[:, None]  # [spare, kv_heads]
        sizes = [part.keys.shape[1] for part in parts]
        return cls(layout.keys, layout.values, tuple(lanes), sizes, places.unbind())

    def write(self, keys: Tensor, values: Tensor, before: int) -> None:
        """Put new tokens [batch, kv_heads, new, dim] behind the `before` that came before them."""
        new = keys.shape[2]
        at = self.places[before] if new == 1 else torch.stack(self.places[before : before + new], 1).flatten()
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
        for (keys, values, bias, size), own in zip(self.lanes, query.split_with_sizes(self.sizes, 1), strict=True):
            slots = size + new
            mask = None if bias is None else bias.narrow(3, 0, slots)
            keys, values = keys.narrow(2, 0, slots), values.narrow(2, 0, slots)
            outs.append(F.scaled_dot_product_attention(own, keys, values, mask, scale=scaling))
        return torch.cat(outs, 1)
