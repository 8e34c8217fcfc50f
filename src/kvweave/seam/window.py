"""A sliding layer, which is not compressed, in buffers of fixed shape and address for compiled decode steps."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer


class FixedWindow(DynamicSlidingWindowLayer):
    """The last `sliding_window` tokens, where a step changes tensors alone, whether the window is full or not.

    Attributes:
        keys, values: [batch, kv_heads, sliding_window, dim], earliest first; slots that are not filled come last.
        count: int64 [], every token seen.
        grown: the layer that it stands in for.
    """

    is_compileable = True
    count: Tensor
    grown: DynamicSlidingWindowLayer

    @classmethod
    @torch.inference_mode(False)
    def of(cls, layer: DynamicSlidingWindowLayer) -> "FixedWindow":
        """What the layer holds, with room for the tokens to come."""
        window, seen = layer.sliding_window, layer.cumulative_length
        fixed = cls(window)
        fixed.grown, fixed.device, fixed.is_initialized = layer, layer.device, True
        fixed.keys, fixed.values = (x.new_zeros(*x.shape[:2], window, x.shape[3]) for x in (layer.keys, layer.values))
        first = 0 if seen < window else 1  # a full window moves on by one when a token comes
        held = layer.keys.shape[2]
        fixed.keys[:, :, first : first + held] = layer.keys
        fixed.values[:, :, first : first + held] = layer.values
        fixed.count = torch.tensor(seen, device=layer.device)
        for tensor in (fixed.keys, fixed.values, fixed.count):
            torch._dynamo.mark_static_address(tensor)
        return fixed

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take one token in."""
        last = self.sliding_window - 1
        slots = torch.arange(self.sliding_window, device=self.count.device)
        moved = (slots + (self.count > last)).clamp(max=last)
        at = self.count.clamp(max=last).view(1)
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            held.copy_(held.index_select(2, moved))
            held.index_copy_(2, at, new)
        self.count.add_(1)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the buffers and the first of them (a host synchronisation)."""
        return self.sliding_window, max(int(self.count) - self.sliding_window + 1, 0)

    def get_seq_length(self) -> Any:
        return self.count

    def released(self) -> DynamicSlidingWindowLayer:
        """The layer that it stood in for, with what has come since (a host synchronisation)."""
        layer, seen = self.grown, int(self.count)
        held = slice(0, seen) if seen < self.sliding_window else slice(1, None)
        layer.keys, layer.values, layer.cumulative_length = self.keys[:, :, held], self.values[:, :, held], seen
        return layer


def fixes(layer: Any) -> bool:
    """A sliding layer that can lie in fixed buffers: not one that keeps what drafts may take back."""
    return type(layer) is DynamicSlidingWindowLayer and not getattr(layer, "record_past", False)


def fix(cache: Cache) -> None:
    """Lay the sliding layers of a cache in fixed buffers."""
    cache.layers[:] = [FixedWindow.of(x) if fixes(x) and x.is_initialized else x for x in cache.layers]


def release(cache: Cache) -> None:
    """Leave them."""
    cache.layers[:] = [x.released() if isinstance(x, FixedWindow) else x for x in cache.layers]
