"""KVMerger: runs of similar keys become one entry (Wang et al., 2407.08454; SPEC 9)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvweave.methods.merging import MergingMethod, partition
from kvweave.methods.needs import ALL_ROWS, Needs
from kvweave.methods.options import choice, flag, integer, real
from kvweave.methods.registry import register
from kvweave.ops.match import take, unit
from kvweave.ops.merge import RULES, segment_sum
from kvweave.ops.select import best
from kvweave.plan import Plan
from kvweave.view import LayerView


@register("kvmerger")
@dataclass(frozen=True)
class KVMerger(MergingMethod):
    """Joins neighbours of similar keys; each run merges into its member that received most attention.

    `variant="budgeted"` joins the most similar pairs until the budget is met; `"threshold"`, as published, all pairs
    above the threshold, whatever remains.
    """

    keeps_by = "attention from all rows, in runs of similar keys"
    merges_by = "the run's pivot, Gaussian weights"
    source = "2407.08454"

    variant: str = choice("budgeted", "budgeted", "threshold", help="join down to the budget, or above a similarity")
    threshold: float = real(0.75, lo=-1, hi=1, help="cosine above which neighbours join (variant threshold)")
    sigma: float = real(5.0, lo=0, hi=float("inf"), open_lo=True, help="width of the Gaussian, in key distance")
    value_scale: bool = flag(False, help="multiply merged values by the size of their cluster, as printed")
    recent: int = integer(32, minimum=0, help="last tokens that never join, at most half of what stays")
    merge_rule: str = choice("gaussian", "gaussian", *RULES, help="weights of the members of a merged entry")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value_scale and self.mass_bias:
            raise ValueError("value_scale=True is not allowed with mass_bias=True: a cluster would count twice")

    @property
    def needs(self) -> Needs:
        return replace(super().needs, rows=ALL_ROWS, statistics=(LayerView.column_mass,))

    def plan(self, view: LayerView, budget: int) -> Plan:
        cluster = self.clusters(view, budget)  # [batch, kv_heads, length], ascending numbers
        mass = view.column_mass()
        pivot = pivots(cluster, mass)
        keep = pivot == torch.arange(view.length, device=pivot.device)
        return self.merge_runs(view, keep, cluster, mass)

    def clusters(self, view: LayerView, budget: int) -> Tensor:
        """Number of the cluster that each token is in."""
        recent = min(self.recent, (budget if self.variant == "budgeted" else view.length) // 2)
        keys = unit(view.keys)
        similar = (keys[:, :, :-1] * keys[:, :, 1:]).sum(-1)  # [batch, kv_heads, length - 1]
        free = similar[..., : view.length - recent - 1]
        if self.variant == "budgeted":
            joined = best(free, view.length - budget)
        else:
            joined = free > self.threshold
            if view.empty is not None:
                joined &= ~view.empty[..., : joined.shape[-1]]
        apart = torch.ones_like(similar, dtype=torch.bool)
        apart[..., : joined.shape[-1]] = ~joined
        return torch.nn.functional.pad(apart.long().cumsum(-1), (1, 0))

    def merge_runs(self, view: LayerView, mask: Tensor, cluster: Tensor, importance: Tensor) -> Plan:
        """Every token into its cluster's pivot, the only one of the cluster in `mask`."""
        keep, source = partition(view, mask)
        mask = mask if view.empty is None else mask & ~view.empty
        number = mask.long().cumsum(-1) - 1  # a kept token's place among those of its head
        place = segment_sum(number * mask, cluster, view.length)  # of each cluster's pivot
        missing = (keep < 0).sum(-1, keepdim=True)  # heads that keep less have -1 in front
        at, goal = source.clamp(min=0), keep.clamp(min=0)
        target = place.gather(-1, cluster.gather(-1, at)) + missing
        target = target.masked_fill(source < 0, -1)
        to = goal.gather(-1, target.clamp(min=0))
        if self.merge_rule == "gaussian":
            members, centres = take(view.keys, at), take(view.keys, to)
            wide = torch.promote_types(members.dtype, torch.float32)
            distance = (members.to(wide) - centres.to(wide)).square().sum(-1)
            raw = view.mass.gather(-1, at) * torch.exp(-distance / (2 * self.sigma**2))
            norm = view.mass.gather(-1, goal) + segment_sum(raw, target, goal.shape[-1])
            weight, own = raw / norm.gather(-1, target.clamp(min=0)), view.mass.gather(-1, goal) / norm
            plan = self.weighted(view, goal, at, target, weight, own)
        else:
            cosine = (unit(take(view.keys, at)) * unit(take(view.keys, to))).sum(-1)
            plan = self.merged(view, goal, at, target, cosine, importance)
        assert plan.merge is not None
        if self.value_scale:
            plan = replace(plan, merge=replace(plan.merge, value_scale=plan.merge.mass))
        return replace(plan, keep=keep, uneven=bool((keep < 0).any()))


def pivots(cluster: Tensor, score: Tensor) -> Tensor:
    """Position of the best member of each token's cluster; ties go to the lower one.

    Args:
        cluster: int64 [batch, kv_heads, length]; score: [batch, kv_heads, length].
    Returns:
        int64 [batch, kv_heads, length].
    """
    best = torch.full_like(score, -torch.inf).scatter_reduce_(-1, cluster, score, "amax")
    places = torch.arange(score.shape[-1], device=score.device).expand_as(cluster)
    length = score.shape[-1]
    candidates = places.masked_fill(score < best.gather(-1, cluster), length)
    return torch.full_like(places, length).scatter_reduce_(-1, cluster, candidates, "amin").gather(-1, cluster)
