"""A cut that waits for the first decoded tokens (SPEC 13.1): what is held of a prompt meanwhile, and what they add.

The prompt's own statistics are computed when it ends, by row of the batch, so that beams may reorder them; of the
decoded tokens the queries are held, and become attention when the layer is cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvweave.cut.coarse import Coarse
from kvweave.cut.rows import Group
from kvweave.cut.terms import Terms
from kvweave.methods.needs import MEANS, Needs, Reduction
from kvweave.ops.device import exact, writable
from kvweave.ops.statistics import AttentionRule, column_sums, received
from kvweave.prompt import Prompt
from kvweave.view import LayerView


@dataclass
class Waiting:
    """What is held of one layer until it is cut.

    Attributes:
        prompt: the prompt that ended.
        known: for each row of the batch the statistics of its own (`LayerView`).
        weights: for each row what was observed of it, for layer-adaptive methods.
        budgets: mean entries of a layer, by row.
        rule: how queries become attention; no mask.
        queries: [batch, heads, tokens, dim] of the first decoded tokens, written as they come.
        sums: for each row and reduction [1, kv_heads, length], attention received from the decoded tokens so far.
        seen: for each row [heads, tokens, dim], the queries of those tokens, for methods that keep them.
        counts: float [batch], how many there were.
        coarse: the layer's first cut; None: it holds the whole prompt.
    """

    prompt: Prompt
    known: list[dict[Any, Any]]
    weights: list[Any]
    budgets: list[int]
    rule: AttentionRule
    queries: Tensor
    sums: list[dict[Reduction, Tensor]]
    seen: list[list[Tensor]]
    counts: Tensor
    coarse: Coarse | None = None

    @classmethod
    def of(
        cls,
        prompt: Prompt,
        rule: AttentionRule,
        queries: Tensor,
        known: list[dict[Any, Any]] | None = None,
        weights: Sequence[Any] = (),
        budgets: Sequence[int] = (),
    ) -> "Waiting":
        """Of a prompt that has just ended; nothing is known of what comes behind it."""
        batch = len(queries)
        counts = torch.zeros(batch, device=queries.device)
        return cls(
            prompt,
            known or [{} for _ in range(batch)],
            list(weights),
            list(budgets),
            rule,
            queries,
            [{} for _ in range(batch)],
            [[] for _ in range(batch)],
            counts,
        )

    def __getstate__(self) -> dict[str, Any]:
        """What is copied, saved and sent: memory that another process may share is not written to."""
        return vars(self) | {"queries": self.queries.clone(), "counts": self.counts.clone()}

    def note(self, queries: Tensor, start: int) -> None:
        """Keep the queries [batch, heads, new, dim] of decoded tokens from number `start` on."""
        self.queries = writable(self.queries)
        room = self.queries.shape[2] - start
        if room > 0:
            new = queries[:, :, :room]
            self.queries[:, :, start : start + new.shape[2]] = new

    def rows(self, index: Tensor) -> "Waiting":
        """The given rows of the batch, in that order."""
        places = index.tolist()
        return replace(
            self,
            prompt=self.prompt.rows(index),
            known=[self.known[row] for row in places],
            weights=[self.weights[row] for row in places],
            budgets=[self.budgets[row] for row in places],
            queries=self.queries[index.to(self.queries.device)],
            sums=[dict(self.sums[row]) for row in places],
            seen=[list(self.seen[row]) for row in places],
            counts=self.counts[index.to(self.counts.device)],
            coarse=None if self.coarse is None else self.coarse.rows(places),
        )

    def expect(self, tokens: int) -> None:
        """Make room for the queries of as many further tokens behind the prompt."""
        batch, heads, _, dim = self.queries.shape
        self.queries = self.queries.new_zeros(batch, heads, tokens, dim)

    def add(
        self,
        group: Group,
        keys: Tensor,
        counted: Tensor,
        needs: Needs,
        temperature: float = 1.0,
        weights: Tensor | None = None,
        *,
        probed: bool,
    ) -> None:
        """Add what the tokens behind the prompt attend to, of a group's rows.

        Args:
            keys: [batch, kv_heads, tokens, dim], of those tokens.
            counted: bool [batch, tokens], those that belong to a reply that has not ended.
            needs: how their attention is reduced, and whether their queries are kept.
            temperature: divides the logits.
            weights: float [batch, tokens], factors of their attention; None: 1.
            probed: they are of probes and the answers to them.
        """
        rule = replace(self.rule, scaling=self.rule.scaling / temperature)
        at = group.index
        tokens = min(keys.shape[2], self.queries.shape[2])
        counted = counted[at, :tokens].to(keys.device)
        factors = counted if weights is None else counted * weights[at, :tokens].to(keys.device)
        queries = self.queries[at, :, :tokens]
        for reduction in needs.reductions(probed=probed):
            how = () if reduction == MEANS else reduction
            attention = decoded_attention(group.view, queries, keys[at, :, :tokens], factors, rule, *how)
            for n, row in enumerate(at):
                before, new = self.sums[row].get(reduction), attention[n : n + 1]
                if before is not None:
                    new = torch.maximum(before, new) if reduction[0] == "max" else before + new
                self.sums[row][reduction] = new
        if needs.decoded_queries:
            for n, row in enumerate(at):
                self.seen[row].append(queries[n][:, counted[n]])
        self.counts = writable(self.counts)
        self.counts[at] += counted.sum(-1)

    def tell(self, view: LayerView, at: Sequence[int]) -> None:
        """Let a view of the given rows know all that was learnt."""
        view.memo = known_together([self.known[row] for row in at])
        counts = self.counts[list(at), None, None]
        for reduction in self.sums[at[0]]:
            sums = torch.cat([self.sums[row][reduction] for row in at])
            tell_attention(view, reduction, sums, counts)
        if self.seen[at[0]]:
            queries_of = [torch.cat(self.seen[row], 1) for row in at]
            most = max(queries.shape[1] for queries in queries_of)
            view.decoded_queries = torch.stack([F.pad(q, (0, 0, 0, most - q.shape[1])) for q in queries_of])
            places = torch.arange(most, device=view.keys.device)
            view.decoded_counted = torch.stack([places < queries.shape[1] for queries in queries_of])


def tell_rows(
    groups: Sequence[Group], prompt: Prompt, queries: Tensor, keys: Tensor, rule: AttentionRule, terms: Terms
) -> None:
    """Let views know what tokens behind their slots attend to, all of which count.

    Args:
        queries, keys: [batch, heads, tokens, dim] of those tokens.
        rule: without mask.
    """
    counted = torch.ones(len(queries), queries.shape[2], dtype=torch.bool, device=keys.device)
    waiting = Waiting.of(prompt, rule, queries)
    for group in groups:
        temperature = 1.0 if terms.probed else terms.needs.temperature
        waiting.add(group, keys, counted, terms.needs, temperature, probed=terms.probed)
        waiting.tell(group.view, group.index)
        group.view.probed = terms.probed
        rows = queries.new_full((1, 1, 1), queries.shape[2], dtype=torch.float64)
        group.view.decoded_weight = terms.method.weight_of(rows)


def tell_attention(view: LayerView, reduction: Reduction, total: Tensor, counts: Tensor) -> None:
    """Let a view know what as many tokens behind its prompt attended to: `total` is their sum, or largest."""
    mean = total if reduction[0] == "max" else total / counts.clamp(min=1).to(total.dtype)
    if reduction == MEANS:
        view.decoded = mean
    else:
        view.decoded_by = view.decoded_by | {reduction: mean}


def known_by_row(groups: Sequence[Group], batch: int) -> list[dict[Any, Any]]:
    """Statistics that the groups' views have computed, apart for each row."""
    rows: list[dict[Any, Any]] = [{} for _ in range(batch)]
    for group in groups:
        for n, row in enumerate(group.index):
            rows[row] = {key: _row(value, n) for key, value in group.view.memo.items()}
    return rows


def known_together(rows: Sequence[dict[Any, Any]]) -> dict[Any, Any]:
    """The same for rows that are planned together."""
    return {key: _together([row[key] for row in rows]) for key in rows[0]}


def _row(value: Any, n: int) -> Any:
    if isinstance(value, Tensor):
        return value[n : n + 1]
    if isinstance(value, tuple):
        return tuple(_row(part, n) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(*(_row(getattr(value, field.name), n) for field in fields(value)))
    return value  # alike for all rows


def _together(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(values)
    if isinstance(first, tuple):
        return tuple(_together(list(parts)) for parts in zip(*values, strict=True))
    if is_dataclass(first) and not isinstance(first, type):
        return type(first)(*(_together([getattr(v, field.name) for v in values]) for field in fields(first)))
    return first


@exact
def decoded_attention(
    view: LayerView,
    queries: Tensor,
    keys: Tensor,
    counted: Tensor,
    rule: AttentionRule,
    rows_by: str = "mean",
    heads_by: str = "mean",
) -> Tensor:
    """Attention that decoded tokens pay to the prompt's slots, among all that they see: summed (SPEC 13.1, `D`).

    Args:
        view: of the prompt.
        queries: [batch, heads, tokens, dim]; keys: [batch, kv_heads, tokens, dim], of the tokens behind it.
        counted: bool [batch, tokens], those that take part, or factors of their attention.
        rule: without mask.
        rows_by: "max": the largest in place of the sum; heads_by: "max" of a group's heads in place of their mean.
    Returns:
        float [batch, kv_heads, length].
    """
    tokens = queries.shape[2]
    if view.bias is not None or view.empty is not None:
        rule = replace(rule, mask=lambda start, stop: _mask(view, tokens, queries.shape[1], start, stop))
    every_key = torch.cat([view.keys, keys], 2)
    if not rows_by == heads_by == "mean":
        return received(queries, every_key, rule, rows_by, heads_by, counted[:, None])[..., : view.length]
    sums = column_sums(queries, every_key, rule, counted[:, None])
    return sums[:, :, 0, : view.length].unflatten(1, (view.kv_heads, -1)).mean(2)


def _mask(view: LayerView, tokens: int, heads: int, start: int, stop: int) -> Tensor:
    """What the tokens [start, stop) behind a prompt see, with its slots' biases: [batch, heads, rows, slots]."""
    like = view.positions.new_zeros((), dtype=torch.float32)
    slots = torch.zeros_like(view.positions, dtype=like.dtype) if view.bias is None else view.bias.to(like.dtype)
    if view.empty is not None:
        slots = slots.masked_fill(view.empty, torch.finfo(like.dtype).min)
    behind = torch.arange(tokens, device=slots.device)
    ahead = behind > torch.arange(start, stop, device=slots.device)[:, None]
    later = torch.zeros_like(ahead, dtype=like.dtype).masked_fill(ahead, torch.finfo(like.dtype).min)
    rows = stop - start
    mask = torch.cat(
        [
            slots[:, :, None].expand(-1, -1, rows, -1),
            later.expand(*slots.shape[:2], -1, -1),
        ],
        -1,
    )
    return mask.repeat_interleave(heads // slots.shape[1], 1)
