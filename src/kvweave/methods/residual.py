"""ResKV: the best tokens exactly, the others as clusters (2607.29591; SPEC 17.3)."""

from dataclasses import dataclass, replace

import torch

from kvweave.methods.base import Method
from kvweave.methods.entries import (
    best_of,
    cluster_counts,
    cluster_labels,
    cluster_plan,
    clusters_option,
    entries_of,
    rounds_option,
    rows_option,
    span_option,
)
from kvweave.methods.needs import Needs
from kvweave.methods.options import flag, wrapped
from kvweave.methods.registry import register
from kvweave.methods.snapkv import SnapKV
from kvweave.methods.wrapping import ScoredWrapper
from kvweave.ops.fit import error
from kvweave.plan import Plan
from kvweave.view import LayerView


@register("residual", wrapper=True)
@dataclass(frozen=True)
class Residual(ScoredWrapper):
    """Spends part of the free entries of a scored method on clusters of all the tokens that it would evict.

    A gate compares three shares on reference rows, head by head; without it the share is `clusters`.
    """

    keeps_by = "the method's score"
    merges_by = "clusters of near keys, bias log(count)"
    source = "2607.29591"

    method: Method = wrapped(SnapKV, help="the scored method that decides")
    clusters: float = clusters_option()
    rounds: int = rounds_option()
    span: int | None = span_option()
    rows: int = rows_option()
    gate: bool = flag(True, help="each head takes none, half or all of that share, by its error on the rows")

    @property
    def biases_logits(self) -> bool:
        return True

    @property
    def needs(self) -> Needs:
        return super().needs.with_reference(self.rows) if self.gate else super().needs

    def planned(self, view: LayerView, budget: int | tuple[int, ...]) -> Plan:
        selection = self.inside.selection(view, budget)
        forced = selection.forced & selection.valid
        tries = []
        for count in cluster_counts(self.clusters, selection.free, gate=self.gate):
            exact = selection.top(selection.free - count)
            label = cluster_labels(view, selection.candidates & ~exact, count, self.rounds, self.span)
            tries.append((count, exact | forced, label))
        count, exact, label = tries[-1]
        if self.gate:
            rows = view.reference_rows(self.rows)
            output = rows.output(view.values)
            errors = []
            for _, kept, labels in tries:
                plan = cluster_plan(view, kept, labels, even=selection.even)
                errors.append(error(rows, entries_of(view, plan), output, rows.counted))
            winner = best_of(errors)
            for number, (counts, kept, labels) in enumerate(tries):
                won = winner == number
                count = torch.where(won, counts, count)
                exact = torch.where(won[..., None], kept, exact)
                label = torch.where(won[..., None], labels, label)
        plan = self.inside.described(view, cluster_plan(view, exact, label, even=selection.even))
        return replace(plan, log={**plan.log, "clusters": count.double().mean(-1)})
