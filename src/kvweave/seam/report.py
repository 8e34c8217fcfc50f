"""What a cache's report says: `CompressedCache.report`."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvweave.cut.record import Record, peak
from kvweave.cut.stream_cut import StreamCut
from kvweave.seam.layer import CompressedLayer

if TYPE_CHECKING:
    from kvweave.seam.cache import CompressedCache

_SUMS = ("length", "kept", "merged", "evicted", "bytes", "bytes_before")


def described(cache: "CompressedCache") -> dict[str, Any]:
    """What the last cut did, JSON-able."""
    method, turn = cache.shared.method, cache.shared.turn
    layers = [_layer(place, kind, cache.layers[place]) for place, kind in enumerate(cache.kinds)]
    compressed = [layer for layer in layers if layer["compressed"]]
    totals: dict[str, Any] = {name: sum(layer[name] for layer in compressed) for name in _SUMS}
    totals["layers"] = len(compressed)
    records = [record for record in (layer.record for layer in cache.compressed_layers) if record is not None]
    streams = [layer.prompt_cut for layer in cache.compressed_layers if isinstance(layer.prompt_cut, StreamCut)]
    if streams:
        totals["peak_bytes"] = sum(stream.peak_bytes for stream in streams)
    else:
        totals["peak_bytes"] = peak(records, method.layer_adaptive or bool(method.defer) or turn.on_request)
    deferred = None if cache.waits else turn.deferred or 0
    report: dict[str, Any] = {
        "method": cache.method.to_dict(),
        "layers": layers,
        "totals": totals,
        "deferred": deferred,
    }
    probes = dict(turn.probes)
    works = probes.pop("works_as", "" if method is cache.method else method.spelling())
    if works:
        report["works_as"] = works
    for record in records:
        report |= record.words
    if cache.shared.stream is not None and compressed:
        report |= {name: max(layer[name] for layer in compressed) for name in ("cuts", "seen")}
        report["held"] = math.ceil(sum(layer["kept"] for layer in compressed) / len(compressed))
        report["peak_entries"] = math.ceil(cache.shared.stream.peak)
    if cache.method.coarse_cut is not None and cache.shared.stream is None:
        report["coarse"] = _coarse(cache, records)
    if turn.choice:
        report["auto"] = turn.choice
    return report | ({"probes": probes} if probes else {})


def _coarse(cache: "CompressedCache", records: Sequence[Record]) -> dict[str, Any]:
    """What is held until the cut: bytes, or why it is the whole prompt."""
    why = cache.shared.method.coarse_refusal
    if cache.shared.turn.on_request:
        why = "the cut waits for probes, or is asked for"
    elif cache.target is not None:
        why = "the budget is found by what it costs"
    if why:
        return {"whole": why}
    return {"bytes": sum(x.bytes_before if x.bytes_coarse is None else x.bytes_coarse for x in records)}


def _layer(place: int, kind: str, layer: Any) -> dict[str, Any]:
    record = layer.record if isinstance(layer, CompressedLayer) and layer.compressed else None
    if record is not None:
        facts = record.described()
        if isinstance(layer.prompt_cut, StreamCut):
            facts |= {"seen": facts["length"], **layer.prompt_cut.counted(record)}
        return {"layer": place, "kind": kind, "compressed": True, **facts}
    why = layer.why if isinstance(layer, CompressedLayer) else ""
    return {"layer": place, "kind": why or kind, "compressed": False}


def layer_kinds(decoder: Any, layers: Sequence[Any]) -> list[str]:
    """What each layer's attention is called, by the config, else by transformers' choice of a cache for it."""
    named = list(getattr(decoder, "layer_types", None) or [])
    if len(named) == len(layers):
        return named
    return ["sliding_attention" if getattr(layer, "is_sliding", False) else "full_attention" for layer in layers]
