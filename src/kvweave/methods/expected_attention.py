"""Expected attention: what queries still to come will look at, by their distribution (Devoto et al., 2510.00636;
SPEC 16.4)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvweave.methods.allocation import Quota
from kvweave.methods.needs import ALL_ROWS, Needs
from kvweave.methods.options import flag, integer, real
from kvweave.methods.registry import register
from kvweave.methods.scored import ScoredMethod
from kvweave.ops.rotary import mean_phase, rotate
from kvweave.view import LayerView


@register("expected_attention")
@dataclass(frozen=True)
class ExpectedAttention(ScoredMethod):
    """Keeps the tokens that a Gaussian of the prompt's queries, turned to the positions to come, attends to.

    Equal to the mean of the unnormalised attention for such queries, before the softmax. Angles to come are those of
    text that goes on behind the prompt.
    """

    keeps_by = "expected attention of queries to come, times value norm"
    source = "2510.00636"
    cost = "g L D²"
    attention_like = True

    future: int = integer(512, minimum=1, help="positions behind the prompt that are averaged over")
    sinks: int = integer(4, minimum=0, help="first tokens that stay, and whose queries do not count")
    recent: int = integer(0, minimum=0, help="last tokens that stay, at most half of the budget")
    covariance: bool = flag(True, help="count the queries' spread, not only their mean")
    value_norm: bool = flag(True, help="times the norm of the value")
    epsilon: float = real(0.01, lo=0, hi=float("inf"), open_hi=True, help="added to the attention before that")

    needs = Needs(ALL_ROWS, decoded=(), rotary=True)  # a deferred cut only comes later

    def moments(self, view: LayerView) -> tuple[Tensor, Tensor]:
        """Mean [batch, heads, dim] and covariance [batch, heads, dim, dim] of the queries, turned back to position
        0."""
        return view.once(("query moments", self.sinks), lambda: self._moments(view))

    def _moments(self, view: LayerView) -> tuple[Tensor, Tensor]:
        queries = view.all_queries()
        rows = queries.shape[2]
        skipped = max(0, self.sinks - (view.length - rows))
        skipped = skipped if skipped < rows else 0
        tables, group = view.unit_tables(self.name), queries.shape[1] // view.kv_heads
        means, spreads = [], []
        for head in range(view.kv_heads):
            x = queries[:, head * group : (head + 1) * group, skipped:]
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if tables is not None:
                cos, sin = (t[:, head, None, view.length - rows + skipped :].to(x.dtype) for t in tables)
                x = rotate(x, cos, -sin, interleaved=view.interleaved)
            mean = x.mean(2)
            x = x - mean[:, :, None]
            means.append(mean)
            spreads.append(torch.matmul(x.mT, x) / x.shape[2])
        return torch.cat(means, 1), torch.cat(spreads, 1)

    def score(self, view: LayerView, quota: Quota) -> Tensor:
        mean, spread = self.moments(view)
        mean, spread = (x.unflatten(1, (view.kv_heads, -1)) for x in (mean, spread))  # [batch, kv_heads, group, ...]
        tables = view.unit_tables(self.name)
        if tables is not None:
            cos, sin = (table[:, :, None].to(mean.dtype) for table in self.phases(view, *tables))
            mean = rotate(mean, cos, sin, interleaved=view.interleaved)
            for _ in range(2):  # R S R^T: rows, then columns
                spread = rotate(spread, cos[..., None, :], sin[..., None, :], interleaved=view.interleaved).mT
        scaling, keys = view.rule.scaling, view.keys.to(mean.dtype)
        logits = scaling * torch.matmul(mean, keys.mT)  # [batch, kv_heads, group, length]
        if self.covariance:
            turned = torch.matmul(keys[:, :, None], spread)
            logits = logits + 0.5 * scaling**2 * (turned * keys[:, :, None]).sum(-1)
        if view.bias is not None:
            logits = logits + view.bias[:, :, None]
        if view.empty is not None:
            logits = logits.masked_fill(view.empty[:, :, None], -torch.inf)
        logits[..., : quota.sinks] = -torch.inf
        share = torch.softmax(logits, -1)
        share = share.mean(2) if self.heads_by == "mean" else share.amax(2)
        return (share + self.epsilon) * view.values.to(share.dtype).norm(dim=-1) if self.value_norm else share

    def phases(self, view: LayerView, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cosine and sine of the angles to come, [batch, kv_heads, rotary_dim] each."""
        step = view.text_step()  # [batch, kv_heads], the first of two neighbours
        index = step[..., None, None].expand(*step.shape, 1, cos.shape[-1])
        here = [table.gather(2, index)[:, :, 0] for table in (cos, sin)]
        there = [table.gather(2, (index + 1).clamp(max=view.length - 1))[:, :, 0] for table in (cos, sin)]
        return mean_phase((cos[:, :, -1], sin[:, :, -1]), here, there, self.future)
