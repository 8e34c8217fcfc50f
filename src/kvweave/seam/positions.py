"""What a decoder's layers do with positions: the rotation of each one's keys, found out by asking the model.

One token attends to itself alone, so that its hidden states are the same at every position and its keys differ by
what their layer does with positions, and by nothing else.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from kvweave.ops.rotary import paired_tables, phase_difference, rotate, unit_tables
from kvweave.seam import lookup, names, reader

_NEAR, _FAR = 3, 1000  # positions that a token is seen at, beside the first
_ULPS = 16  # error of a key against its largest number
_ANGLE = 1e-3  # error of an angle at positions up to `_FAR`
#: Kinds of rotary whose angles change with the length of the sequence.
_CHANGING = {"dynamic", "longrope"}
#: What multiplies a query by its position, as configurations or their rotary parameters call it.
_SCALED = ("attn_temperature_tuning", "llama_4_scaling_beta", "log_scaling_alpha")
_ROTATIONS: "weakref.WeakKeyDictionary[nn.Module, tuple[Rotation | None, ...]]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Rotation:
    """How a layer turns its keys.

    Attributes:
        tables: of a number of positions, cos and sin of the angles, float32 [rotary_dim] each.
        interleaved: how channels are paired.
    """

    tables: Callable[[int], tuple[Tensor, Tensor]]
    interleaved: bool

    def turned(self, keys: Tensor, positions: int) -> Tensor:
        """`keys` [..., dim] in float32, so many positions further on, or back."""
        cos, sin = (
            paired_tables(x.to(keys.device), interleaved=self.interleaved) for x in self.tables(abs(positions))
        )
        return rotate(keys.float(), cos, sin if positions >= 0 else -sin, interleaved=self.interleaved)


def rotations(model: PreTrainedModel) -> "tuple[Rotation | None, ...]":
    """For each layer of the model's cache how it turns keys, None: not at all. The model is asked once.

    Raises:
        ValueError: positions that are no pure rotation, or that show elsewhere than in the keys.
    """
    if model not in _ROTATIONS:
        _ROTATIONS[model] = _measure(model)
    return _ROTATIONS[model]


def _not_by_rotation(config: Any) -> str:
    """Why a decoder's positions are no pure rotation of keys, as far as no key shows it; empty: nothing is known."""
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # one for each kind of layer
    kinds = {part.get("rope_type") for part in parts}
    if changing := kinds & _CHANGING:
        return f"rope_type={changing.pop()!r} has angles that change with the length; allowed are constant ones"
    for name in _SCALED:
        if any(part.get(name) for part in parts) or getattr(config, name, None):
            return f"{name} multiplies queries by their position; allowed is attention that no position scales"
    return "alibi=True adds a bias by distance; allowed is rotary" if getattr(config, "alibi", False) else ""


def _measure(model: PreTrainedModel) -> "tuple[Rotation | None, ...]":
    decoder = model.config.get_text_config(decoder=True)
    if why := _not_by_rotation(decoder):
        raise ValueError(f"positions of {type(model).__name__} are no pure rotation: {why}")
    stack = reader.parts_of(model, decoder)[-1]
    if "position_ids" not in names.Signature.of(stack).parameters:
        raise ValueError(
            f"positions of {type(model).__name__} are no pure rotation: it takes no position ids; allowed is rotary "
            "position embedding, or none"
        )
    far = min(_FAR, (getattr(decoder, "max_position_embeddings", None) or _FAR) - 1)
    places = torch.tensor([[0], [_NEAR], [far]], device=model.device)
    cache = DynamicCache(config=decoder)
    step = {"attention_mask": torch.ones_like(places), "position_ids": places, names.CACHE: cache, "use_cache": True}
    with torch.no_grad(), _listening(stack, decoder) as tables:
        stack.forward(input_ids=torch.full_like(places, decoder.vocab_size // 2), **step)  # no session notes it
    rotations = [
        _rotation(layer.keys, tables.get(place, []), (_NEAR, far)) for place, layer in enumerate(cache.layers)
    ]
    for place, rotation in enumerate(rotations):
        if isinstance(rotation, str):
            raise ValueError(
                f"positions of {type(model).__name__} are no pure rotation: keys of layer {place} {rotation}"
            )
    return tuple(rotation for rotation in rotations if not isinstance(rotation, str))


def _rotation(keys: Tensor, tables: list[Any], places: tuple[int, int]) -> "Rotation | str | None":
    """What turns a token's key at position 0 into its keys at these; a text: nothing that is known.

    Args:
        keys: [3, kv_heads, 1, dim] at 0 and at `places`.
        tables: what gave the layer its rotary tables, at most one.
    """
    first, *others = keys.float()
    within = _ULPS * torch.finfo(keys.dtype).eps * float(first.abs().max())

    def same(turned: Callable[[int], Tensor]) -> bool:
        return all(
            float((turned(place) - other).abs().max()) <= within for place, other in zip(places, others, strict=True)
        )

    if same(lambda place: first):
        return None
    for pair in tables:
        near, rest, far = (pair(n) for n in (places[0], places[1] - places[0], places[1]))
        together = phase_difference(rest[0], rest[1], near[0], -near[1])
        if max(float((a - b).abs().max()) for a, b in zip(together, far, strict=True)) > _ANGLE:
            return "are turned by angles that do not add up"
        for interleaved in (False, True):
            rotation = Rotation(pair, interleaved)
            if same(partial(rotation.turned, first)):
                return rotation
    return (
        "are not turned by the rotary tables that the layer is given; allowed is rotary position embedding, or none"
    )


@contextmanager
def _listening(stack: nn.Module, config: Any) -> Iterator[dict[int, list[Any]]]:
    """Inside, what makes the rotary tables of each layer is noted, by the layer's number."""
    makers: dict[
        int, tuple[Callable[[int], Any], Any]
    ] = {}  # by the tables, which are kept so that no others are they
    heard: dict[int, list[Any]] = {}
    undo: list[Any] = []

    def note_maker(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if isinstance(out, tuple) and len(out) == 2 and all(isinstance(x, Tensor) for x in out):

            def tables(positions: int) -> tuple[Tensor, Tensor]:
                with torch.no_grad():
                    cos_sin = module(
                        *(_at(x, positions) for x in args), **{k: _at(x, positions) for k, x in kwargs.items()}
                    )
                pair = lookup.rotary_tables({lookup.ROTARY: cos_sin}, config)
                assert pair is not None
                return unit_tables(*(x[0, 0].float() for x in pair))

            makers[id(out[0])] = tables, out

    def note_layer(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tables = kwargs.get(lookup.ROTARY)
        if isinstance(tables, tuple) and id(tables[0]) in makers:
            heard[module.layer_idx] = [makers[id(tables[0])][0]]

    layers = set(lookup.layers_of(stack))
    for module in lookup.modules_of(stack):
        if module in layers:
            undo.append(module.register_forward_pre_hook(note_layer, with_kwargs=True))
        elif next(module.parameters(), None) is None:
            undo.append(module.register_forward_hook(note_maker, with_kwargs=True))
    try:
        yield heard
    finally:
        for hook in undo:
            hook.remove()


def _at(x: Any, positions: int) -> Any:
    """An argument of a rotary module, of one token at this position and in full precision."""
    if not isinstance(x, Tensor):
        return x
    return x[:1].float() if x.is_floating_point() else torch.full_like(x[..., :1, :], positions)
