"""What a model and its cache take of a device's memory, before anything of it is loaded.

The model is built on torch's meta device, whose tensors have shapes and no contents, and reads a prompt of the length
asked for: what it would hold at a time is counted as it goes. Attention is taken to hold no L x L matrix, as sdpa and
flash attention do not. What no tensor shows, CUDA's context and fragmentation, is not counted.
"""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from kvweave.methods.base import Method
from kvweave.methods.full import Full
from kvweave.models.loading import skeleton
from kvweave.models.source import ModelError
from kvweave.ops.budget import entries
from kvweave.seam import latents
from kvweave.seam.cache import CompressedCache
from kvweave.seam.names import CACHE

WEIGHTS = ("auto", "8bit", "4bit")
_GROUP = 64  # weights of bitsandbytes' NF4 that share a float32 scale
_PLANNED = "kvweave_planned"
_TOWERS = ("vision_tower", "visual", "vision_model")
_FEW = 4  # tokens that show what a layer caches of each


@dataclass(frozen=True)
class Footprint:
    """Bytes, over the whole batch.

    Attributes:
        weights: of the model, in memory.
        vision: what the tower holds at most while it encodes all images, their pixels included.
        prefill: what one layer holds at most while the prompt passes, its own keys and values included.
        logits: of one step, once more in float32.
        layer: keys and values of the whole prompt in one layer, the largest.
        full, kept: the cache of the whole prompt, and what is left of it.
        before_cut: what is cached of it once all layers have read it: `kept`, or more where the cut waits.
        reply: keys and values of the reply's tokens.
        entries: tokens that a compressed layer keeps, on average; layers: how many are compressed.
        waits: nothing is cut before the prefill ends (layer-adaptive methods) or some tokens are decoded (`defer`).
    """

    weights: int
    vision: int
    prefill: int
    logits: int
    layer: int
    full: int
    kept: int
    before_cut: int
    reply: int
    entries: int
    layers: int
    waits: bool

    @property
    def peak(self) -> int:
        """The most at a time, with the method: encoding images, the last layer of the prefill, or decoding.

        That layer's own keys and values are whole, and counted in `prefill`; those of all others are cut by then.
        """
        if self.before_cut == self.full:
            return self.full_peak
        others = self.before_cut - min(self.layer, self.before_cut // max(1, self.layers))
        most = max(self.vision, others + self.prefill, self.before_cut, self.kept + self.reply)
        return self.weights + most + self.logits

    @property
    def full_peak(self) -> int:
        """The same without a method."""
        others = self.full - self.layer
        return self.weights + max(self.vision, others + self.prefill, self.full + self.reply) + self.logits


def footprint(
    model: str,
    method: Method,
    *,
    tokens: int,
    images: int = 0,
    image_size: int = 448,
    new_tokens: int = 256,
    batch: int = 1,
    dtype: str = "auto",
    weights: str = "auto",
) -> Footprint:
    """Count what prompts of `tokens` tokens take, of which nothing is loaded but `config.json`.

    Args:
        model: as `load` takes it.
        tokens: of a prompt, images included.
        images: squares of pixels in a prompt (a tile is one), encoded together.
        image_size: their side, where the vision tower does not say.
        new_tokens: of the reply.
        weights: "auto": in `dtype`; "8bit", "4bit": linear layers as bitsandbytes packs them, the rest in `dtype`.
    Raises:
        ModelError: the model cannot be had, or cannot be run without contents; the message says why.
        ValueError: a method that the model does not take.
    """
    built = skeleton(model, dtype)
    latents.check(method.on_model(lambda: None), built)
    built.set_attn_implementation(_PLANNED)
    with torch.no_grad():
        vision = _vision(model, built, images * batch, image_size)
        prefill, _ = _read(model, built, batch, tokens, cached=False)
        _, sizes = _read(model, built, batch, tokens, cached=True)
        _, step = _read(model, built, batch, _FEW, cached=True)
    cache, works = CompressedCache(built.config, method), method.on_model(lambda: None)
    compressed = {n for n, layer in enumerate(cache.layers) if any(layer is x for x in cache.compressed_layers)}
    each = {n: step[n] / _FEW for n in compressed}  # bytes a token
    is_full = isinstance(method, Full)
    count = tokens if is_full else entries(method.budget, tokens, max(1, int(sum(each.values()))))
    text = built.config.get_text_config(decoder=True)
    size = next(built.parameters()).element_size()
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rest = sum(bytes for n, bytes in enumerate(sizes) if n not in compressed)
    waits = works.layer_adaptive or works.defer > 0
    kept = rest + int(sum(_stored(method, value, count, size, dim) for value in each.values()))
    first = works.coarse_budgets(count, tokens, len(compressed))
    before_cut = kept if first is None else rest + int(sum(map(_layer_bytes, each.values(), first)))
    return Footprint(
        weights=_weights(built, weights),
        vision=vision,
        prefill=prefill,
        logits=batch * text.vocab_size * (size + 4),
        layer=max(sizes),
        full=sum(sizes),
        kept=kept,
        before_cut=sum(sizes) if waits and first is None else before_cut,
        reply=int(sum(step) / _FEW * new_tokens),
        entries=count,
        layers=len(compressed),
        waits=waits,
    )


def _layer_bytes(token: float, counts: int | tuple[int, ...]) -> float:
    """Bytes of a layer that holds so many entries, `token` for each, or so many in each of its heads."""
    return token * (counts if isinstance(counts, int) else sum(counts) / len(counts))


def _weights(model: Any, kind: str) -> int:
    """Bytes of all parameters, each once; packed ones with their scales."""
    if kind not in WEIGHTS:
        raise ModelError(f"weights={kind!r} is not allowed: allowed is one of {', '.join(WEIGHTS)}", "weights")
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    packed = {id(module.weight) for module in linear} if kind != "auto" else set()
    total = 0
    for tensor in {id(each): each for each in [*model.parameters(), *model.buffers()]}.values():
        if id(tensor) not in packed:
            total += tensor.nbytes
        elif kind == "8bit":
            total += tensor.numel() + 4 * tensor.shape[0]
        else:
            total += tensor.numel() // 2 + 4 * -(-tensor.numel() // _GROUP)
    return total


def _stored(method: Method, token: float, count: int, size: int, dim: int) -> float:
    """Bytes of `count` entries of a layer: `token` for each in numbers of `size` bytes, `dim` to a head."""
    storage = method.storage
    if storage is None:
        return token * count
    packed = max(0, count - storage.residual) // storage.group * storage.group
    channels = storage.group if dim % storage.group == 0 else dim  # of a value that share a scale and a zero
    share = (storage.bits / 8 + size / storage.group + size / channels) / size  # keys and values, half each
    return token * (count - packed + share * packed)


# -------------------------------------------------------------------- runs without contents


def _read(name: str, model: Any, batch: int, tokens: int, *, cached: bool) -> tuple[int, list[int]]:
    """The decoder reads prompts: what it holds at most, and bytes of each layer's cache, if it keeps one."""
    embeddings = model.get_input_embeddings().weight
    prompt = embeddings.new_empty(batch, tokens, embeddings.shape[1])
    positions = torch.arange(tokens).expand(batch, -1)  # with contents: a dynamic rotary embedding looks at the last
    cache = DynamicCache(config=model.config) if cached else None
    with _named(name, "a prompt"), _PeakBytes(model) as counter:
        model.get_decoder()(inputs_embeds=prompt, position_ids=positions, use_cache=cached, **{CACHE: cache})
    layers = [] if cache is None else cache.layers
    return counter.peak, [sum(x.nbytes for x in vars(layer).values() if isinstance(x, Tensor)) for layer in layers]


def _vision(name: str, model: Any, images: int, side: int) -> int:
    """What the tower holds at most while it encodes so many squares of pixels."""
    if not images:
        return 0
    towers = [getattr(model.base_model, part) for part in _TOWERS if hasattr(model.base_model, part)]
    if not towers or not hasattr(model.config, "vision_config"):
        raise ModelError(f"model={name!r} has no vision tower that kvweave finds: allowed is images=0", "images")
    peaks = []
    for count in (1, 2):  # what each takes is the same: attention stays within an image
        pixels = _pixels(model.config.vision_config, count, side, next(model.parameters()).dtype)
        with _named(name, "images"), _PeakBytes(model) as counter:
            towers[0](**pixels)
        peaks.append(counter.peak)
    return peaks[0] + (images - 1) * (peaks[1] - peaks[0])


def _pixels(vision: Any, images: int, side: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Images as the tower takes them: squares, or patches one after the other with the shape of each image."""
    patch = _first(vision.patch_size)
    if hasattr(vision, "spatial_merge_size"):
        merge = vision.spatial_merge_size
        rows = max(1, side // (patch * merge)) * merge
        width = getattr(vision, "in_channels", 3) * getattr(vision, "temporal_patch_size", 1) * patch**2
        patches = torch.empty(images * rows**2, width, dtype=dtype, device="meta")
        return {"hidden_states": patches, "grid_thw": torch.tensor([[1, rows, rows]] * images)}
    side = _first(getattr(vision, "image_size", side))
    return {"pixel_values": torch.empty(images, 3, side, side, dtype=dtype, device="meta")}


def _first(size: Any) -> int:
    return int(size[0] if isinstance(size, (list, tuple)) else size)


@contextlib.contextmanager
def _named(model: str, what: str) -> Iterator[None]:
    """Whatever a model raises that cannot do without contents, as one line."""
    try:
        yield
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"model={model!r} cannot read {what} without its weights: {why}") from error


class _PeakBytes(TorchDispatchMode):
    """Counts bytes of tensors that are alive at a time, the model's own apart.

    Attributes:
        peak: the most so far.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._own = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
        self._tensors: dict[int, int] = {}  # of each storage, how many are alive
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = (args, kwargs or {})
        if any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves(inputs)):  # images' shapes have contents
            inputs = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, inputs)
        out = func(*inputs[0], **inputs[1])
        for tensor in tree_leaves((inputs, out)):
            if isinstance(tensor, Tensor):
                self._hold(tensor)
        self.peak = max(self.peak, self._now)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage, number = tensor.untyped_storage(), id(tensor)
        place, size = storage._cdata, storage.nbytes()
        if place in self._own or number in self._alive:
            return

        def release(_: Any) -> None:
            del self._alive[number]
            self._tensors[place] -= 1
            if not self._tensors[place]:
                del self._tensors[place]
                self._now -= size

        self._alive[number] = weakref.ref(tensor, release)
        self._now += 0 if place in self._tensors else size
        self._tensors[place] = self._tensors.get(place, 0) + 1


def _planned_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    """The output's shape, [batch, rows, heads, dim], and no weights."""
    batch, heads, rows, _dim = query.shape
    return query.new_empty(batch, rows, heads, value.shape[-1]), None


AttentionInterface.register(_PLANNED, _planned_attention)
AttentionMaskInterface.register(_PLANNED, lambda *_, **__: None)
