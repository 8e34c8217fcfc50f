"""Where transformers keeps what it looks up, by version: attention by name, rotary tables, a layer's weights.

Beside `names.py` the only file that reaches into it; nothing here is needed to follow a token.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

#: What attention modules are given rotary tables as.
ROTARY = "position_embeddings"
#: Inputs that `generate` hands to a prompt's own forward pass and to no later one.
READ_ONCE = frozenset(MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL)


def modules_of(model: nn.Module) -> list[nn.Module]:
    """As `model.modules()`, in the same order and several times as fast: a session looks at all of a model's."""
    found: dict[nn.Module, None] = {}
    left: list[nn.Module | None] = [model]
    while left:
        module = left.pop()
        if module is not None and module not in found:
            found[module] = None
            left.extend(reversed(module._modules.values()))
    return list(found)


def layers_of(model: nn.Module) -> list[Any]:
    """Modules that know which layer they are of: attention, and what else a file numbers."""
    return [module for module in modules_of(model) if isinstance(vars(module).get("layer_idx"), int)]


# -------------------------------------------------------------------- attention


def implementation(config: Any) -> str:
    """The name that a config has for its attention."""
    return config._attn_implementation


def registered(name: str) -> Callable[..., Any] | None:
    """The attention function that models find under this name; None: each falls back on its own file's."""
    return AttentionInterface._global_mapping.get(name)


def register(name: str, function: Callable[..., Any] | None) -> None:
    """Let models find this function under the name; None: nothing."""
    if function is None:
        AttentionInterface._global_mapping.pop(name, None)
    else:
        AttentionInterface.register(name, function)


def has_table_of_its_own(module: nn.Module, name: str) -> bool:
    """The module's file looks this name up in a table of its own, which `register` does not reach."""
    table = getattr(sys.modules.get(type(module).__module__), "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    return name in getattr(table, "_local_mapping", ())


def eager_function(kind: type) -> Callable[..., Any] | None:
    """What this class of modules falls back on: some files have an eager function for each of their classes."""
    for cls in kind.__mro__:
        forward: Any = cls.__dict__.get("forward")
        forward = None if forward is None else inspect.unwrap(forward)
        code, home = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
        named = [n for n in code.co_names if n.endswith("eager_attention_forward") and n in home] if code else []
        if len(named) == 1:
            return home[named[0]]
    homes = (getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None) for cls in kind.__mro__)
    return next((function for function in homes if function is not None), None)


def asks_by_name(kind: type) -> bool:
    """Modules of this class look their attention up by name, as their source has it."""
    for cls in kind.__mro__:
        try:
            if "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(cls):
                return True
        except (OSError, TypeError):  # a class typed at a prompt, or one of the interpreter's
            continue
    return False


def lets_attention_be_chosen(model: nn.Module, decoder: Any) -> bool:
    """Some part of the model that has this config looks its attention up by name."""
    parts: list[Any] = [part for part in modules_of(model) if isinstance(part, PreTrainedModel)]
    return any(part._can_set_attn_implementation() for part in parts if part.config is decoder)


def output_projection(module: nn.Module, width: int) -> Tensor | None:
    """Weight [hidden, width] of what an attention module does to its heads' outputs; None: it is not to be found."""
    for name in ("o_proj", "out_proj", "dense"):
        weight = getattr(getattr(module, name, None), "weight", None)
        if (
            isinstance(weight, Tensor)
            and weight.is_floating_point()
            and weight.dim() == 2
            and weight.shape[1] == width
        ):
            return weight.detach()
    return None


def expands_latents(module: nn.Module) -> bool:
    """Attention of the kind MLA, which caches latents: its heads expand their keys and values from what it reads."""
    return hasattr(type(module), "expand_kv") and isinstance(getattr(module, "layer_idx", None), int)


def expansion(module: nn.Module) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """From latents and rotary keys, [batch, 1, tokens, dim] each, to keys and values [batch, heads, tokens, dim]."""
    kind: Any = type(module)
    return functools.partial(kind.expand_kv, module)


def replace_expansion(module: nn.Module, by: Callable[..., Any]) -> Callable[[], Any]:
    """Let a module expand its latents by another function; returns what undoes it."""
    vars(module)["expand_kv"] = by
    return lambda: vars(module).pop("expand_kv", None)


# -------------------------------------------------------------------- rotary


def rotary_tables(kwargs: dict[str, Any], config: Any) -> tuple[Tensor, Tensor] | None:
    """(cos, sin), [batch or 1, new, rotary_dim] each, among what an attention module was given; None: not there."""
    tables = kwargs.get(ROTARY)
    if not isinstance(tables, tuple):
        return None
    cos, sin = (_one_axis(table, config) for table in tables)
    return cos, sin


def _one_axis(table: Tensor, config: Any) -> Tensor:
    """Tables of several axes, [axes, batch, columns, dim], as attention combines them (older transformers)."""
    if table.dim() != 4:
        return table
    rope = getattr(config, "rope_parameters", None) or config.rope_scaling
    parts = table.split([2 * n for n in rope["mrope_section"]], -1)
    return torch.cat([part[axis % len(table)] for axis, part in enumerate(parts)], -1)


def interleaved(module: nn.Module) -> bool:
    """How the module's own file pairs channels in rotary: (2m, 2m + 1), else (m, m + dim / 2)."""
    home = sys.modules[type(module).__module__]
    names = ("rotate_half_llm", "rotate_half_text", "rotate_half")
    swap = next((getattr(home, name) for name in names if hasattr(home, name)), None)
    return swap is not None and bool(swap(torch.arange(1.0, 5.0)).tolist() == [-2.0, 1.0, -4.0, 3.0])


# -------------------------------------------------------------------- layers of a fixed size


def show_window_alone(layer: Any) -> Callable[[], None]:
    """Let a sliding layer that records its past hand out no more than its mask speaks of, as versions after 5.17 do.

    Returns:
        what undoes it.
    """
    update = layer.update

    def narrowed(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        visible = layer.sliding_window - 1 + keys.shape[-2]
        keys, values = update(keys, values, *args, **kwargs)
        return keys[:, :, -visible:], values[:, :, -visible:]

    layer.update = narrowed
    return lambda: vars(layer).pop("update", None)


# -------------------------------------------------------------------- positions that run ahead of columns


def keepers_of_offsets(model: nn.Module) -> list[Any]:
    """Parts of a model that keep, from one forward pass to the next, how far positions run ahead of columns."""
    return [part for part in modules_of(model) if "rope_deltas" in vars(part)]


def offsets(keepers: Sequence[Any]) -> Tensor | None:
    """That, [batch, 1]; None: positions are columns, or nothing was read."""
    return next((part.rope_deltas for part in keepers if part.rope_deltas is not None), None)


def set_offsets(keepers: Sequence[Any], value: Tensor | None) -> None:
    """Let the model count positions from there; None: anew, from the next inputs."""
    for part in keepers:
        part.rope_deltas = value
