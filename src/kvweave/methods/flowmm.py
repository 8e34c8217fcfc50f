"""FlowMM: cross-modal information flow guides the merge, sensitivity guards it.

Source: FlowMM: Cross-Modal Information Flow Guided KV Cache Merging (2511.05534), Sec. 3.3, Eqs. 6-10;
the open points and our readings are in SPEC 3.1 and docs/ERRATA.md.
"""

import math
from dataclasses import dataclass, replace
from operator import methodcaller

import torch
from torch import Tensor

from kvweave.methods.merging import MergingMethod
from kvweave.methods.needs import ALL_ROWS, Needs
from kvweave.methods.options import choice, integer, real
from kvweave.methods.registry import register
from kvweave.ops.match import nearest_of_few
from kvweave.ops.select import complement, last, lowest, top, top_by_modality
from kvweave.plan import Plan
from kvweave.view import LayerView

_FEW, _MANY = 256, 1024  # rows that estimate the flow ratio, of more than so many


@register("flowmm")
@dataclass(frozen=True)
class FlowMM(MergingMethod):
    """Keeps what the last tokens attend to and merges the rest into the least sensitive of it.

    In a layer whose attention crosses modalities (flow ratio above theta) a token may merge into any modality, in
    the others only into its own. The paper's ablations: without information flow, `flow="cross"`; without
    sensitivity, `sensitivity_quantile=None`; misaligned, `flow="misaligned"`.
    """

    keeps_by = "attention from the last rows"
    merges_by = "nearest insensitive pivot; across modalities where flow is high"
    source = "2511.05534"

    theta: float = real(0.25, lo=-math.inf, hi=math.inf, help="flow ratio above which a layer is cross-modal")
    proxies: int = integer(32, minimum=1, help="last tokens whose attention is a token's importance")
    sensitivity_quantile: float | None = real(
        0.2,
        lo=0,
        hi=1,
        optional=True,
        help="share of the pivots, least important first, that may absorb others",
    )
    flow: str = choice(
        "aligned", "aligned", "misaligned", "cross", "intra", help="layer mode: by the flow ratio, or fixed"
    )
    flow_ratio: str = choice("literal", "literal", "balanced", "nosink", help="which ratio is held against theta")
    flow_rows: int | None = integer(
        None,
        minimum=0,
        optional=True,
        help="rows, drawn from both modalities, that estimate it; 0: all; None: 256 in prompts of over 1,024 tokens",
    )
    seed: int = integer(0, minimum=0, help="of that draw")
    cross_scope: str = choice("any", "any", "other_only", help="modalities that a cross-modal merge allows")
    no_target: str = choice("evict", "evict", "any", help="a token without an allowed pivot: gone, or into any")
    modality_floor: int = integer(0, minimum=0, help="pivots of each modality that stay at least")

    uses_modality = True

    @property
    def needs(self) -> Needs:
        importance = methodcaller("window_attention", self.proxies)
        # all rows: the ratio is reported where `flow` is fixed, too
        return replace(super().needs, rows=ALL_ROWS, statistics=(importance, self.measure))

    def plan(self, view: LayerView, budget: int) -> Plan:
        importance = view.window_attention(self.proxies)  # Eq. 8: [batch, kv_heads, length]
        recent = min(self.proxies, budget // 2)
        pivots = self.pivots(view, importance, budget - recent, view.length - recent)
        keep = torch.cat([pivots, last(importance, recent)], -1)
        source = complement(keep, view.length)

        flow, log = self.measure(view)
        cross = self.is_cross(flow)  # [batch]
        eligible = lowest(importance.gather(-1, pivots), self.sensitivity_quantile)  # step 4, Eq. 10
        # read from the device at once: which rows are cross-modal, and the most eligible pivots of a head
        *crosses, most = torch.cat([cross.long(), eligible.sum(-1).max()[None]]).tolist()
        target, cosine = self.match(view, pivots, eligible, most, source, cross)
        plan = self.merged(view, keep, source, target, cosine, importance)
        scope = tuple("cross" if row else "intra" for row in crosses)
        return replace(plan, flow=flow, scope=scope, log=log)

    def measure(self, view: LayerView) -> tuple[Tensor, dict[str, Tensor]]:
        """Step 1, Eqs. 6-7: the ratio that decides, and the other two for the report."""
        rows = self.flow_rows
        if rows is None:
            rows = _FEW if view.length > _MANY else 0
        ratios = view.flow(rows, self.seed)
        log = {"flow_literal": ratios.literal, "flow_balanced": ratios.balanced, "flow_nosink": ratios.nosink}
        if 0 < rows < view.row_visual().shape[-1]:  # estimates: so say how many rows they are from
            log["flow_rows"] = torch.full_like(ratios.literal, rows)
        return log.pop(f"flow_{self.flow_ratio}"), log

    def is_cross(self, flow: Tensor) -> Tensor:
        """Step 2: which rows' layer is cross-modal, bool [batch]."""
        above = flow > self.theta
        modes = {"aligned": above, "misaligned": ~above, "cross": torch.ones_like(above)}
        return modes.get(self.flow, torch.zeros_like(above))

    def pivots(self, view: LayerView, importance: Tensor, count: int, before: int) -> Tensor:
        """Step 3, Eq. 8: the `count` most important tokens of the first `before`, [batch, kv_heads, count]."""
        importance, visual = importance[..., :before], view.visual[..., :before]
        chosen = top(importance, count)
        if not self.modality_floor:
            return chosen
        floor = torch.tensor(min(self.modality_floor, count // 2), device=importance.device)
        visuals = visual.gather(-1, chosen).sum(-1)
        visuals = torch.maximum(visuals, torch.minimum(floor, visual.sum(-1)))
        texts = torch.maximum(count - visuals, torch.minimum(floor, (~visual).sum(-1)))
        return top_by_modality(importance, visual, count - texts, count)

    def match(
        self, view: LayerView, pivots: Tensor, eligible: Tensor, most: int, source: Tensor, cross: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Step 5, Eqs. 9-10: the nearest eligible pivot of an allowed modality, as an index into the kept tokens."""
        label = torch.arange(2, device=pivots.device).bool()[:, None]  # a source is text or visual
        same = view.visual.gather(-1, pivots)[:, :, None] == label  # [batch, kv_heads, 2, pivots]
        crossing = torch.ones_like(same) if self.cross_scope == "any" else ~same
        allowed = torch.where(cross[:, None, None, None], crossing, same) & eligible[:, :, None]
        if self.no_target == "any":
            allowed = torch.where(allowed.any(-1, keepdim=True), allowed, eligible[:, :, None])
        return nearest_of_few(view.keys, source, pivots, allowed, view.visual.gather(-1, source).long(), most)
