"""Compression without a model: research, tests, other engines."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvweave.cut.inputs import checked
from kvweave.cut.layer_cut import LayerCut
from kvweave.cut.rows import Group, compact, fits, observe
from kvweave.cut.shares import by_row, share_out
from kvweave.cut.terms import Terms
from kvweave.cut.waiting import tell_rows
from kvweave.memory.slots import Slots
from kvweave.methods.base import Method
from kvweave.ops.budget import entries
from kvweave.ops.statistics import AttentionRule
from kvweave.plan import Compacted
from kvweave.prompt import Prompt


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
        method: what decides, such as `FlowMM(budget=0.2)`. What a method leaves to the model it works on, as `weave`
            does with nothing but a budget, is as its options say.
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
    method = method.without_model
    if method.coarse_cut is not None:
        raise ValueError("coarse is what a model's cache holds until its cut: allowed without a model is coarse=0")
    prompt = checked(method, queries, keys, values, visual, valid, rotary, decoded, probed=probed)
    batch, _, length, dim = keys[0].shape
    lengths = [length] * batch if valid is None else prompt.lengths
    padded, layers, terms = min(lengths) < length, len(keys), _terms(method, len(keys), rotary, probed=probed)
    rule = AttentionRule(dim**-0.5 if scaling is None else scaling)
    slots = [Slots(k, v).as_slots(prompt.valid, padded=padded) for k, v in zip(keys, values, strict=True)]

    def views_of(layer: int) -> list[Group]:
        behind = None if decoded is None else (decoded[0][layer], decoded[1][layer])
        return _views(layer, slots[layer], queries[layer], behind, prompt, rule, terms)

    budgets = [entries(method.budget, n, batch * sum(map(_entry_bytes, slots))) for n in lengths]
    every = [views_of(layer) for layer in range(layers)] if terms.adaptive else []
    weights = [by_row(groups, observe(method, groups, budgets, lengths, probed=(probed,))) for groups in every]
    outcomes = []
    for layer, share in enumerate(share_out(method, budgets, lengths, layers, weights or None)):
        groups = every[layer] if every else views_of(layer)
        if fits(groups, share) and not padded:  # the tensors that came in, bit for bit
            outcomes.append(_uncut(keys[layer], values[layer]))
        else:
            outcomes.append(compact(method, groups, share, budgets).compacted)
    return outcomes


def _views(
    layer: int,
    slots: Slots,
    queries: Tensor,
    behind: tuple[Tensor, Tensor] | None,
    prompt: Prompt,
    rule: AttentionRule,
    terms: Terms,
) -> list[Group]:
    """What the method sees of a layer, and of the tokens `behind` its prompt, (queries, keys)."""
    groups = LayerCut(layer).groups(slots, queries if terms.query_rows else None, prompt, rule, terms, whole=True)
    if behind is not None and terms.query_rows:
        tell_rows(groups, prompt, *behind, rule, terms)
    return groups


def _terms(method: Method, layers: int, rotary: tuple[Tensor, Tensor] | None, *, probed: bool) -> Terms:
    needs = method.needs
    rows = needs.rows_with_probes if probed else needs.rows
    return Terms.of(method, layers=layers, query_rows=rows, probed=probed, rotary=rotary if needs.rotary else None)


def _uncut(keys: Tensor, values: Tensor) -> Compacted:
    """A layer of which nothing goes."""
    positions = torch.arange(keys.shape[2], device=keys.device).expand(*keys.shape[:2], -1)
    return Compacted(keys, values, positions, torch.ones(positions.shape, device=keys.device))


def _entry_bytes(slots: Slots) -> int:
    """Of a token's keys and values in one layer, in one row of the batch."""
    return sum(x.shape[1] * x.shape[3] * x.element_size() for x in (slots.keys, slots.values))
