"""What must not pass in silence: prompts that filled nothing, keys that nobody read, sessions that nobody entered."""

import sys
import warnings
from typing import Any

from torch import nn

from kvweave.seam import names, reader
from kvweave.seam.cache import CompressedCache
from kvweave.seam.layer import CompressedLayer

UNUSED = "kvweave.compress(...) was never entered: allowed is `with kvweave.compress(model, method) as session:`"
NO_CACHE = "use_cache=False: kvweave compresses nothing where no cache is kept"


def warn(text: str) -> None:
    """Warn at the first line that is neither kvweave's nor torch's."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("kvweave", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def held(cache: CompressedCache) -> int:
    """Tokens in the layers that may be compressed."""
    return max([0, *(layer.seen for layer in cache.layers if isinstance(layer, CompressedLayer))])


def check_filled(model: nn.Module, cache: CompressedCache, before: int, kwargs: dict[str, Any], output: Any) -> None:
    """A forward pass has filled the compressed cache.

    Args:
        before: tokens that it held when the pass began.
        kwargs: what the pass was given; output: what it returned.
    Raises:
        RuntimeError: it has not, though layers could have been compressed.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]
    if not layers or held(cache) > before:
        return
    inputs = ", ".join(sorted(name for name, value in kwargs.items() if value is not None))
    returned = names.cache_of(output)
    kept = "no cache"
    if returned is not None:
        size = returned.get_seq_length() if hasattr(returned, "get_seq_length") else "unknown"
        kept = f"a {type(returned).__name__} of {size} tokens"
    raise RuntimeError(
        f"{type(model).__name__} ran and filled none of the {len(layers)} layers that kvweave would compress: it was "
        f"given {inputs}, and returned {kept}. Either it does not read the cache that it is given (known names: "
        f"{', '.join(names.CACHE_NAMES)}), or it makes its own. kvweave.detach(model) lets it run uncompressed"
    )


def check_read(model: nn.Module, decoder: Any, cache: CompressedCache) -> None:
    """Attention has read the keys of every layer that a forward pass filled; a layer that cannot be is left alone.

    Raises:
        RuntimeError: attention that kvweave should have read for was not called.
    """
    for place, layer in enumerate(cache.layers):
        if not isinstance(layer, CompressedLayer) or not layer.unread:
            continue
        layer.unread = False
        if (id(decoder), place) in reader.passed.layers:
            layer.why = "keys are transformed after the cache"
            continue
        modules = [m for m in model.modules() if getattr(m, "layer_idx", None) == place]
        if not any(names.asks_by_name(type(module)) for module in modules):
            layer.why = "attention is not looked up by name"
        elif layer.compressed:
            raise RuntimeError(
                f"{type(model).__name__}: nobody read the keys of layer {place}: its attention, "
                f"attn_implementation={names.implementation(decoder)!r}, was replaced or chosen anew while kvweave "
                "was attached; choose it before, and attach again"
            )


def saved(cache: CompressedCache | None) -> str:
    """One line on what a cache's last cut saved."""
    totals = {} if cache is None else cache.report["totals"]
    if not totals.get("layers"):
        return "nothing compressed"
    entries, tokens = totals["kept"] / totals["layers"], totals["length"] / totals["layers"]
    before, after = totals["bytes_before"], totals["bytes"]
    share = f", {100 * after / before:.0f} %" if before else ""
    return f"{tokens:.0f} tokens in {entries:.0f} entries a layer, {_size(before)} in {_size(after)}{share}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
