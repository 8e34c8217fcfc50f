"""Weave2: exact entries, clusters of the others, and a capped fit behind a gate (SPEC 17.6).

Ours, on known ideas: selection and fit of Attention Matching (2602.16284), clusters of ResKV (2607.29591),
regression of GRKV (2605.31105), queries of decoded tokens (2505.20334). Not yet measured on large models.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvweave.methods.entries import (
    FittedMethod,
    best_of,
    bound_option,
    cap_option,
    cluster_counts,
    cluster_labels,
    cluster_plan,
    clusters_option,
    entries_of,
    recent_option,
    ridge_option,
    rounds_option,
    row_scores,
    rows_option,
    span_option,
    steps_option,
)
from kvweave.methods.options import choice, integer
from kvweave.methods.registry import register
from kvweave.ops.fit import error
from kvweave.ops.reference_rows import ReferenceRows
from kvweave.ops.select import ranks
from kvweave.plan import Plan
from kvweave.view import LayerView


@register("weave2")
@dataclass(frozen=True)
class Weave2(FittedMethod):
    """Keeps the recent tokens and those that reference rows attend to most; the others become clusters, weighed by
    count.

    Then values, and where that helps biases, are fitted to what the rows saw of the whole prompt, within a cap and
    only if rows that were held out gain. Recent tokens are never clustered nor fitted.
    """

    keeps_by = "attention of reference rows"
    merges_by = "clusters of near keys, fitted"
    source = "ours, on 2602.16284 and 2607.29591"
    cost = "rounds L r D + P L D + n² (B + D)"

    defer: int = integer(2, minimum=0, help="tokens decoded from the whole prompt before it is cut, which count too")
    score: str = choice("rms", "rms", "mean", "max", help="a token's attention over the rows")
    rows: int = rows_option()
    recent: int = recent_option()
    clusters: float = clusters_option()
    rounds: int = rounds_option()
    span: int | None = span_option()
    ridge: float = ridge_option()
    bound: float = bound_option(1.0)
    steps: int = steps_option()
    cap: float | None = cap_option(0.3)
    gate: str = choice(
        "fit", "fit", "none", "all", help="rows held out decide on the fit; on nothing; on clusters too"
    )

    def plan(self, view: LayerView, budget: int) -> Plan:
        recent = min(self.recent, budget // 2)
        rows = view.reference_rows(self.rows)
        free = torch.full_like(view.positions[..., 0], budget - recent)
        *fewer, count = cluster_counts(self.clusters, free, gate=self.gate == "all")
        if fewer:
            count = self.chosen_count(view, rows, [*fewer, count], free, recent)
        plan = self.entries(view, row_scores(rows, self.score, rows.counted), free - count, count, recent)
        plan = self.fitted(view, plan, rows, recent, gate=self.gate != "none")
        return replace(plan, log={**plan.log, "clusters": count.double().mean(-1)})

    def entries(self, view: LayerView, score: Tensor, exact: Tensor, count: Tensor, recent: int) -> Plan:
        """The best `exact` tokens, `count` clusters of the others and the recent ones; [batch, kv_heads] both."""
        before = torch.arange(view.length, device=score.device) < view.length - recent
        keep = ranks(score.masked_fill(~before, -torch.inf)) < exact[..., None]
        label = cluster_labels(view, before & ~keep, count, self.rounds, self.span)
        return cluster_plan(view, keep | ~before, label, even=True)

    def chosen_count(
        self, view: LayerView, rows: ReferenceRows, counts: list[Tensor], free: Tensor, recent: int
    ) -> Tensor:
        """How many clusters each head takes, by the rows held out: score and entries are made from the others."""
        check = rows.counted & rows.held_out
        output = rows.output(view.values)
        score = row_scores(rows, self.score, rows.counted & ~check)
        errors = []
        for count in counts:
            plan = self.entries(view, score, free - count, count, recent)
            errors.append(error(rows, entries_of(view, plan), output, check))
        winner = torch.where(check.any(-1), best_of(errors), len(counts) - 1)
        return torch.stack(counts).gather(0, winner[None])[0]
