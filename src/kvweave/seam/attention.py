"""Attention to what a compressed layer holds, by the model's own attention function.

It picks from the model's mask the columns that the layer's slots stand for, calls the function, and tells the layer
what was read. Queries and keys arrive here after norm and rotary whatever the architecture.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvweave.memory.block import Block
from kvweave.memory.heads import RaggedHeads, for_flash, ragged
from kvweave.memory.masks import by_head
from kvweave.ops.statistics import AttentionRule
from kvweave.seam.layer import Link
from kvweave.seam.lookup import output_projection
from kvweave.seam.parts import by_flash, by_part

#: What an attention function returns, and the mask that it used, at the slots.
Read = tuple[Any, Tensor | None]


@dataclass(frozen=True)
class Attention:
    """The model's own attention: what a module calls, and with what.

    Attributes:
        function: takes the module, query, key, value and mask, and the options by keyword.
        base: the implementation's name.
        options: scaling, dropout, sinks, ...
    """

    function: Callable[..., Any]
    base: str
    module: nn.Module
    options: dict[str, Any]

    @property
    def scaling(self) -> float | None:
        return self.options.get("scaling")

    @property
    def is_sdpa(self) -> bool:
        """Nothing that transformers' SDPA takes beside a mask."""
        return self.function is sdpa_attention_forward and self.options.get("position_bias") is None

    def of_heads(self, heads: slice | Tensor) -> "Attention":
        """The same for some query heads."""
        sinks = self.options.get("s_aux")
        options = self.options if sinks is None else self.options | {"s_aux": sinks[heads]}
        return Attention(self.function, self.base, self.module, options)

    def output(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any) -> Any:
        """What the module's attention says; a method by name, which torch 2.11 can compile where it was made."""
        return self.function(self.module, query, key, value, mask, **(self.options | more))


def _to_block(
    attention: Attention, query: Tensor, tensors: tuple[Tensor, Tensor] | None, mask: Tensor | None, block: Block
) -> Read:
    """Attention to heads that hold equally many slots.

    Args:
        tensors: keys and values as the module was given them; None: the block has them packed.
        mask: the model's.
    """
    mask = block.mask(mask, query)
    if query.shape[2] == 1 and attention.is_sdpa:
        out = block.attend(query, mask, attention.scaling, attention.options.get("dropout", 0.0))
        if out is not None:
            return (out, None), mask
    if tensors is None:
        tensors = block.as_slots().tensors
    more: dict[str, Any] = {}
    if block.has_positions:
        if mask is None and attention.base == "eager":  # some eager functions do not do without one
            mask = query.new_zeros(1, 1, query.shape[2], tensors[0].shape[2])
        if mask is not None:
            more = {"is_causal": False}  # the mask says it all
    mask = mask if mask is None or mask.shape[1] == 1 else by_head(mask, query.shape[1])
    return attention.output(query, *tensors, mask, **more), mask


def _read(attention: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, link: Link) -> Read:
    block, tensors = link.block, None if link.values is None else (key, value)
    if "flash" in attention.base:
        slots = for_flash(block, mask)
        if len(slots) > 1:
            return by_part(attention, query, mask, RaggedHeads(tuple(slots)), by_flash)
        return by_flash(attention, query, tensors, mask, slots[0])
    heads = ragged(block) if tensors is None else None  # such a block has none of its own
    if heads is None:
        return _to_block(attention, query, tensors, mask, block)
    if query.shape[2] == 1 and attention.is_sdpa:
        out = block.attend(query, mask, attention.scaling, attention.options.get("dropout", 0.0))
        if out is not None:
            return (out, None), None
    return by_part(attention, query, mask, heads, _to_block)


def _left_behind(link: Link, value: Tensor) -> bool:
    """Attention reads other values than those that were handed out with the keys."""
    handed = link.values
    if handed is None or torch.compiler.is_compiling():
        return False
    return value.shape != handed.shape or value.data_ptr() != handed.data_ptr()


def _weighs_slots(mask: Tensor | None) -> bool:
    """A mask that the module made itself: it adds other numbers than masks do, to each head's logits others."""
    if mask is None or mask.dim() != 4 or mask.shape[1] == 1 or not mask.is_floating_point():
        return False
    return not torch.compiler.is_compiling() and bool(((mask != 0) & (mask > torch.finfo(mask.dtype).min / 2)).any())


def reader_of(
    base: str, original: Callable[..., Any] | None, own: Callable[[type], Any], passed: Callable[..., None]
) -> Any:
    """What models find under an implementation's name: it reads the keys that carry a link, and passes on the others.

    Args:
        base: the name.
        original: the function that stood there; None: `own` says which one a class of modules calls.
        passed: is told of modules whose keys carry no link.
    """

    def kvweave_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        function = original or own(type(module))
        link: Link | None = getattr(key, "_kvweave", None)
        if link is None:
            if not torch.compiler.is_compiling():
                passed(module)
            return function(module, query, key, value, attention_mask, *args, **kwargs)
        attention = Attention(function, base, module, kwargs)
        return read(attention, query, key, value, attention_mask, link)

    return kvweave_attention


def read(attention: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, link: Link) -> Any:
    """Attention to a compressed layer, which is then told what was read."""
    layer, block, options = link.layer, link.block, attention.options
    if not layer.why and _left_behind(link, value):  # what a head reads may be of several heads' tokens
        layer.why = "values are transformed after the cache"
    elif not layer.why and not block.has_positions and _weighs_slots(mask):
        layer.why = "attention adds a bias of each head's own"
    if query.shape[2] == 1 and layer.shared.turn.sees_all and block.has_positions:
        mask = None  # it hides nothing of what is kept
    out, mask = _read(attention, query, key, value, mask, link)
    scaling = query.shape[-1] ** -0.5 if attention.scaling is None else attention.scaling
    rule = AttentionRule(scaling, softcap=options.get("softcap"), sinks=options.get("s_aux"))
    if layer.shared.needs.projection:
        layer.prompt_cut.projection = output_projection(attention.module, query.shape[1] * value.shape[-1])
    layer.prompt_cut.rotated = getattr(attention.module, "use_rope", True) not in (False, 0)
    layer.after_attention(query, rule, mask)
    return out
