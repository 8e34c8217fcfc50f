"""AdaKV: SnapKV with budgets of each head's own (Feng et al., 2407.11550; SPEC 10.5)."""

from dataclasses import dataclass

import torch

from kvweave.methods.allocation import Quota
from kvweave.methods.options import real
from kvweave.methods.registry import register
from kvweave.methods.scored import Scores, forced_tokens
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

    def shares(self, view: LayerView, quota: Quota, scores: Scores) -> list[list[int]]:
        if self.allocation != "head":
            return super().shares(view, quota, scores)
        forced, valid = (x.expand_as(scores.value) for x in forced_tokens(view, quota))
        among, stay = (view.over_heads(x) for x in (valid & ~forced, valid & forced))  # of all the layer's heads
        score = view.over_heads(scores.value).masked_fill(~among, -torch.inf)
        kv_heads = score.shape[1]
        wins = best(score.flatten(1), kv_heads * quota.free).view_as(score) & among
        counts = []
        for won, limits, base in torch.stack([wins.sum(-1), among.sum(-1), stay.sum(-1)], 1).tolist():
            goal = ((1 - self.safeguard) * own + self.safeguard * quota.free for own in won)
            total = min(kv_heads * quota.free, sum(limits))
            row = [min(share, limit) for share, limit in zip(goal, limits, strict=True)]
            free = largest_remainder(row, total, limits)
            counts.append([own + force for own, force in zip(free, base, strict=True)])
        return counts
