"""The rotary tables of what a cache has seen, for methods that turn keys."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvweave.seam import lookup
from kvweave.seam.layer import CompressedLayer

if TYPE_CHECKING:
    from kvweave.seam.session import Session


def watch(session: "Session") -> list[Callable[[], Any]]:
    """Note the tables that attention modules are given; returns what undoes it."""
    modules = lookup.layers_of(session.base)
    note = functools.partial(_note, session)
    return [module.register_forward_pre_hook(note, with_kwargs=True).remove for module in modules]


def _note(session: "Session", module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook before a module's forward pass."""
    cache, place = session.running.cache, module.layer_idx
    if cache is None or not cache.shared.needs.rotary or place >= len(cache.layers):
        return
    layer = cache.layers[place]
    if not isinstance(layer, CompressedLayer) or layer.index or not getattr(module, "is_causal", True):
        return  # all compressed layers are turned by the same tables; a vision tower has its own
    tables = lookup.rotary_tables(kwargs, session.base.config.get_text_config(decoder=True))
    if tables is None:
        return
    stream, turn, interleaved = cache.shared.stream, cache.shared.turn, lookup.interleaved(module)
    if stream is None or turn.prompt is None:
        turn.append_rotary(*tables, layer.seen, interleaved=interleaved)
    else:
        stream.tables.append(*tables, layer.seen, len(turn.prompt.valid), interleaved=interleaved)
