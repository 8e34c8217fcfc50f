"""Leave one out: what the output would lose with a token (DropKV; SPEC 16.5)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvweave.methods.allocation import Quota
from kvweave.methods.needs import Needs
from kvweave.methods.options import integer
from kvweave.methods.registry import register
from kvweave.methods.scored import ScoredMethod
from kvweave.view import LayerView


@register("leave_one_out")
@dataclass(frozen=True)
class LeaveOneOut(ScoredMethod):
    """Keeps the tokens without which the last rows' outputs would change most.

    Without token j alone, and the rest renormalised, a row's output o moves by p / (1 - p) (o - v_j), p its
    probability: the score is the mean square of that.
    """

    keeps_by = "change of the last rows' outputs without it"
    source = "DropKV"
    cost = "2 P L D"

    window: int = integer(32, minimum=1, help="last rows whose outputs count")
    recent: int | None = integer(None, minimum=0, optional=True, help="last tokens that stay; None: the window's")
    sinks: int = integer(0, minimum=0, help="first tokens that stay, at most half of the rest")

    @property
    def needs(self) -> Needs:
        return replace(super().needs, rows=self.window, decoded_queries=True)

    def quota(self, budget: int, mean_budget: int) -> Quota:
        recent = min(self.window if self.recent is None else self.recent, budget // 2)
        return Quota(budget, min(self.sinks, (budget - recent) // 2), recent)

    def score(self, view: LayerView, quota: Quota) -> Tensor:
        rows = view.reference_rows(self.window)
        # In float64: 1 - p of a sharp row is a small difference, and 1 / (1 - p) multiplies what rounding leaves.
        attention = torch.softmax(rows.logits.double(), -1)  # [batch, kv_heads, rows, length]
        values = view.values.double()
        output = torch.matmul(attention, values)
        squares = values.square().sum(-1)[:, :, None] + output.square().sum(-1)[..., None]
        distance = squares - 2 * torch.matmul(output, values.mT)
        distance = distance.masked_fill_(distance < 1e-14 * squares, 0)
        share = attention.clamp(max=1 - 1e-6)
        change = (share / (1 - share)).square() * distance

        by_token = change.unflatten(2, (-1, rows.group))
        by_token = by_token.mean(3) if self.heads_by == "mean" else by_token.amax(3)
        prompt = min(self.window, view.rows)
        own = self._over(by_token[:, :, :prompt], rows.counted[:, :, :: rows.group][..., :prompt])
        if by_token.shape[2] == prompt:
            return own
        counted = rows.counted[:, :, :: rows.group][..., prompt:]
        behind = self._over(by_token[:, :, prompt:], counted)
        mixed = (1 - view.decoded_weight) * own + view.decoded_weight * behind
        return torch.where(counted.any(-1, keepdim=True), mixed, own)

    def _over(self, changes: Tensor, counted: Tensor) -> Tensor:
        """[batch, kv_heads, tokens, length] over the tokens that count, bool [batch, 1, tokens]."""
        changes = changes * counted[..., None]
        if self.rows_by == "max":
            return changes.amax(2)
        return changes.sum(2) / counted.sum(-1, keepdim=True).clamp(min=1)
