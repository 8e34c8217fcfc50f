"""SnapKV: what the end of the prompt looks at (Li et al., 2404.14469; SPEC 10.3)."""

from dataclasses import dataclass, replace

from torch import Tensor

from kvweave.methods.allocation import Quota
from kvweave.methods.needs import Needs
from kvweave.methods.options import integer
from kvweave.methods.registry import register
from kvweave.methods.scored import ScoredMethod
from kvweave.ops.select import pool
from kvweave.view import LayerView


@register("snapkv")
@dataclass(frozen=True)
class SnapKV(ScoredMethod):
    """Keeps the last tokens and those that their queries attend to, smoothed over neighbours.

    The recent window is at most half of the budget (the paper keeps it whatever the budget).
    """

    keeps_by = "pooled attention from the last rows"
    source = "2404.14469"
    attention_like = True

    window: int = integer(32, minimum=1, help="last rows that vote; they stay, at most half of the budget")
    kernel: int = integer(5, minimum=1, odd=True, help="tokens that a vote is averaged over")

    @property
    def needs(self) -> Needs:
        return replace(super().needs, rows=self.window, by_slot=True)

    def quota(self, budget: int, mean_budget: int) -> Quota:
        return Quota(budget, recent=min(self.window, budget // 2))

    def score(self, view: LayerView, quota: Quota) -> Tensor:
        """Window attention, pooled over the tokens before the recent ones: [batch, kv_heads, length - recent]."""
        before = view.length - quota.recent

        def pooled(received: Tensor) -> Tensor:
            return received if self.lends else pool(received[..., :before], self.kernel)

        return view.window_attention(self.window, pooled, rows_by=self.rows_by, heads_by=self.heads_by)
