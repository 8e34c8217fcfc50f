"""AdaKV: SnapKV with budgets of each head's own (Feng et al., 2407.11550; SPEC 10.5)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvweave.methods.allocation import Quota
from kvweave.methods.options import real
from kvweave.methods.registry import register
from kvweave.methods.scored import Scores
from kvweave.methods.snapkv import SnapKV
from kvweave.ops.budget import largest_remainder
from kvweave.ops.select import best
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

    uneven = True

    def shares(
        self, view: LayerView, quota: Quota, scores: Scores, forced: Tensor, valid: Tensor, base: Tensor
    ) -> Tensor:
        if self.allocation != "head":
            return super().shares(view, quota, scores, forced, valid, base)
        among = view.over_heads((valid & ~forced).expand_as(scores.value))  # of all the layer's heads
        score = view.over_heads(scores.value).masked_fill(~among, -torch.inf)
        kv_heads = score.shape[1]
        wins = best(score.flatten(1), kv_heads * quota.free).view_as(score) & among
        goal = (1 - self.safeguard) * wins.sum(-1).double() + self.safeguard * quota.free
        counts = []
        for row, limits in zip(goal.tolist(), among.sum(-1).tolist(), strict=True):
            total = min(kv_heads * quota.free, sum(limits))
            row = [min(share, limit) for share, limit in zip(row, limits, strict=True)]
            counts.append(largest_remainder(row, total, limits))
        return view.heads.own(torch.tensor(counts, device=base.device))
