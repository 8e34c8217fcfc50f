"""DefensiveKV: against the worst case, not the mean (SPEC 16.6)."""

from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor

from kvweave.methods.allocation import Quota
from kvweave.methods.needs import MEANS, Needs
from kvweave.methods.options import choice, integer
from kvweave.methods.registry import register
from kvweave.methods.scored import ScoredMethod, Scores
from kvweave.view import LayerView


@register("defensive")
@dataclass(frozen=True)
class Defensive(ScoredMethod):
    """Keeps the tokens that some row and head of the window attended to most, none taken for less risky than the
    mean.

    Tokens below the mean of these maxima tie, and are ranked by their plain mean.
    """

    keeps_by = "largest attention from any of the last rows and heads"
    source = "DefensiveKV"
    attention_like = True

    window: int = integer(32, minimum=1, help="last rows that vote")
    recent: int | None = integer(None, minimum=0, optional=True, help="last tokens that stay; None: the window's")
    sinks: int = integer(0, minimum=0, help="first tokens that stay, at most half of the rest")
    _: KW_ONLY
    rows_by: str = choice("max", "mean", "max", help="attention of the rows that count: the largest, or their mean")
    heads_by: str = choice(
        "max", "mean", "max", help="attention of a KV head's query heads: the largest or their mean"
    )

    @property
    def needs(self) -> Needs:
        return replace(super().needs, rows=self.window, decoded=tuple(dict.fromkeys([self.reduction, MEANS])))

    def quota(self, budget: int, mean_budget: int) -> Quota:
        recent = min(self.window if self.recent is None else self.recent, budget // 2)
        return Quota(budget, min(self.sinks, (budget - recent) // 2), recent)

    def score(self, view: LayerView, quota: Quota) -> Scores:
        if self.rows_by == "max":
            most, decoded = (
                view.prompt_attention(self.window, *self.reduction),
                view.decoded_attention(*self.reduction),
            )
            most = most if decoded is None else torch.maximum(most, decoded)
        else:
            most = view.window_attention(self.window, rows_by=self.rows_by, heads_by=self.heads_by)
        return Scores(
            torch.maximum(most, self._mean(view, most, quota)),
            ties=view.window_attention(self.window),
        )

    def _mean(self, view: LayerView, most: Tensor, quota: Quota) -> Tensor:
        """Of the candidates' maxima: [batch, kv_heads, 1]."""
        between = slice(quota.sinks, view.length - quota.recent)
        most = most[..., between]
        if view.empty is None:
            return most.mean(-1, keepdim=True)
        valid = ~view.empty[..., between]
        return (most * valid).sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
