"""AdaKV: SnapKV with budgets of each head's own (Feng et al., 2407.11550; SPEC 10.5)."""

from dataclasses import dataclass

import torch

from kvweave.methods.options import real
from kvweave.methods.registry import register
from kvweave.methods.snapkv import SnapKV
from kvweave.ops.budget import largest_remainder
from kvweave.ops.select import best, chosen, ranks
from kvweave.plan import Plan
from kvweave.view import LayerView


@register("adakv")
@dataclass(frozen=True)
class AdaKV(SnapKV):
    """Heads whose best scores are the layer's best keep more; a share of the budget is every head's alike.

    Heads are stored apart, so that the memory of those that keep little is freed.
    """

    keeps_by = "pooled attention from the last rows"
    allocates_by = "score over heads (uneven heads)"
    source = "2407.11550"

    safeguard: float = real(0.2, lo=0, hi=1, help="share of the budget that all heads get alike")

    def plan(self, view: LayerView, budget: int) -> Plan:
        recent = self.recent(budget)
        score = self.score(view, recent)  # [batch, kv_heads, length - recent]
        held = torch.full_like(view.positions[..., 0], score.shape[-1])  # [batch, kv_heads]
        if view.empty is not None:
            empty = view.empty[..., : score.shape[-1]]
            score = score.masked_fill(empty, -torch.inf)
            held = (~empty).sum(-1)
        each = budget - recent
        held, every = view.over_heads(held), view.over_heads(score)  # of all the layer's heads
        kv_heads = every.shape[1]
        wins = best(every.flatten(1), kv_heads * each).view_as(every) & (every > -torch.inf)
        shares = (1 - self.safeguard) * wins.sum(-1).double() + self.safeguard * each
        counts = []
        for row, limits in zip(shares.tolist(), held.tolist(), strict=True):
            total = min(kv_heads * each, int(sum(limits)))
            row = [min(share, limit) for share, limit in zip(row, limits, strict=True)]
            counts.append(largest_remainder(row, total, [int(limit) for limit in limits]))
        count = view.heads.own(torch.tensor(counts, device=score.device))
        own = ranks(score) < count[..., None]
        kept = torch.cat([own, own.new_ones(*own.shape[:-1], recent)], -1)
        return Plan(chosen(kept), bias=None, uneven=True)
