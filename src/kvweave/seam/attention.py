"""Attention to what a compressed layer holds, by the model's own attention function.

A twin of each attention implementation calls the same base function, after it has picked from the model's mask the
columns that the layer's slots stand for, and then tells the layer what it read. Queries and keys arrive here after
norm and rotary whatever the architecture.
"""

import copy
import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvweave.memory.attend import attend, attend_packed, attend_uneven
from kvweave.memory.fixed import FixedSlots
from kvweave.memory.packed import PackedSlots
from kvweave.memory.slots import Slots
from kvweave.ops.statistics import AttentionRule
from kvweave.seam.layer import Link

PREFIX = "kvweave_"


def _base_attention(module: nn.Module, base: str) -> Callable[..., Any]:
    """The attention function that the module's own file would have called."""
    home = sys.modules[type(module).__module__]
    table = getattr(home, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    return table.get_interface(base, getattr(home, "eager_attention_forward", None))


def _slot_mask(slots: Slots | FixedSlots, mask: Tensor | None, queries: Tensor) -> Tensor | None:
    """The model's mask, which speaks of logical columns, at the slots that a compressed layer holds.

    Args:
        mask: [batch or 1, heads or 1, new, columns], boolean or additive; None: causal.
        queries: [batch, heads, new, dim].
    Returns:
        [batch, kv_heads or heads, new, slots], or None where every slot is seen.
    """
    if isinstance(slots, FixedSlots):
        return slots.bias[:, :, None]
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
        columns = positions.clamp(min=0)[:, :, None].expand(batch, kv_heads, new, count)
        if mask.shape[1] not in (1, kv_heads):  # a mask of its own for each query head
            columns = columns.repeat_interleave(heads // kv_heads, 1)
        seen = mask.expand(batch, columns.shape[1], new, mask.shape[-1]).gather(-1, columns)
    if slots.has_empty:
        hidden = _by_head(positions[:, :, None] < 0, seen.shape[1])
        seen = seen & ~hidden if seen.dtype == torch.bool else seen.masked_fill(hidden, torch.finfo(seen.dtype).min)
    if slots.bias is not None:
        bias = _by_head(slots.bias[:, :, None].to(queries.dtype), seen.shape[1])
        least = torch.finfo(queries.dtype).min
        return torch.where(seen, bias, least) if seen.dtype == torch.bool else seen + bias
    return seen


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[batch, kv_heads or heads, ...] -> [batch, heads, ...]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _attend(
    function: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slots: Slots | PackedSlots | FixedSlots,
    options: dict[str, Any],
) -> tuple[Any, Tensor | None]:
    """Attention to one block's slots, and the mask that it used."""
    plain = _one_token_of_sdpa(function, query, options) and not isinstance(module, _Presented)
    if isinstance(slots, PackedSlots):
        if plain and not options.get("dropout"):
            mask = _slot_mask(slots.outlined(), mask, query)
            return (attend_packed(query, slots, mask, options.get("scaling")), None), mask
        slots = slots.unpacked()
        key, value = slots.keys, slots.values
    compressed = isinstance(slots, FixedSlots) or slots.positions is not None
    if isinstance(module, _Presented):  # flash attention: new slots are the last, and it masks nothing but padding
        if isinstance(slots, FixedSlots):
            raise ValueError("flash attention reads no reserved room: allowed is sdpa or eager")
        if compressed:
            mask = slots.positions_of_all()[:, 0] >= 0 if slots.has_empty else None
        return function(module, query, key, value, mask, **options), None
    mask = _slot_mask(slots, mask, query)
    if compressed and plain:
        out = attend(query, key, value, mask, options.get("scaling"), options.get("dropout", 0.0))
        return (out, None), mask
    mask = mask if mask is None or mask.shape[1] == 1 else _by_head(mask, query.shape[1])
    if compressed and mask is not None:
        options = options | {"is_causal": False}  # the mask says it all
    return function(module, query, key, value, mask, **options), mask


def _one_token_of_sdpa(function: Callable[..., Any], query: Tensor, options: dict[str, Any]) -> bool:
    """One token, and nothing that transformers' SDPA takes beside a mask."""
    return query.shape[2] == 1 and function is sdpa_attention_forward and options.get("position_bias") is None


def _attend_by_head(
    function: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    mask: Tensor | None,
    blocks: tuple[Slots | PackedSlots | FixedSlots, ...],
    options: dict[str, Any],
) -> tuple[Any, Tensor | None]:
    """Attention where each KV head holds a count of its own: only what is kept is read.

    One token is one launch on a GPU; else there is a call for each head.
    """
    known = mask is None or all(isinstance(block, FixedSlots) for block in blocks)  # those say what is hidden
    if known and _one_token_of_sdpa(function, query, options) and not options.get("dropout"):
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
        out, used = _attend(function, module, query[:, part], slots.keys, slots.values, own, block, given)
        outs.append(out)
        masks.append(used)
    weights = None  # attention weights of heads that hold different counts do not make a tensor
    out = torch.cat([o[0] for o in outs], 2)
    if query.shape[2] == 1 or any(m is None for m in masks):
        return (out, weights), None
    count = max(m.shape[-1] for m in masks if m is not None)
    padded = [_hidden_in_front(_by_head(m, group), count) for m in masks if m is not None]
    return (out, weights), torch.cat(padded, 1)


def _hidden_in_front(mask: Tensor, count: int) -> Tensor:
    """`mask` [batch, heads, new, slots] for `count` slots, those added in front unseen."""
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return F.pad(mask, (count - mask.shape[-1], 0), value=hidden)


class _Presented:
    """A module whose config names the base implementation: flash attention looks its kernels up by that name."""

    def __init__(self, module: nn.Module, base: str) -> None:
        self._module = module
        config: Any = module.config
        self.config = copy.copy(config)
        self.config._attn_implementation_internal = base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _attention(base: str) -> Callable[..., Any]:
    presented: weakref.WeakKeyDictionary[nn.Module, _Presented] = weakref.WeakKeyDictionary()

    def as_base(module: nn.Module) -> Any:
        if "flash" not in base:
            return module
        if module not in presented:
            presented[module] = _Presented(module, base)
        return presented[module]

    def kvweave_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        function = _base_attention(module, base)
        link: Link | None = getattr(key, "_kvweave", None)
        if link is None:
            return function(as_base(module), query, key, value, attention_mask, **kwargs)
        if query.shape[2] == 1 and link.layer.conversation.sees_all and link.compressed:
            attention_mask = None  # it hides padding alone, which is not kept
        if len(link.blocks) == 1:
            out, mask = _attend(function, as_base(module), query, key, value, attention_mask, link.blocks[0], kwargs)
        else:
            out, mask = _attend_by_head(function, as_base(module), query, attention_mask, link.blocks, kwargs)
        scaling = kwargs.get("scaling")
        rule = AttentionRule(
            query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"),
        )
        link.layer.rotated = getattr(module, "use_rope", True) not in (False, 0)
        link.layer.after_attention(query, rule, mask)
        return out

    return kvweave_attention


@functools.cache
def twin(base: str) -> str:
    """Name of kvweave's twin of an attention implementation, made known to transformers."""
    name = PREFIX + base.replace(
        "flash_attention_", "fa"
    )  # with "flash" in it, transformers looks for a kernel so called
    AttentionInterface.register(name, _attention(base))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def interleaved(module: nn.Module) -> bool:
    """How the module's own file pairs channels in rotary: (2m, 2m + 1), else (m, m + dim / 2)."""
    home = sys.modules[type(module).__module__]
    names = ("rotate_half_llm", "rotate_half_text", "rotate_half")
    swap = next((getattr(home, name) for name in names if hasattr(home, name)), None)
    return swap is not None and bool(swap(torch.arange(1.0, 5.0)).tolist() == [-2.0, 1.0, -4.0, 3.0])
