"""TOVA: what the last token attends to (Oren et al., 2401.06104; SPEC 16.1)."""

from dataclasses import dataclass, replace

from torch import Tensor

from kvweave.methods.allocation import Quota
from kvweave.methods.needs import Needs
from kvweave.methods.options import flag, integer
from kvweave.methods.registry import register
from kvweave.methods.scored import ScoredMethod
from kvweave.view import LayerView


@register("tova")
@dataclass(frozen=True)
class Tova(ScoredMethod):
    """Keeps the tokens that the last row attends to, the mean over all heads of the layer: one set for all KV heads.

    The paper drops a token for each one that is decoded; this is its form at the end of a prefill. The last token
    stays where the budget has room for two (the paper ranks it with the others).
    """

    keeps_by = "attention from the last row"
    source = "2401.06104"
    attention_like = True

    per_head: bool = flag(False, help="a set for each KV head, by its own query heads (the paper: one for the layer)")
    recent: int = integer(1, minimum=0, help="last tokens that stay, at most half of the budget")
    sinks: int = integer(0, minimum=0, help="first tokens that stay, at most half of the rest")

    @property
    def needs(self) -> Needs:
        return replace(super().needs, rows=1, by_slot=True)

    def score(self, view: LayerView, quota: Quota) -> Tensor:
        received = view.window_attention(1, rows_by=self.rows_by, heads_by=self.heads_by)
        if self.per_head:
            return received
        every = view.over_heads(received)
        together = every.mean(1, keepdim=True) if self.heads_by == "mean" else every.amax(1, keepdim=True)
        return together.expand_as(received)
