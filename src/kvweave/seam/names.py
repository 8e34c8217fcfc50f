"""How transformers spells things, in every version from 5.17 on: the only file that knows.

5.24 renamed `past_key_values` and `cache_params` to `cache` in every forward pass and in `generate`. `Call` and
`Request` are what one forward pass and one `generate` were given, whichever names they were called by.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.utils import ALL_CACHE_NAMES, MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

#: What this version calls a forward pass's cache, and all names that it has gone by.
CACHE: str = ALL_CACHE_NAMES[0]
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
#: What attention modules are given rotary tables as.
ROTARY = "position_embeddings"
#: Inputs that `generate` hands to a prompt's own forward pass and to no later one.
READ_ONCE = frozenset(MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL)
#: Whether a model in training computes activations anew, and keeps no cache.
CHECKPOINTING = ("is_activation_checkpointing", "is_gradient_checkpointing")

# -------------------------------------------------------------------- forward passes


@dataclass(frozen=True)
class Signature:
    """What a model's forward pass takes.

    Attributes:
        parameters: names, in order.
        cache: its name for the cache; None: it takes none.
    """

    parameters: tuple[str, ...]
    cache: str | None

    @classmethod
    def of(cls, model: nn.Module) -> "Signature":
        parameters = inspect.signature(model.forward).parameters
        own = next((name for name in CACHE_NAMES if name in parameters), None)
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        return cls(tuple(parameters), own or (CACHE if open_ended else None))


class Call:
    """The facts of one forward pass.

    Attributes:
        kwargs: all arguments by keyword, but the cache.
        cache: the cache that was given, or None.
        ids: int64 [batch, new] or None; inputs: the ids, or the embeddings [batch, new, dim].
        new: columns.
        mask: the attention mask as it was given.
        misnamed: the cache was given under a name that the model does not know.
    """

    def __init__(self, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.misnamed = signature.cache not in kwargs and any(kwargs.get(name) is not None for name in CACHE_NAMES)
        if args:
            kwargs = dict(zip(signature.parameters, args, strict=False)) | kwargs
        self.cache, self.kwargs = without_cache(kwargs)
        self.ids: Tensor | None = self.kwargs.get("input_ids")
        embeddings = self.kwargs.get("inputs_embeds")
        self.inputs: Tensor | None = self.ids if self.ids is not None else embeddings
        self.new = 0 if self.inputs is None else self.inputs.shape[1]
        self.mask = self.kwargs.get("attention_mask")
        self._cache_name = signature.cache

    def uses_cache(self, model: nn.Module, decoder: Any) -> bool:
        """Whether keys and values will be kept, as the caller or else the config says."""
        use_cache = self.kwargs.get("use_cache")
        checkpoints = next((name for name in CHECKPOINTING if hasattr(type(model), name)), "")
        if model.training and getattr(model, checkpoints, False):
            return False  # transformers switches the cache off
        return self.cache is not None or bool(
            getattr(decoder, "use_cache", False) if use_cache is None else use_cache
        )

    def arguments(self, cache: Any) -> dict[str, Any]:
        """The forward pass's keywords, with this cache."""
        return self.kwargs | ({} if self._cache_name is None else {self._cache_name: cache})

    def seen_columns(self, compiled: bool) -> Tensor | None:
        """The 2-D mask, bool or int [batch, columns], where there is one.

        Args:
            compiled: transformers has made the whole mask already; its last row then tells.
        """
        mask = self.mask
        if compiled:
            mask = mask.get("full_attention") if isinstance(mask, dict) else mask
            if isinstance(mask, Tensor) and mask.dim() == 4:
                mask = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] >= 0
        return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def last_position(self) -> Tensor | None:
        """Position ids [..., batch, 1] of the last column; of several axes, before the next text."""
        positions = position_ids(self.kwargs)
        if positions is None:
            return None
        last = positions.amax(-1, keepdim=True)
        if last.dim() == 3:  # height, width and time of an image may end elsewhere
            last = torch.cat([last[:-3], last[-3:].amax(0, keepdim=True).expand_as(last[-3:])])
        return last


def position_ids(kwargs: dict[str, Any]) -> Tensor | None:
    """Position ids [..., batch or 1, new] among the arguments of a forward pass, or None."""
    positions = kwargs.get("position_ids")
    return positions if isinstance(positions, Tensor) else None


def embeddings(kwargs: dict[str, Any]) -> Tensor | None:
    """Embeddings [batch, new, hidden] among the arguments of a forward pass, or None."""
    given = kwargs.get("inputs_embeds")
    return given.detach() if isinstance(given, Tensor) else None


def hidden_states(output: Any) -> Tensor | None:
    """What a decoder made of its tokens, [batch, new, width], in its output, or None."""
    made = getattr(output, "last_hidden_state", None)
    return made.detach() if isinstance(made, Tensor) else None


def without_cache(kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The cache among the arguments of a forward pass or of `generate`, under whichever name, and the others.

    Raises:
        ValueError: two caches, under two names.
    """
    caches = {name: kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None}
    first = next(iter(caches.values()), None)
    if any(cache is not first for cache in caches.values()):
        raise ValueError(f"{' and '.join(caches)} are two caches: allowed is one, under either name")
    return first, {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}


def tokens_in(cache: Any) -> int:
    """Tokens in a cache's attention layers."""
    return max((layer.get_seq_length() for layer in cache.layers if hasattr(layer, "get_seq_length")), default=0)


def keepers_of_offsets(model: nn.Module) -> list[Any]:
    """Parts of a model that keep, from one forward pass to the next, how far positions run ahead of columns."""
    return [part for part in model.modules() if "rope_deltas" in vars(part)]


def offsets(keepers: Sequence[Any]) -> Tensor | None:
    """That, [batch, 1]; None: positions are columns, or nothing was read."""
    return next((part.rope_deltas for part in keepers if part.rope_deltas is not None), None)


def set_offsets(keepers: Sequence[Any], value: Tensor | None) -> None:
    """Let the model count positions from there; None: anew, from the next inputs."""
    for part in keepers:
        part.rope_deltas = value


def cache_of(output: Any) -> Any:
    """The cache that a forward pass returned, or None."""
    return getattr(output, CACHE, None)


# -------------------------------------------------------------------- generate


class Request:
    """The facts of one `generate`.

    Attributes:
        kwargs: its keyword arguments, but the cache.
        cache: the cache that was given, or None.
        ids: the prompt's int64 [batch, length], or None.
        length: columns of the prompt, those already cached included; None: nothing tells.
        stops: tokens that end a reply.
    """

    def __init__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.cache, self.kwargs = without_cache(kwargs)
        self._settings = self.kwargs.get("generation_config") or getattr(model, "generation_config", None)
        ids = self.kwargs.get("input_ids", self.kwargs.get("inputs", args[0] if args else None))
        self.ids: Tensor | None = ids if isinstance(ids, Tensor) and ids.dim() == 2 else None
        lengths = [x.shape[1] for x in (self.ids, self.kwargs.get("inputs_embeds")) if isinstance(x, Tensor)]
        mask = self.kwargs.get("attention_mask")
        if lengths and isinstance(mask, Tensor) and mask.dim() == 2:
            lengths.append(mask.shape[1])
        self.length: int | None = max(lengths, default=None)
        self.stops = self._stops(model)

    def setting(self, name: str) -> Any:
        """A setting of generation, as the call or else the configuration says."""
        value = self.kwargs.get(name)
        return getattr(self._settings, name, None) if value is None else value

    def new_tokens(self) -> int:
        """Most tokens that it may decode."""
        most = self.setting("max_new_tokens")
        return int(most) if most is not None else max(1, (self.setting("max_length") or 0) - (self.length or 0))

    def arguments(self) -> dict[str, Any]:
        """The keywords of `generate`."""
        return self.kwargs | ({} if self.cache is None else {CACHE: self.cache})

    def _stops(self, model: Any) -> list[int]:
        stops = self.setting("eos_token_id")
        if stops is None:
            stops = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        return listed(stops)


def listed(stops: Any) -> list[int]:
    """Token ids given as one, several or none."""
    if stops is None:
        return []
    return [int(stop) for stop in stops] if isinstance(stops, (Sequence, Tensor)) else [int(stops)]
