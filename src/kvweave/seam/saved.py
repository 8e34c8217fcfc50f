"""What a compressed cache is made of, for a file (`kvweave.memory.saved`), and which model it belongs to."""

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvweave.cut.coarse import Coarse
from kvweave.cut.prompt_cut import PromptCut
from kvweave.cut.record import Record
from kvweave.cut.stream import Stream
from kvweave.cut.stream_cut import StreamCut
from kvweave.cut.waiting import Waiting
from kvweave.memory import saved
from kvweave.memory.heads import RaggedHeads, settled
from kvweave.memory.packed import PackedSlots
from kvweave.memory.slots import Slots
from kvweave.memory.tables import Tables
from kvweave.methods.registry import method_from_dict
from kvweave.ops.quantize import Packed, Quantization
from kvweave.ops.statistics import AttentionRule, Flow
from kvweave.prompt import Prompt
from kvweave.seam import lookup
from kvweave.seam.latents import Expansion, expansions, introduce
from kvweave.seam.layer import CompressedLayer
from kvweave.seam.places import Places
from kvweave.seam.turn import State, Turn

if TYPE_CHECKING:
    from kvweave.seam.cache import CompressedCache

_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        Slots,
        PackedSlots,
        RaggedHeads,
        Packed,
        Quantization,
        Places,
        Prompt,
        PromptCut,
        Stream,
        StreamCut,
        Tables,
        Waiting,
        Coarse,
        Record,
        AttentionRule,
        Flow,
        Expansion,
    )
}
#: Of a layer, what belongs to the process that runs it, or is made anew.
_OF_THE_PROCESS = {"index", "shared", "fixed", "unread", "device"}
_SAMPLES = 16  # numbers of each weight that tell models apart
_SHAPES = ("head", "hidden", "layer", "rope", "sliding", "chunk", "scal", "model_type")


def write(cache: "CompressedCache", path: str | os.PathLike[str], model: PreTrainedModel) -> None:
    """Save `cache`, which belongs to `model`."""
    ours = [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]
    if any(layer.unread or layer.prompt_cut.pending for layer in ours):
        raise ValueError("save: a forward pass is filling the cache; allowed is between two of them")
    cache.settle()
    state = {
        "model": fingerprint(model),
        "method": json.dumps(cache.method.to_dict()),
        "trace": cache.shared.trace,
        "hold": cache.shared.hold,
        "stream": cache.shared.stream,
        "turn": vars(cache.shared.turn) | {"state": cache.shared.turn.state.value},
        "layers": [_layer(layer) for layer in cache.layers],
    }
    saved.save(path, state, _KINDS)


def read(kind: "type[CompressedCache]", path: str | os.PathLike[str], model: PreTrainedModel) -> "CompressedCache":
    """The cache that was saved, where `model` has its layers."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model={type(model).__name__} is not a transformers model")
    state = saved.load(path, _KINDS)
    saved_for, own = state["model"], fingerprint(model)
    if saved_for != own:
        other = [name for name in own if saved_for.get(name) != own[name]]
        raise ValueError(
            f"{os.fspath(path)} was saved for another model: {', '.join(other)} differ from those of this "
            f"{type(model).__name__}; allowed is the model that filled the cache"
        )
    method, stream = method_from_dict(json.loads(state["method"])), state.get("stream")
    cache = kind(model.config, method, trace=state["trace"], hold=state["hold"])
    cache.work_on(model)
    devices = _devices(model)
    first = devices.get(0, model.device)
    turn = _moved(state["turn"], first)
    cache.shared.stream = _moved(stream, first)
    cache.shared.turn = Turn(**turn | {"state": State(turn["state"])})
    for place, (layer, parts) in enumerate(zip(cache.layers, state["layers"], strict=True)):
        device = devices.get(place, first)
        vars(layer).update(_moved(parts, device))
        if parts.get("is_initialized"):
            layer.device = device
    introduce(expansions(model), cache)
    return cache


def _layer(layer: Any) -> dict[str, Any]:
    """What a layer holds; transformers' own are told by their attributes."""
    if not isinstance(layer, CompressedLayer):
        return {name: value for name, value in vars(layer).items() if name != "device"}
    parts = {name: value for name, value in vars(layer).items() if name not in _OF_THE_PROCESS}
    return parts | {"block": None if layer.block is None else settled(layer.block)}


def _moved(x: Any, device: torch.device) -> Any:
    """`x` with its tensors on `device`."""
    if isinstance(x, Tensor):
        return x.to(device)
    if type(x) in (list, tuple):
        return type(x)(_moved(part, device) for part in x)
    if type(x) is dict:
        return {key: _moved(value, device) for key, value in x.items()}
    if type(x) in _KINDS.values():
        return type(x)(**{name: _moved(value, device) for name, value in vars(x).items()})
    return x


def _devices(model: nn.Module) -> dict[int, torch.device]:
    """Where the decoder's layers are, by number."""
    devices: dict[int, torch.device] = {}
    for module in lookup.layers_of(model):
        number, weight = module.layer_idx, next(module.parameters(), None)
        if weight is not None and weight.device.type != "meta":
            devices.setdefault(number, weight.device)
    return devices


def fingerprint(model: PreTrainedModel) -> dict[str, str]:
    """What tells a model from others: its class, what its configuration says of shapes and phases, its weights."""
    config = model.config.get_text_config(decoder=True).to_dict()
    shapes = {name: config[name] for name in sorted(config) if any(part in name for part in _SHAPES)}
    weights = hashlib.sha256()
    for name, weight in model.named_parameters():
        weights.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.device.type != "meta" and weight.numel():
            step = max(1, weight.numel() // _SAMPLES)
            some = weight.detach().reshape(-1)[::step].cpu().contiguous()
            weights.update(some.view(torch.uint8).numpy().tobytes())
    text = json.dumps(shapes, sort_keys=True, default=str)
    return {
        "class": type(model).__name__,
        "configuration": hashlib.sha256(text.encode()).hexdigest(),
        "weights": weights.hexdigest(),
    }
