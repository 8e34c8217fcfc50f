"""Attention Matching: tokens that rows attend to most, then biases and values that give the rows what they had
(2602.16284, the form that selects by highest attention; SPEC 17.5)."""

from dataclasses import dataclass

from kvweave.methods.entries import (
    FittedMethod,
    bound_option,
    cap_option,
    recent_option,
    ridge_option,
    row_scores,
    rows_option,
    steps_option,
)
from kvweave.methods.options import choice, flag
from kvweave.methods.registry import register
from kvweave.ops.select import top_and_recent
from kvweave.plan import Plan
from kvweave.view import LayerView


@register("match")
@dataclass(frozen=True)
class Match(FittedMethod):
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

    def plan(self, view: LayerView, budget: int) -> Plan:
        recent = min(self.recent, budget // 2)
        rows = view.reference_rows(self.rows)
        score = row_scores(rows, self.score, rows.counted)
        plan = Plan(top_and_recent(score, budget, recent))
        return self.fitted(view, plan, rows, recent, gate=self.gate)
