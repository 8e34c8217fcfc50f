"""The limit of eviction: what could be kept if one knew which tokens the answer will look at.

Two passes. The first answers with the full cache and notes, for each layer and KV head, the largest attention that a
token decoded after the prompt pays to each of its slots (`paid_attention`): what one token needs is not outvoted by
many that do not. The second keeps the slots that are paid most, to the same budget as any method, and answers again.
Nobody can serve like that: it is a row to hold methods against. It is no proof of a bound: it keeps equally many
slots in every layer and head, goes by attention alone, and merging carries along what eviction loses.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvweave.evals.answer.prefill import Prefill, RecordedLayer
from kvweave.methods.base import Method
from kvweave.methods.registry import register
from kvweave.ops.select import top
from kvweave.ops.statistics import column_sums
from kvweave.plan import Plan
from kvweave.view import LayerView


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


def paid_attention(prefill: Prefill, ends: Tensor) -> list[Tensor]:
    """The largest attention that decoded tokens paid to each slot of the prompt, over tokens and each group's heads.

    Args:
        ends: tokens after which a row's answer is over, and what the model is fed no longer counts.
    Returns:
        For each recorded layer float [batch, kv_heads, columns of the prompt].
    """
    fed = prefill.tokens[:, prefill.start :]
    going = (~torch.isin(fed, ends.to(fed.device))).cummin(1).values  # [batch, tokens]
    return [_paid(layer, prefill.start, going) for layer in prefill.recorded_layers]


@torch.no_grad()
def _paid(layer: RecordedLayer, start: int, going: Tensor) -> Tensor:
    keys, positions = layer.keys, layer.positions
    assert keys is not None
    assert positions is not None
    batch, kv_heads, length, _ = keys.shape
    if len(layer.calls) < 2:  # nothing was decoded
        return torch.zeros(batch, kv_heads, start, device=keys.device)
    queries = torch.cat([call[0] for call in layer.calls[1:]], 2)  # [batch, heads, decoded, dim]
    decoded = queries.shape[2]
    visible = (positions[:, :1, None] >= 0).expand(batch, 1, decoded, length)
    ahead = torch.ones(decoded, length, dtype=torch.bool, device=visible.device).tril(length - decoded)
    mask = visible & ahead
    rule = layer.calls[1][1]
    rule = replace(rule, mask=lambda low, high: mask[:, :, low:high])
    apart = torch.diag_embed(going[:, :decoded])  # each token a kind of row of its own
    paid = column_sums(queries, keys, rule, apart)  # [batch, heads, decoded, length]
    return paid.amax(2).unflatten(1, (kv_heads, -1)).amax(2)[..., :start]
