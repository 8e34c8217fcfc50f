"""Compression without a model: research, tests, other engines."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvweave.cut.rows import Group, compact, fits, group_rows, observe
from kvweave.cut.shares import by_row, share_out
from kvweave.cut.waiting import decoded_attention, tell_attention
from kvweave.memory.slots import Slots
from kvweave.methods.base import Method
from kvweave.ops.budget import entries
from kvweave.ops.statistics import AttentionRule
from kvweave.plan import Compacted
from kvweave.prompt import Prompt
from kvweave.view import LayerView


@torch.no_grad()
def compress_tensors(
    method: Method,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    visual: Tensor,
    valid: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    scaling: float | None = None,
    decoded: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    probed: bool = False,
) -> list[Compacted]:
    """Compress the layers of one prompt, or of a batch of prompts, given as tensors.

    Args:
        method: what decides, such as `FlowMM(budget=0.2)`.
        queries: one a layer, [batch, heads, length, dim], after norm and rotary.
        keys, values: one a layer, [batch, kv_heads, length, dim], keys after norm and rotary; heads is a multiple
            of kv_heads, query head h reads KV head h // (heads / kv_heads).
        visual: bool [batch, length], True for tokens whose embedding comes from the vision encoder.
        valid: bool [batch, length], False for padding; None: no padding.
        rotary: (cos, sin), [batch, length, rotary_dim] each, for methods that turn keys (`rope_aware=True`).
        scaling: factor of the logits; None: dim ** -0.5.
        decoded: (queries, keys) of the tokens that were decoded behind the prompt, lists, one a layer, [batch, heads,
            tokens, dim] and [batch, kv_heads, tokens, dim], for methods that defer their cut (`defer` tokens); None:
            the method cuts when the prompt ends, whatever its `defer`.
        probed: those tokens are probes and their answers.
    Returns:
        One `Compacted` a layer.
    Raises:
        ValueError: shapes or types that do not fit, a row without a token, NaN in a token's tensors.
    """
    if not isinstance(method, Method):
        raise TypeError(f"method={method!r} is not a kvweave method: allowed is one of kvweave.get_method(...)")
    prompt = _checked(queries, keys, values, visual, valid)
    if rotary is not None:
        _check_rotary(rotary, keys[0])
    if decoded is not None:
        _check_decoded(decoded, queries, keys, None if probed else method.defer)
    wanted = method.probed_rows if probed else method.query_rows
    batch, _, length, dim = keys[0].shape
    layers = len(keys)
    lengths = [length] * batch if valid is None else prompt.lengths
    _check_numbers(prompt, queries=queries, keys=keys, values=values)
    padded = min(lengths) < length
    bytes_per_entry = batch * sum(_entry_bytes(k, v) for k, v in zip(keys, values, strict=True))
    budgets = [entries(method.budget, n, bytes_per_entry) for n in lengths]
    rule = AttentionRule(dim**-0.5 if scaling is None else scaling)

    layers_of_slots = [Slots(k, v).as_slots(prompt.valid, padded=padded) for k, v in zip(keys, values, strict=True)]

    def view(layer: int) -> list[Group]:
        groups = group_rows(
            layers_of_slots[layer],
            queries[layer] if wanted else None,
            prompt,
            rule,
            layer=layer,
            layers=layers,
            rotary=rotary if method.turns_keys else None,
            wanted=wanted,
            apart=range(batch) if method.plans_rows_alone else None,
        )
        for group in groups:
            if decoded is not None and wanted:
                behind = decoded[0][layer][group.index], decoded[1][layer][group.index]
                _tell(group.view, *behind, rule, method, probed=probed)
                tokens = decoded[0][layer].new_full((1, 1, 1), decoded[0][layer].shape[2], dtype=torch.float64)
                group.view.decoded_weight = method.weight_of(tokens)
        return groups

    if method.layer_adaptive:
        views = [view(layer) for layer in range(layers)]
        weights = [by_row(g, observe(method, g, budgets, lengths, probed=(probed,))) for g in views]
        shares = share_out(method, budgets, lengths, layers, weights)
    else:
        views = []
        shares = share_out(method, budgets, lengths, layers)
    done = []
    for layer in range(layers):
        groups = views[layer] if views else view(layer)
        share = shares[layer]
        if fits(groups, share) and not padded:  # the tensors that came in, bit for bit
            own = keys[layer]
            positions = torch.arange(length, device=own.device).expand(*own.shape[:2], -1)
            done.append(Compacted(own, values[layer], positions, torch.ones(positions.shape, device=own.device)))
        else:
            done.append(compact(method, groups, share, budgets).compacted)
    return done


def _tell(
    view: LayerView, queries: Tensor, keys: Tensor, rule: AttentionRule, method: Method, *, probed: bool
) -> None:
    """Let a view know what tokens behind its prompt attend to."""
    tokens = queries.shape[2]
    counted = torch.ones(len(queries), tokens, dtype=torch.bool, device=keys.device)
    if not probed:
        rule = replace(rule, scaling=rule.scaling / method.decoded_temperature)
    for reduction in method.decoded_reductions:
        total = decoded_attention(view, queries, keys, counted, rule, *reduction)
        tell_attention(view, reduction, total, counted.sum(1)[:, None, None])
    if method.keeps_rows:
        view.decoded_queries, view.decoded_counted = queries, counted
    view.probed = probed


def _entry_bytes(keys: Tensor, values: Tensor) -> int:
    return keys.shape[1] * (keys.shape[3] * keys.element_size() + values.shape[3] * values.element_size())


def _checked(
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
        if mask.dtype != torch.bool or mask.shape != shape:
            raise ValueError(
                f"{name} must be bool [batch, length] = {list(shape)}, got {mask.dtype} {list(mask.shape)}"
            )
    if not everything and not bool(valid.any(1).all()):
        empty = (~valid.any(1)).nonzero().flatten().tolist()
        raise ValueError(f"valid: row {empty[0]} has no token; every row needs at least one")
    return Prompt(visual, valid)


def _check_numbers(prompt: Prompt, **given: Sequence[Tensor]) -> None:
    """Refuse NaN, which compares with nothing, so that what is kept of it would be anything; padding may hold it."""
    norms = torch._foreach_norm([x for tensors in given.values() for x in tensors])  # one call, and one read
    home = norms[0].device
    if not math.isnan(torch.stack([x if x.device == home else x.to(home) for x in norms]).sum().item()):
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
    if not (len(decoded) == 2 and len(decoded[0]) == len(decoded[1]) == len(keys)):
        raise ValueError(f"decoded must be (queries, keys), lists of {len(keys)} tensors each, one a layer")
    for layer, (asked, known) in enumerate(zip(*decoded, strict=True)):
        for name, x, prompt in (("queries", asked, queries[layer]), ("keys", known, keys[layer])):
            wanted = [*prompt.shape[:2], decoded[0][0].shape[2] if tokens is None else tokens, prompt.shape[3]]
            if list(x.shape) != wanted or not x.shape[2]:
                raise ValueError(
                    f"decoded, layer {layer}: {name} {list(x.shape)} must be {wanted}, defer tokens, > 0"
                )


def _check_rotary(rotary: tuple[Tensor, Tensor], keys: Tensor) -> None:
    cos, sin = rotary
    batch, _, length, dim = keys.shape
    if cos.shape != sin.shape or cos.shape[:2] != (batch, length) or cos.shape[-1] > dim or cos.shape[-1] % 2:
        raise ValueError(
            f"rotary: cos {list(cos.shape)} and sin {list(sin.shape)} must be [batch, length, rotary_dim] = "
            f"[{batch}, {length}, even and at most {dim}]"
        )
