"""TGV-KV: text first, and of the images what the important text looks at (2606.03075; SPEC 16.8)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvweave.methods.allocation import Quota
from kvweave.methods.needs import ALL_ROWS, Needs
from kvweave.methods.options import integer
from kvweave.methods.registry import register
from kvweave.methods.scored import ScoredMethod, Scores
from kvweave.ops import budget as counts
from kvweave.ops.statistics import received
from kvweave.view import LayerView

_LAST = 32  # rows that are looked at where there is no text


@register("tgv")
@dataclass(frozen=True)
class TGV(ScoredMethod):
    """Keeps text before images; a visual token by the attention of text rows, each counted by its own importance.

    Layers whose text looks at images most get more of the budget. The text rows are those behind the last image;
    where there are none, all of them.
    """

    keeps_by = "text first, then what important text attends to"
    allocates_by = "attention of text on images"
    source = "2606.03075"
    attention_like = True

    recent: int = integer(0, minimum=0, help="last tokens that stay, at most half of the budget")

    layer_adaptive = True
    uses_modality = True

    needs = Needs(ALL_ROWS, decoded=())  # a deferred cut only comes later

    def rows(self, view: LayerView) -> Tensor:
        """The text rows that are looked at, among those at hand: int64 [1, n]; rows of a batch are planned apart."""
        visual = view.row_visual()[0]
        shown = visual.nonzero().flatten()
        last = int(shown[-1]) + 1 if len(shown) else len(visual)
        text = torch.arange(last, len(visual), device=visual.device)
        text = text if len(text) else (~visual).nonzero().flatten()
        return (text if len(text) else torch.arange(max(0, len(visual) - _LAST), len(visual)).to(visual.device))[None]

    def statistics(self, view: LayerView) -> tuple[Tensor, Tensor, Tensor]:
        """Of these rows: attention on visual columns, [batch]; text and visual scores, [batch, kv_heads, length]."""
        return view.once(("tgv", *self.reduction), lambda: self._statistics(view))

    def _statistics(self, view: LayerView) -> tuple[Tensor, Tensor, Tensor]:
        rows = self.rows(view)
        queries, rule = view.some_rows(rows)
        sums = received(queries, view.keys, rule, "mean", "mean")
        on_images = view.over_heads((sums * view.visual).sum(2)).sum(1)
        by_head = sums if self.heads_by == "mean" else received(queries, view.keys, rule, "mean", self.heads_by)
        columns = rows + view.length - view.rows  # of the rows' own tokens
        seen_by = torch.arange(rows.shape[1], 0, -1, device=rows.device)  # rows from each on
        importance = by_head.gather(-1, columns[:, None].expand(-1, view.kv_heads, -1)) / seen_by
        importance = importance / importance.sum(-1, keepdim=True).clamp(min=1e-30)
        visual = received(queries, view.keys, rule, *self.reduction, importance)
        text = by_head if self.rows_by == "mean" else received(queries, view.keys, rule, *self.reduction)
        return on_images, text, visual

    def layer_weight(self, view: LayerView) -> Tensor:
        return self.statistics(view)[0]

    def score(self, view: LayerView, quota: Quota) -> Scores:
        _, text, visual = self.statistics(view)
        return Scores(torch.where(view.visual, visual, text), first=~view.visual)

    def allocate(self, weights: list[Any], budget: int, length: int) -> list[Any]:
        if self.pools:
            return super().allocate(weights, budget, length)
        return counts.allocate(weights, len(weights) * budget, counts.least(budget, length), length)
