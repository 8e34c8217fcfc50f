"""SnapKV: what the end of the prompt looks at (Li et al., 2404.14469; SPEC 10.3)."""

from dataclasses import dataclass

from torch import Tensor

from kvweave.methods.base import Method
from kvweave.methods.options import integer
from kvweave.methods.registry import register
from kvweave.ops.select import pool, top_and_recent
from kvweave.plan import Plan
from kvweave.view import LayerView


@register("snapkv")
@dataclass(frozen=True)
class SnapKV(Method):
    """Keeps the last tokens and those that their queries attend to, smoothed over neighbours.

    The recent window is at most half of the budget (the paper keeps it whatever the budget).
    """

    keeps_by = "pooled attention from the last rows"
    source = "2404.14469"

    window: int = integer(32, minimum=1, help="last rows that vote; they stay, at most half of the budget")
    kernel: int = integer(5, minimum=1, odd=True, help="tokens that a vote is averaged over")

    @property
    def query_rows(self) -> int:
        return self.window

    def recent(self, budget: int) -> int:
        """Last tokens that stay by force."""
        return min(self.window, budget // 2)

    def score(self, view: LayerView, recent: int) -> Tensor:
        """Pooled window score of the tokens before the recent ones: [batch, kv_heads, length - recent]."""
        before = view.length - recent
        return view.window_attention(self.window, lambda received: pool(received[..., :before], self.kernel))

    def plan(self, view: LayerView, budget: int) -> Plan:
        recent = self.recent(budget)
        return Plan(top_and_recent(self.score(view, recent), budget, recent, view.length))
