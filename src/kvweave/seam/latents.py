"""MLA: the cache holds one latent and one rotary key a token, and all heads expand their keys and values from them.

Models hand both to the cache as if they were the keys and values of one head, and expand what they get back. So the
expansion is wrapped, on the instance: keys that come out of it carry the link of the latents that went in. Methods
see each head's own keys and values; what they keep is one set of tokens for all heads.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvweave.memory.expanded import Expanded, expanded
from kvweave.memory.slots import Slots
from kvweave.methods.base import Method
from kvweave.methods.registry import list_methods, method_class
from kvweave.seam import lookup
from kvweave.seam.layer import CompressedLayer, Link

if TYPE_CHECKING:
    from kvweave.seam.cache import CompressedCache


def _nowhere() -> nn.Module | None:
    return None


@dataclass(eq=False)
class Expansion:
    """What a module's heads make of latents. The module is not held; in another process there is none."""

    _module = staticmethod(_nowhere)

    @classmethod
    def of(cls, module: nn.Module) -> "Expansion":
        expansion = cls()
        expansion._module = weakref.ref(module)
        return expansion

    def __deepcopy__(self, memo: Any) -> "Expansion":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Expansion, ()

    def __call__(self, slots: Slots) -> Slots:
        """Slots of one head that holds latents, as those of the module's heads.

        Raises:
            RuntimeError: the model is not at hand.
        """
        module = self._module()
        if module is None:
            raise RuntimeError(
                "the model that filled this cache is not at hand, and its latents (MLA) cannot be expanded to keys "
                "without it: allowed is to cut the cache once the model has read it again"
            )
        return expanded(slots, *lookup.expansion(module)(slots.keys, slots.values))


def expansions(model: nn.Module) -> dict[int, Expansion]:
    """By layer, what its heads make of latents, of those that hold any."""
    return {m.layer_idx: Expansion.of(m) for m in lookup.layers_of(model) if lookup.expands_latents(m)}


def introduce(by_layer: dict[int, Expansion], cache: "CompressedCache") -> None:
    """Let the layers of a cache know what their heads make of the latents that they hold."""
    for place, expansion in by_layer.items():
        layer = cache.layers[place] if place < len(cache.layers) else None
        if isinstance(layer, CompressedLayer):
            layer.prompt_cut.expand = expansion


def attach(model: nn.Module) -> list[Callable[[], Any]]:
    """Let keys that are expanded from a compressed layer's latents tell whose they are; returns what undoes it."""
    modules = [module for module in lookup.layers_of(model) if lookup.expands_latents(module)]
    return [lookup.replace_expansion(module, _linking(module)) for module in modules]


def _linking(module: nn.Module) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    expand = lookup.expansion(module)

    def linking(latents: Tensor, rotary_keys: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = expand(latents, rotary_keys)
        link: Link | None = getattr(latents, "_kvweave", None)
        if link is not None:
            linked: Any = keys
            linked._kvweave = Link(link.layer, Expanded(link.block, (keys, values)), values)
        return keys, values

    return linking


def check(method: Method, model: Any) -> None:
    """Refuse a method that needs more than one set of tokens for all heads.

    Raises:
        ValueError: it does, and some layer of the model holds latents that would be compressed; or its heads are
            spread over processes.
    """
    if not _holds_latents(model):
        return
    kind = type(model).__name__
    if method.needs_heads:
        methods = {name: method_class(name)().on_model(lambda: None) for name in list_methods()}
        allowed = ", ".join(name for name, other in methods.items() if not other.needs_heads)
        raise ValueError(
            f"{method.needs_heads}, which is not allowed with {kind}: its heads share one latent a token (MLA), "
            f"and whole tokens stay or go; allowed is one of {allowed}"
        )
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError(
            f"{kind} has one latent a token for all of its heads (MLA), and they are spread over processes: allowed "
            "is one process"
        )


def _holds_latents(model: Any) -> bool:
    places = expansions(model)
    layers = DynamicCache(config=model.config).layers if places else []
    return any(type(layer) is DynamicLayer for place, layer in enumerate(layers) if place in places)
