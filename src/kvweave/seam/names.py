"""How transformers spells things, in every version from 5.17 on: the only file that knows.

5.24 renamed `past_key_values` and `cache_params` to `cache` in every forward pass and in `generate`. `Call` is what
one forward pass was given, whichever names it was called by; of a `generate` that is `kvweave.seam.request`.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.utils import ALL_CACHE_NAMES

#: What this version calls a forward pass's cache, and all names that it has gone by.
CACHE: str = ALL_CACHE_NAMES[0]
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
#: Whether a model in training computes activations anew, and keeps no cache.
CHECKPOINTING = ("is_activation_checkpointing", "is_gradient_checkpointing")


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
        positions = self.kwargs.get("position_ids")
        if not isinstance(positions, Tensor):
            return None
        last = positions.amax(-1, keepdim=True)
        if last.dim() == 3:  # height, width and time of an image may end elsewhere
            last = torch.cat([last[:-3], last[-3:].amax(0, keepdim=True).expand_as(last[-3:])])
        return last


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


def cache_of(output: Any) -> Any:
    """The cache that a forward pass returned, or None."""
    return getattr(output, CACHE, None)


def listed(stops: Any) -> list[int]:
    """Token ids given as one, several or none."""
    if stops is None:
        return []
    return [int(stop) for stop in stops] if isinstance(stops, (Sequence, Tensor)) else [int(stops)]
