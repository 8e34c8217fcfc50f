"""The limit of eviction: what could be kept if one knew which tokens the answer will look at.

Two passes. The first answers with the full cache and notes, for each layer and KV head, the largest attention that a
token after the prompt pays to each of its slots (`paid_attention`): what one token needs is not outvoted by many that
do not. The second keeps the slots that are paid most, to the same budget as any method, and answers again.
Nobody can serve like that: it is a row to hold methods against. It is no proof of a bound: it keeps equally many
slots in every layer and head, goes by attention alone, and merging carries along what eviction loses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvweave.evals.prefill import RecordedLayer
from kvweave.layer import LayerView
from kvweave.methods.base import Method, register
from kvweave.ops.select import top
from kvweave.ops.statistics import column_sums
from kvweave.plan import Plan


@register("oracle", wrapper=True)  # found by its name, and not listed among the methods to use
@dataclass(frozen=True)
class Oracle(Method):
    """Keeps the slots that the answer with the full cache attends to most; only evaluations know them."""

    keeps_by = "attention that the full-cache answer will pay"

    @classmethod
    def address(cls) -> str:
        return cls.name

    def plan(self, view: LayerView, budget: int) -> Plan:
        if view.memory is None:
            raise ValueError(
                "method='oracle' is not allowed here: it needs the answer beforehand; allowed is kvweave eval"
            )
        return Plan(top(view.memory.gather(-1, view.positions), budget))  # memory: [rows, kv_heads, columns]


def paid_attention(layer: RecordedLayer, start: int, counts: Sequence[int]) -> Tensor:
    """The largest attention that what came after the prompt paid to each of its slots, over tokens and group heads.

    Args:
        start: columns of the prompt.
        counts: for each row how many later tokens count: up to the end of its answer.
    Returns:
        Float [batch, kv_heads, start].
    """
    slots = layer.slots
    assert slots is not None
    assert slots.positions is not None
    batch, kv_heads, length, _ = slots.keys.shape
    if not layer.later:
        return torch.zeros(batch, kv_heads, start, device=slots.keys.device)
    queries = torch.cat([call[0] for call in layer.later], 2)  # [batch, heads, later, dim]
    later = queries.shape[2]
    seen = (slots.positions[:, :1, None] >= 0).expand(batch, 1, later, length)
    ahead = torch.ones(later, length, dtype=torch.bool, device=seen.device).tril(length - later)
    mask = seen & ahead
    rule = replace(layer.later[0][1], mask=lambda low, high: mask[:, :, low:high])
    going = torch.arange(later, device=seen.device) < torch.tensor(counts, device=seen.device)[:, None]
    apart = torch.diag_embed(going)  # each token a kind of row of its own
    paid = column_sums(queries, slots.keys, rule, apart)  # [batch, heads, later, length]
    return paid.amax(2).unflatten(1, (kv_heads, -1)).amax(2)[..., :start]
