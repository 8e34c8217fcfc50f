"""CaM: evicted values are spread over the kept tokens that follow (ICML 2024; SPEC 10.8)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvweave.methods.base import Method
from kvweave.methods.needs import ALL_ROWS, Needs
from kvweave.methods.options import choice, integer
from kvweave.methods.registry import register
from kvweave.ops.draw import uniform
from kvweave.ops.match import take
from kvweave.ops.select import complement, top_and_recent
from kvweave.plan import Plan
from kvweave.view import LayerView


@register("cam")
@dataclass(frozen=True)
class CaM(Method):
    """H2O's selection; each evicted value is added, with a probability, to the kept values behind it.

    Keys stay as they are, and so does mass: the tokens count as evicted. It adds value mass, so it is not convex.
    """

    keeps_by = "attention from all rows, and the recent half"
    merges_by = "values spread over the kept tokens behind"
    source = "ICML 2024"

    window: int = integer(32, minimum=1, help="kept tokens that an evicted value is spread over")
    mode: str = choice("sample", "sample", "expected", help="add with probability p, or p times")
    against: str = choice(
        "mean", "mean", "largest", help="p: its attention over its targets' mean, or over any kept token's largest"
    )
    seed: int = integer(0, minimum=0, help="of the sampling")

    needs = Needs(ALL_ROWS, statistics=(LayerView.column_mass,))

    def plan(self, view: LayerView, budget: int) -> Plan:
        keep, mass = top_and_recent(view.column_mass(), budget, budget // 2), view.column_mass().double()
        evicted = complement(keep, view.length)
        first = torch.searchsorted(
            keep.contiguous(), evicted.contiguous()
        )  # the first kept token behind, [batch, kv_heads, evicted]
        stop = (first + self.window).clamp(max=budget)
        kept_mass, heads = mass.gather(-1, keep), (stop - first).clamp(min=1)
        if self.against == "largest":
            base = kept_mass.amax(-1, keepdim=True)
        else:
            sums = torch.nn.functional.pad(kept_mass.cumsum(-1), (1, 0))
            base = (sums.gather(-1, stop) - sums.gather(-1, first)) / heads
        share = (mass.gather(-1, evicted) / base.clamp(min=1e-30)).clamp(0, 1)
        if self.mode == "sample":
            share = (uniform(self.seed, view.layer, share, view.first_head) < share).to(share.dtype)
        share = torch.where(stop > first, share / heads, 0)
        values = take(view.values, evicted).to(share.dtype) * share[..., None]
        return Plan(keep, added=spread(values, first, stop, budget).to(mass.dtype))


def spread(values: Tensor, first: Tensor, stop: Tensor, entries: int) -> Tensor:
    """Sums over kept tokens of the values that are spread over [first, stop): [batch, kv_heads, kept, dim].

    Differences at both ends and one running sum: no work for each target.
    """
    ends = values.new_zeros(*values.shape[:2], entries + 1, values.shape[-1])
    index = first[..., None].expand_as(values)
    ends.scatter_add_(2, index, values)
    ends.scatter_add_(2, stop[..., None].expand_as(values), -values)
    return ends.cumsum(2)[:, :, :entries]
