"""The plain model with everything in its cache, told what to see of it: what a cut must equal.

Attention is computed here, in float64, for the layers and heads that a `Cut` speaks of, and by the model's own
function elsewhere. It stands under the name that the model has, because some drop their masks under another.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from kvweave import CompressedCache
from kvweave.seam import lookup


@dataclass
class Asked:
    """What a layer's attention was called with for a prompt.

    Attributes:
        query: [batch, heads, length, dim]; key, value: [batch, kv_heads, length, dim].
        mask: the model's, or None.
        options: by keyword.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]


@dataclass
class Cut:
    """What queries from column `start` on see of the columns before it, by layer; and what the prompt asked there.

    Attributes:
        start: length of the prompt.
        bias: float64 [batch, kv_heads, start], added to the logits; -inf: not seen.
        contents: keys and values [batch, kv_heads, start, dim] in place of the model's own, or None.
        asked: by layer, noted while the oracle runs.
    """

    start: int
    bias: dict[int, Tensor] = field(default_factory=dict)
    contents: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    asked: dict[int, Asked] = field(default_factory=dict)

    @classmethod
    def of(cls, cache: CompressedCache, start: int, *, merged: bool) -> "Cut":
        """The cut that a cache made at column `start`, read from its public attributes.

        Args:
            merged: what lies in its slots counts, not what the model has at their columns.
        """
        cut = cls(start)
        for number, layer in enumerate(cache.layers):
            if not any(layer is compressed for compressed in cache.compressed_layers) or layer.keys is None:
                continue
            assert layer.positions is not None
            real = (layer.positions >= 0) & (layer.positions < start)
            columns = layer.positions.clamp(max=start).masked_fill(~real, start)  # one column more, for all others
            seen = torch.full((*columns.shape[:2], start + 1), -torch.inf, dtype=torch.float64)
            bias = torch.zeros_like(columns, dtype=torch.float64) if layer.bias is None else layer.bias.double()
            cut.bias[number] = seen.scatter(-1, columns, bias)[..., :start]
            if merged:
                cut.contents[number] = _at(layer.keys, columns, start), _at(layer.values, columns, start)
        return cut


def _at(x: Tensor, columns: Tensor, start: int) -> Tensor:
    """Slots [batch, kv_heads, slots, dim] at their columns: [batch, kv_heads, start, dim]."""
    whole = x.new_zeros(*x.shape[:2], start + 1, x.shape[3])
    return whole.scatter(2, columns[..., None].expand_as(x), x)[:, :, :start]


@contextlib.contextmanager
def masked(model: Any, cut: Cut) -> Iterator[None]:
    """Inside, the model's decoder sees what the cut leaves, and `cut.asked` is noted."""
    decoder = model.config.get_text_config(decoder=True)
    base = lookup.implementation(decoder)
    found = lookup.registered(base)

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **options: Any,
    ) -> Any:
        own = found or lookup.eager_function(type(module))
        assert own is not None
        number = getattr(key, "_layer", None)  # a module may be run as several layers, or read another one's keys
        if number is None and getattr(module, "config", None) is decoder:
            number = getattr(module, "layer_idx", None)
        if number is not None:
            if key.shape[2] == query.shape[2] == cut.start:
                cut.asked.setdefault(number, Asked(query, key, value, attention_mask, options))
            if number in cut.bias and key.shape[2] - query.shape[2] >= cut.start:
                return _attend(query, key, value, attention_mask, cut, number, options), None
        return own(module, query, key, value, attention_mask, *args, **options)

    update = Cache.update

    def telling(cache: Cache, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        keys, values = update(cache, key, value, layer_idx, *args, **kwargs)
        keys = keys.view_as(keys)
        keys._layer = layer_idx  # type: ignore[attr-defined]
        return keys, values

    lookup.register(base, attention)
    Cache.update = telling  # type: ignore[method-assign]
    try:
        yield
    finally:
        Cache.update = update  # type: ignore[method-assign]
        lookup.register(base, found)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cut: Cut, number: int, options: dict[str, Any]
) -> Tensor:
    """Attention of tokens behind the prompt: [batch, new, heads, dim]."""
    heads, new, dim = query.shape[1:]
    columns = key.shape[2]
    if number in cut.contents:
        pairs = zip(cut.contents[number], (key, value), strict=True)
        key, value = (torch.cat([cut_one, own[:, :, cut.start :]], 2) for cut_one, own in pairs)
    group = heads // key.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (key, value))
    scaling = options.get("scaling")
    logits = query.double() @ k.transpose(-1, -2) * (dim**-0.5 if scaling is None else scaling)
    if options.get("softcap") is not None:
        logits = torch.tanh(logits / options["softcap"]) * options["softcap"]
    causal = torch.arange(columns) > torch.arange(columns - new, columns)[:, None]
    if mask is None:
        logits = logits.masked_fill(causal, -torch.inf)
    elif mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask[..., :columns], -torch.inf)
    else:
        shown = mask[..., :columns].double()
        logits = logits + shown.masked_fill(shown < -1e4, -torch.inf)
    bias = cut.bias[number].repeat_interleave(heads // cut.bias[number].shape[1], 1)
    logits[..., : cut.start] += bias[:, :, None]
    sinks = options.get("s_aux")
    if sinks is not None:
        logits = torch.cat(
            [logits, sinks.double().expand(len(logits), heads)[:, :, None, None].expand_as(logits[..., :1])], -1
        )
    weights = logits.softmax(-1)[..., :columns]
    return (weights @ v).to(query.dtype).transpose(1, 2).contiguous()
