"""Tensors that a user hands to `compress_tensors`: what does not fit is refused by name, before any work."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvweave.methods.base import Method
from kvweave.ops.budget import kl_target
from kvweave.prompt import Prompt


def checked(
    method: Method,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    visual: Tensor,
    valid: Tensor | None,
    rotary: tuple[Tensor, Tensor] | None,
    decoded: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    *,
    probed: bool,
) -> Prompt:
    """The prompt's masks, where everything fits; the arguments are those of `compress_tensors`.

    Raises:
        TypeError, ValueError: it does not; the message says what is allowed.
    """
    if not isinstance(method, Method):
        raise TypeError(f"method={method!r} is not a kvweave method: allowed is one of kvweave.get_method(...)")
    if kl_target(method.budget) is not None:
        raise ValueError(f"budget={method.budget!r} is found by decoding: allowed without a model is a number")
    prompt = _prompt(queries, keys, values, visual, valid)
    if rotary is not None:
        _check_rotary(rotary, keys[0])
    if decoded is not None:
        _check_decoded(decoded, queries, keys, None if probed else method.defer)
    _check_numbers(prompt, queries=queries, keys=keys, values=values)
    return prompt


def _prompt(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    visual: Tensor,
    valid: Tensor | None,
) -> Prompt:
    if not 0 < len(keys) == len(queries) == len(values):
        raise ValueError(
            "queries, keys and values must hold one tensor a layer, at least one, "
            f"got {len(queries)}, {len(keys)} and {len(values)}"
        )
    for layer, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        fit = (
            q.dim() == k.dim() == v.dim() == 4
            and k.shape[:3] == v.shape[:3]
            and q.shape[0] == k.shape[0] == keys[0].shape[0]
            and q.shape[2] == k.shape[2] == keys[0].shape[2]
            and q.shape[3] == k.shape[3]
            and q.shape[1] % k.shape[1] == 0
            and min(q.shape) > 0
        )
        if not fit:
            raise ValueError(
                f"layer {layer}: queries {list(q.shape)}, keys {list(k.shape)} and values {list(v.shape)} do not fit "
                "[batch, heads, length, dim], [batch, kv_heads, length, dim] and [batch, kv_heads, length, dim]"
            )
    shape = (keys[0].shape[0], keys[0].shape[2])
    everything = valid is None
    if valid is None:
        valid = torch.ones(shape, dtype=torch.bool, device=keys[0].device)
    for name, mask in (("visual", visual), ("valid", valid)):
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
            raise ValueError(f"{name} must be bool [batch, length] = {list(shape)}, got {got}")
    if not everything and not bool(valid.any(1).all()):
        empty = (~valid.any(1)).nonzero().flatten().tolist()
        raise ValueError(f"valid: row {empty[0]} has no token; every row needs at least one")
    return Prompt(visual, valid)


def _check_numbers(prompt: Prompt, **given: Sequence[Tensor]) -> None:
    """Refuse NaN, which compares with nothing, so that what is kept of it would be anything; padding may hold it."""
    most = torch._foreach_max([x for tensors in given.values() for x in tensors])  # one call, and one read
    home = most[0].device
    if not math.isnan(torch.stack([x if x.device == home else x.to(home) for x in most]).sum().item()):
        return
    for name, tensors in given.items():
        for layer, x in enumerate(tensors):
            wrong = (x.isnan().any(-1) & prompt.valid[:, None].to(x.device)).nonzero()
            if len(wrong):
                row, head, slot = wrong[0].tolist()
                raise ValueError(
                    f"{name}, layer {layer}: NaN at row {row}, head {head}, token {slot}: allowed is numbers"
                )


def _check_decoded(
    decoded: tuple[Sequence[Tensor], Sequence[Tensor]],
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    tokens: int | None,
) -> None:
    """Refuse all but `tokens` tokens behind the prompt; None: as many as the first layer has."""
    if not (len(decoded) == 2 and len(decoded[0]) == len(decoded[1]) == len(keys)):
        raise ValueError(f"decoded must be (queries, keys), lists of {len(keys)} tensors each, one a layer")
    for layer, (q, k) in enumerate(zip(*decoded, strict=True)):
        for name, x, prompt in (("queries", q, queries[layer]), ("keys", k, keys[layer])):
            shape = [*prompt.shape[:2], decoded[0][0].shape[2] if tokens is None else tokens, prompt.shape[3]]
            if list(x.shape) != shape or not x.shape[2]:
                raise ValueError(f"decoded, layer {layer}: {name} {list(x.shape)} must be {shape}, defer tokens, > 0")


def _check_rotary(rotary: tuple[Tensor, Tensor], keys: Tensor) -> None:
    cos, sin = rotary
    batch, _, length, dim = keys.shape
    if cos.shape != sin.shape or cos.shape[:2] != (batch, length) or cos.shape[-1] > dim or cos.shape[-1] % 2:
        raise ValueError(
            f"rotary: cos {list(cos.shape)} and sin {list(sin.shape)} must be [batch, length, rotary_dim] = "
            f"[{batch}, {length}, even and at most {dim}]"
        )
