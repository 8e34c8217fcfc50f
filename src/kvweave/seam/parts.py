"""Attention to a compressed layer where one call of the model's function is not enough, or takes no full mask."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kvweave.memory.heads import RaggedHeads
from kvweave.memory.masks import by_head
from kvweave.memory.slots import Slots

if TYPE_CHECKING:
    from kvweave.seam.attention import Attention, Read


def by_flash(
    attention: "Attention", query: Tensor, tensors: tuple[Tensor, Tensor] | None, mask: Tensor | None, slots: Slots
) -> "Read":
    """Attention by flash, to which new slots are the last, and which masks nothing but padding.

    Args:
        mask: [batch, columns], or None.
    """
    if slots.has_positions:
        visible = slots.shown(mask)
        mask = None if visible is None else visible[:, 0]
    return attention.output(query, *(tensors or slots.tensors), mask), None


def by_part(
    attention: "Attention", query: Tensor, mask: Tensor | None, block: RaggedHeads, to: Callable[..., "Read"]
) -> "Read":
    """A call of `to` for each part where heads hold counts of their own: only what is kept is read."""
    outs, masks = [], []
    for part, heads in zip(block.parts, block.query_heads(query), strict=True):
        own = mask[:, heads] if mask is not None and mask.dim() == 4 and mask.shape[1] > 1 else mask
        queries = query[:, heads]
        out, used = to(attention.of_heads(heads), queries, part.tensors, own, part)
        outs.append(out)
        masks.append(None if used is None else by_head(used, queries.shape[1]))
    weights = [o[1] for o in outs if o[1] is not None]  # [batch, heads, new, slots], where they were asked for
    together = block.in_order(_together(weights, 0), 1) if weights else None
    out = block.in_order(torch.cat([o[0] for o in outs], 2), 2)
    own_masks = [m for m in masks if m is not None]
    if query.shape[2] == 1 or len(own_masks) < len(masks):
        return (out, together), None
    hidden = False if own_masks[0].dtype == torch.bool else torch.finfo(own_masks[0].dtype).min
    return (out, together), block.in_order(_together(own_masks, hidden), 1)


def _together(parts: list[Tensor], empty: float) -> Tensor:
    """Heads' [batch, group, new, slots] as [batch, heads, new, most slots], `empty` in front where they are fewer."""
    count = max(part.shape[-1] for part in parts)
    return torch.cat([F.pad(part, (count - part.shape[-1], 0), value=empty) for part in parts], 1)
