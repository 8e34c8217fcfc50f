"""A prompt through the model, cut on the way, and tokens behind it. Greedy, it is what `generate` does."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvweave.methods.base import Method
from kvweave.seam import names
from kvweave.seam.cache import CompressedCache


@dataclass(frozen=True)
class Reading:
    """What the model has read.

    Attributes:
        cache: what is kept of it.
        logits: [vocabulary], of the next token.
        position: int64 [*axes, 1, 1], of the next token; None: the model was given none.
        length: tokens read.
    """

    cache: CompressedCache
    logits: Tensor
    position: Tensor | None
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that are kept."""
        return sum(layer.nbytes for layer in self.cache.compressed_layers)

    def fork(self) -> "Reading":
        """The same once more, to be read on from; what one cache takes in the other does not see."""
        return replace(self, cache=copy.deepcopy(self.cache))

    def shares(self, tokens: int) -> list[float]:
        """Of each of the first `tokens` tokens, how many of all heads of all layers still hold it."""
        held, heads = torch.zeros(tokens, dtype=torch.int64), 0
        for layer in self.cache.compressed_layers:
            assert layer.positions is not None
            places = layer.positions.flatten().cpu()
            held += torch.bincount(places[(places >= 0) & (places < tokens)], minlength=tokens)
            heads += layer.positions.shape[1]
        return (held / max(1, heads)).tolist()


@torch.inference_mode()
def read_prompt(model: Any, inputs: Any, method: Method, *, hold: bool = False) -> Reading:
    """Read a prompt by `generate`, which knows how to prepare it, as far as the first token's logits.

    Args:
        model: to which kvweave is attached.
        inputs: of one conversation, as `kvweave.models.encode` makes them.
        hold: it stays whole until `CompressedCache.compress` is called.
    """
    cache = CompressedCache(model.config, method, hold=hold)
    seen: list[Tensor | None] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(names.Call(names.Signature.of(module), args, kwargs).last_position())

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        given = {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        out = model.generate(
            **given,
            **{names.CACHE: cache},
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    finally:
        hook.remove()
    position = seen[0]  # of the prompt's own pass; a method may have asked the model again behind it
    return Reading(cache, out.logits[0][0], None if position is None else position + 1, cache.get_seq_length())


@torch.inference_mode()
def read_on(model: Any, cache: CompressedCache, tokens: list[int], position: Tensor | None) -> Reading:
    """Read tokens behind what a cache holds, which takes them in.

    Args:
        model: to which kvweave is attached.
        position: of the first of them, as in `Reading`.
    """
    ids = torch.tensor([tokens], device=model.device)
    seen = cache.get_seq_length() + len(tokens)
    step: dict[str, Any] = {"input_ids": ids, names.CACHE: cache, "use_cache": True, "return_dict": True}
    if "logits_to_keep" in names.Signature.of(model).parameters:
        step["logits_to_keep"] = 1
    if position is not None:
        step["attention_mask"] = torch.ones(1, seen, dtype=torch.int64, device=ids.device)
        step["position_ids"] = position + torch.arange(len(tokens), device=position.device)
        position = position + len(tokens)
    return Reading(cache, model(**step).logits[0, -1], position, seen)
