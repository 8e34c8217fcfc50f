"""Variants of weave that benchmarks.research.weave tries and the library does not have: they did not help enough."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvweave.methods.allocation import Quota
from kvweave.methods.merging import partition
from kvweave.methods.options import real
from kvweave.methods.registry import register
from kvweave.methods.weave import Weave
from kvweave.ops.match import nearest, unit
from kvweave.ops.select import best, complement, last, lowest
from kvweave.plan import Plan
from kvweave.view import LayerView


@register("output_error", wrapper=True)
@dataclass(frozen=True)
class OutputError(Weave):
    """Scores by the output error that keeping a token prevents: its attention times |value - output|."""

    def score(self, view: LayerView, quota: Quota | None = None) -> Tensor:
        share = super().score(view)
        share = share / share.sum(-1, keepdim=True)
        output = share[..., None, :] @ view.values.to(share.dtype)  # [batch, kv_heads, 1, dim]
        return share * (view.values - output).norm(dim=-1)


@register("covering", wrapper=True)
@dataclass(frozen=True)
class Covering(Weave):
    """Chooses `covered` of the pivots, after the best others, greedily where score x distance to them is largest."""

    covered: float = real(0.35, lo=0, hi=1, help="share of the pivots")

    def plan(self, view: LayerView, budget: int) -> Plan:
        score, recent = self.score(view), min(self.recent, budget // 2)
        count = budget - recent
        early = score[..., : view.length - recent]
        chosen = best(early, count - int(self.covered * count))
        keys = unit(view.keys)[..., : view.length - recent, :]
        nearest_key = (keys @ keys.mT).masked_fill(~chosen[:, :, None], -1).amax(-1)  # cosine with what is chosen
        targets = torch.zeros_like(chosen)
        for _ in range(int(self.covered * count)):
            gain = (early * (1 - nearest_key)).masked_fill(chosen, -1)
            at = gain.argmax(-1, keepdim=True)
            chosen, targets = chosen.scatter(-1, at, True), targets.scatter(-1, at, True)
            new = keys.gather(2, at[..., None].expand(-1, -1, -1, keys.shape[-1]))
            nearest_key = torch.maximum(nearest_key, (keys @ new.mT)[..., 0])
        pivots = chosen.nonzero()[:, -1].view(*chosen.shape[:-1], count)
        keep = torch.cat([pivots, last(score, recent)], -1)
        source = complement(keep, view.length)
        eligible = targets if self.covered * count >= 1 else chosen
        target, cosine = self.match(view, pivots, eligible.gather(-1, pivots), source)
        return self.merged(view, keep, source, target, cosine, score)


@register("pooled_heads", wrapper=True)
@dataclass(frozen=True)
class PooledHeads(Weave):
    """Shares the budget over a layer's KV heads by equal marginal score, as AdaKV does, with a floor for each."""

    floor: float = real(0.2, lo=0, hi=1, help="share of a head's even budget that it has for certain")

    def plan(self, view: LayerView, budget: int) -> Plan:
        score, recent = self.score(view), min(self.recent, budget // 2)
        count = budget - recent
        early = score[..., : view.length - recent]
        raised = early.masked_fill(best(early, max(1, int(self.floor * count))), torch.inf)
        pivots = best(raised.flatten(1), view.kv_heads * count).view_as(early)
        kept = torch.cat([pivots, torch.ones_like(score[..., view.length - recent :], dtype=torch.bool)], -1)
        keep, source = partition(view, kept)
        at, goal = source.clamp(min=0), keep.clamp(min=0)
        movable = (keep >= 0) & (keep < view.length - recent)
        worth = score.gather(-1, goal).masked_fill(~movable, torch.inf)
        ranked = worth.sort(-1).values
        rank = ((self.sensitivity_quantile or 1.0) * (movable.sum(-1) - 1)).long().clamp(min=0)
        eligible = movable & (worth <= ranked.gather(-1, rank[..., None]))
        target, cosine = nearest(view.keys, at, goal, eligible[:, :, None], torch.zeros_like(at))
        plan = self.merged(view, goal, at, target.masked_fill(source < 0, -1), cosine, score)
        return replace(plan, keep=keep, uneven=True)


@register("same_modality", wrapper=True)
@dataclass(frozen=True)
class SameModality(Weave):
    """Merges into pivots of the same modality only, as FlowMM does in intra-modal layers."""

    def plan(self, view: LayerView, budget: int) -> Plan:
        score, recent = self.score(view), min(self.recent, budget // 2)
        early = score[..., : view.length - recent]
        pivots = best(early, budget - recent).nonzero()[:, -1].view(*early.shape[:-1], budget - recent)
        keep = torch.cat([pivots, last(score, recent)], -1)
        source = complement(keep, view.length)
        eligible = lowest(score.gather(-1, pivots), self.sensitivity_quantile)
        visual = view.visual.gather(-1, pivots)
        allowed = torch.stack([eligible & ~visual, eligible & visual], 2)
        target, cosine = nearest(view.keys, source, pivots, allowed, view.visual.gather(-1, source).long())
        return self.merged(view, keep, source, target, cosine, score)
