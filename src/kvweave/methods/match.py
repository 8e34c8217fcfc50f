"""Attention Matching: tokens that rows attend to most, then biases and values that give the rows what they had
(2602.16284, the form that selects by highest attention; SPEC 17.5)."""

from dataclasses import dataclass

import torch

from kvweave.methods.base import Method
from kvweave.methods.entries import (
    bound_option,
    cap_option,
    fitted,
    recent_option,
    ridge_option,
    row_scores,
    rows_option,
    steps_option,
)
from kvweave.methods.options import choice, flag
from kvweave.methods.registry import register
from kvweave.ops.fit import Settings
from kvweave.ops.select import top_and_recent
from kvweave.plan import Plan
from kvweave.view import LayerView


@register("match")
@dataclass(frozen=True)
class Match(Method):
    """Keeps the recent tokens and those that the reference rows attend to most, then fits biases and values to the
    rows.

    Reference rows are the last rows of the prompt, and with deferring or probes those of the tokens behind it. Recent
    tokens are never changed.
    """

    keeps_by = "attention of reference rows"
    merges_by = "- (biases and values fitted)"
    source = "2602.16284"
    cost = "P L D + n² (B + D)"

    score: str = choice("rms", "rms", "mean", "max", help="a token's attention over the rows")
    rows: int = rows_option()
    recent: int = recent_option()
    ridge: float = ridge_option()
    bound: float = bound_option(3.0)
    steps: int = steps_option()
    cap: float | None = cap_option(None)
    gate: bool = flag(False, help="fit a head only if its error on rows held out falls")

    @property
    def biases_logits(self) -> bool:
        return True

    @property
    def keeps_rows(self) -> bool:
        return True

    @property
    def decoded_reductions(self) -> tuple[()]:
        return ()

    @property
    def query_rows(self) -> int:
        return self.rows

    def prepare(self, view: LayerView, budget: int) -> None:
        view.hold_rows(self.rows)

    def plan(self, view: LayerView, budget: int) -> Plan:
        recent = min(self.recent, budget // 2)
        rows = view.reference_rows(self.rows)
        score = row_scores(rows, self.score, rows.counted)
        plan = Plan(top_and_recent(score, budget, recent))
        mutable = torch.arange(view.length, device=view.keys.device) < view.length - recent
        settings = Settings(self.ridge, self.cap, self.bound, self.steps)
        return fitted(view, plan, rows, mutable, ("none", "values", "both"), settings, gate=self.gate)
