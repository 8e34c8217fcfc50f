"""What must not pass in silence: prompts that filled nothing, keys that nobody read, sessions that nobody entered."""

import sys
import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

from kvweave.seam import lookup, names, reader
from kvweave.seam.cache import CompressedCache
from kvweave.seam.layer import CompressedLayer

if TYPE_CHECKING:
    from kvweave.seam.session import Session

UNUSED = "kvweave.compress(...) was never entered: allowed is `with kvweave.compress(model, method) as session:`"
NO_CACHE = "use_cache=False: kvweave compresses nothing where no cache is kept"


def warn(text: str) -> None:
    """Warn at the first line that is neither kvweave's nor torch's."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("kvweave", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def check(session: "Session", cache: CompressedCache, kwargs: dict[str, Any], output: Any) -> None:
    """A forward pass has filled the compressed cache, and attention has read it; a layer that cannot be is left
    alone.

    Args:
        kwargs: what the pass was given; output: what it returned.
    Raises:
        RuntimeError: it has not, though layers could have been compressed.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]
    if layers and not cache.shared.filled:
        raise RuntimeError(_unfilled(session.base, len(layers), kwargs, output))
    for place, layer in enumerate(cache.layers):
        if isinstance(layer, CompressedLayer) and layer.unread:
            _check_read(session.base, place, layer)
    if all(layer.why for layer in layers):
        kinds = sorted({layer["kind"] for layer in cache.report["layers"]})
        name = type(session.base).__name__
        session.warn("nothing", f"kvweave compressed no layer of {name}: {'; '.join(kinds)}")


def _unfilled(model: nn.Module, layers: int, kwargs: dict[str, Any], output: Any) -> str:
    inputs = ", ".join(sorted(name for name, value in kwargs.items() if value is not None))
    returned = names.cache_of(output)
    kept = "no cache"
    if returned is not None:
        size = returned.get_seq_length() if hasattr(returned, "get_seq_length") else "unknown"
        kept = f"a {type(returned).__name__} of {size} tokens"
    return (
        f"{type(model).__name__} ran and filled none of the {layers} layers that kvweave would compress: it was "
        f"given {inputs}, and returned {kept}. Either it does not read the cache that it is given (known names: "
        f"{', '.join(names.CACHE_NAMES)}), or it makes its own. kvweave.detach(model) lets it run uncompressed"
    )


def _check_read(model: Any, place: int, layer: CompressedLayer) -> None:
    """Nobody read the keys of a layer that a forward pass filled: say why it is no layer to compress, or raise."""
    decoder = model.config.get_text_config(decoder=True)
    layer.unread = False
    if (id(decoder), place) in reader.passed.layers:
        layer.why = "keys are transformed after the cache"
        return
    modules = [m for m in lookup.layers_of(model) if m.layer_idx == place]
    if not any(lookup.asks_by_name(type(module)) for module in modules):
        layer.why = "attention is not looked up by name"
    elif layer.compressed:
        raise RuntimeError(
            f"{type(model).__name__}: nobody read the keys of layer {place}: its attention, "
            f"attn_implementation={lookup.implementation(decoder)!r}, was replaced or chosen anew while kvweave "
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
