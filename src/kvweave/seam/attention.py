"""Attention to what a compressed layer holds, by the model's own attention function.

It picks from the model's mask the columns that the layer's slots stand for, calls the function, and tells the layer
what was read. Queries and keys arrive here after norm and rotary whatever the architecture.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvweave.memory.attend import attend, attend_few_bits, attend_uneven
from kvweave.memory.fixed import FixedSlots
from kvweave.memory.packed import PackedSlots
from kvweave.memory.slots import Slots
from kvweave.ops.statistics import AttentionRule
from kvweave.seam.layer import Link


def _slot_mask(slots: Slots | FixedSlots, mask: Tensor | None, queries: Tensor) -> Tensor | None:
    """The model's mask, which speaks of logical columns, at the slots that a compressed layer holds.

    Args:
        mask: [batch or 1, heads or 1, new, columns], boolean or additive; None: causal.
        queries: [batch, heads, new, dim].
    Returns:
        [batch, kv_heads or heads, new, slots], or None where every slot is seen.
    """
    if isinstance(slots, FixedSlots):
        bias = slots.bias[:, :, None]
        if mask is None:
            return bias
        shown = _at_columns(mask, slots.positions, queries.shape[1], 1)
        bias, least = _by_head(bias, shown.shape[1]), torch.finfo(bias.dtype).min
        return bias.masked_fill(~shown, least) if shown.dtype == torch.bool else (shown + bias).clamp(min=least)
    if slots.positions is None:
        return mask
    heads, new = queries.shape[1], queries.shape[2]
    if mask is None and new == 1:
        added = slots.added(queries.dtype)
        return None if added is None else added[:, :, None]
    slots = slots.written()
    positions = slots.positions_of_all()
    batch, kv_heads, count = positions.shape
    if mask is None:
        row = torch.arange(count - new, count, device=positions.device)[:, None]
        seen = torch.arange(count, device=positions.device) <= row  # every old slot, and the new ones so far
        seen = seen.expand(batch, kv_heads, new, count)
    else:
        seen = _at_columns(mask, positions, heads, new)
    if slots.has_empty:
        hidden = _by_head(positions[:, :, None] < 0, seen.shape[1])
        seen = seen & ~hidden if seen.dtype == torch.bool else seen.masked_fill(hidden, torch.finfo(seen.dtype).min)
    if slots.bias is not None:
        bias = _by_head(slots.bias[:, :, None].to(queries.dtype), seen.shape[1])
        least = torch.finfo(queries.dtype).min
        return torch.where(seen, bias, least) if seen.dtype == torch.bool else seen + bias
    return seen


def _at_columns(mask: Tensor, positions: Tensor, heads: int, new: int) -> Tensor:
    """`mask` [batch or 1, heads or 1, new, columns] at the slots' `positions` [batch, kv_heads, slots]."""
    batch, kv_heads, count = positions.shape
    columns = positions.clamp(min=0)[:, :, None].expand(batch, kv_heads, new, count)
    if mask.shape[1] not in (1, kv_heads):  # a mask of its own for each query head
        columns = columns.repeat_interleave(heads // kv_heads, 1)
    return mask.expand(batch, columns.shape[1], new, mask.shape[-1]).gather(-1, columns)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[batch, kv_heads or heads, ...] -> [batch, heads, ...]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _attend(
    function: Callable[..., Any],
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slots: Slots | PackedSlots | FixedSlots,
    options: dict[str, Any],
) -> tuple[Any, Tensor | None]:
    """Attention to one block's slots, and the mask that it used."""
    plain = _one_token_of_sdpa(function, query, options)
    if isinstance(slots, PackedSlots):
        if plain and not options.get("dropout"):
            mask = _slot_mask(slots.outlined(), mask, query)
            return (attend_few_bits(query, slots, mask, options.get("scaling")), None), mask
        slots = slots.unpacked()
        key, value = slots.keys, slots.values
    compressed = isinstance(slots, FixedSlots) or slots.positions is not None
    if "flash" in base:  # new slots are the last, and it masks nothing but padding
        if isinstance(slots, FixedSlots):
            raise ValueError("flash attention reads no reserved room: allowed is sdpa or eager")
        if compressed:
            seen = _seen_by_flash(slots, mask)
            mask = None if seen is None else seen[:, 0]
        return function(module, query, key, value, mask, **options), None
    mask = _slot_mask(slots, mask, query)
    if compressed and plain:
        out = attend(query, key, value, mask, options.get("scaling"), options.get("dropout", 0.0))
        return (out, None), mask
    if compressed and mask is None and base == "eager":  # some eager functions do not do without one
        mask = query.new_zeros(1, 1, query.shape[2], key.shape[2])
    mask = mask if mask is None or mask.shape[1] == 1 else _by_head(mask, query.shape[1])
    if compressed and mask is not None:
        options = options | {"is_causal": False}  # the mask says it all
    return function(module, query, key, value, mask, **options), mask


def _one_token_of_sdpa(function: Callable[..., Any], query: Tensor, options: dict[str, Any]) -> bool:
    """One token, and nothing that transformers' SDPA takes beside a mask."""
    return query.shape[2] == 1 and function is sdpa_attention_forward and options.get("position_bias") is None


def _attend_by_head(
    function: Callable[..., Any],
    base: str,
    module: nn.Module,
    query: Tensor,
    mask: Tensor | None,
    blocks: tuple[Slots | PackedSlots | FixedSlots, ...],
    options: dict[str, Any],
) -> tuple[Any, Tensor | None]:
    """Attention where each KV head holds a count of its own: only what is kept is read.

    One token is one launch on a GPU; else there is a call for each head.
    """
    if mask is None and _one_token_of_sdpa(function, query, options) and not options.get("dropout"):
        together = attend_uneven(query, blocks, options.get("scaling"))
        if together is not None:
            return (together, None), None
    group = query.shape[1] // len(blocks)
    outs, masks = [], []
    for head, block in enumerate(blocks):
        part = slice(head * group, (head + 1) * group)
        own = mask[:, part] if mask is not None and mask.dim() == 4 and mask.shape[1] > 1 else mask
        given = options
        if options.get("s_aux") is not None:
            given = options | {"s_aux": options["s_aux"][part]}
        slots = block.rest if isinstance(block, PackedSlots) else block  # packed ones are read from the block
        out, used = _attend(function, base, module, query[:, part], slots.keys, slots.values, own, block, given)
        outs.append(out)
        masks.append(used)
    weights = [o[1] for o in outs if o[1] is not None]  # [batch, group, new, slots], where they were asked for
    together = _together(weights, 0) if weights else None
    out = torch.cat([o[0] for o in outs], 2)
    if query.shape[2] == 1 or any(m is None for m in masks):
        return (out, together), None
    whole = [_by_head(m, group) for m in masks if m is not None]
    hidden = False if whole[0].dtype == torch.bool else torch.finfo(whole[0].dtype).min
    return (out, together), _together(whole, hidden)


def _seen_by_flash(slots: Slots, mask: Tensor | None) -> Tensor | None:
    """Slots that are shown to flash attention, bool [batch, kv_heads, slots]; None: all.

    Args:
        mask: [batch, columns], padding; None: there is none.
    """
    if mask is None and not slots.has_empty:
        return None
    positions = slots.positions_of_all()
    seen = positions >= 0
    if mask is not None:
        seen &= mask.bool().gather(1, positions.clamp(min=0).flatten(1)).view_as(seen)
    return seen


def _for_flash(
    blocks: tuple[Slots | PackedSlots | FixedSlots, ...], mask: Tensor | None
) -> tuple[Slots | PackedSlots | FixedSlots, ...]:
    """The blocks, a single one parted by head where its heads are shown different slots: flash takes one padding."""
    only = blocks[0].unpacked() if isinstance(blocks[0], PackedSlots) else blocks[0]
    if len(blocks) > 1 or isinstance(only, FixedSlots) or only.positions is None:
        return blocks
    seen = _seen_by_flash(only, mask)
    if seen is None or bool((seen == seen[:, :1]).all()):  # flash itself asks the device how much is padding
        return blocks
    return tuple(only.head(n) for n in range(seen.shape[1]))


def _together(parts: list[Tensor], empty: float) -> Tensor:
    """Heads' [batch, group, new, slots] as [batch, heads, new, most slots], `empty` in front where they are fewer."""
    count = max(part.shape[-1] for part in parts)
    return torch.cat([F.pad(part, (count - part.shape[-1], 0), value=empty) for part in parts], 1)


def output_projection(module: nn.Module, width: int) -> Tensor | None:
    """Weight [hidden, width] of what an attention module does to its heads' outputs; None: it is not to be found."""
    for name in ("o_proj", "out_proj", "dense"):
        weight = getattr(getattr(module, name, None), "weight", None)
        if (
            isinstance(weight, Tensor)
            and weight.is_floating_point()
            and weight.dim() == 2
            and weight.shape[1] == width
        ):
            return weight.detach()
    return None


def read(
    function: Callable[..., Any],
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    link: Link,
    options: dict[str, Any],
) -> Any:
    """Attention to a compressed layer, which is then told what was read."""
    if query.shape[2] == 1 and link.layer.conversation.sees_all and link.compressed:
        mask = None  # it hides nothing of what is held
    blocks = _for_flash(link.blocks, mask) if "flash" in base else link.blocks
    if len(blocks) == 1:
        out, mask = _attend(function, base, module, query, key, value, mask, blocks[0], options)
    else:
        out, mask = _attend_by_head(function, base, module, query, mask, blocks, options)
    scaling = options.get("scaling")
    rule = AttentionRule(
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
    )
    if link.layer.conversation.method.projects_values:
        link.layer.projection = output_projection(module, query.shape[1] * value.shape[-1])
    link.layer.rotated = getattr(module, "use_rope", True) not in (False, 0)
    link.layer.after_attention(query, rule, mask)
    return out
