"""From one layer's storage to its compacted form, for a batch whose rows may differ in length.

Methods see rectangular views without padding. Here the rows of a batch are brought into that form: rows that hold
equally many tokens are planned together, and what they keep is put back into one tensor, short rows padded in front.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvweave.memory.heads import side_by_side
from kvweave.memory.slots import Slots
from kvweave.methods.base import Method
from kvweave.methods.needs import ALL_ROWS
from kvweave.ops.device import exact
from kvweave.ops.heads import HERE, Heads
from kvweave.ops.select import last, places
from kvweave.ops.statistics import AttentionRule
from kvweave.plan import Compacted, Plan
from kvweave.prompt import Prompt
from kvweave.view import LayerView


@dataclass
class Group:
    """Rows that hold equally many tokens, `length`: `index` in the batch, and what a method sees of them."""

    index: list[int]
    view: LayerView
    length: int


def group_rows(
    slots: Slots,
    queries: Tensor | None,
    prompt: Prompt,
    rule: AttentionRule,
    *,
    mask: Tensor | None = None,
    layer: int = 0,
    layers: int = 1,
    rotary: tuple[Tensor, Tensor] | None = None,
    memory: Tensor | None = None,
    most: int = ALL_ROWS,
    apart: Sequence[int] | None = None,
    heads: Heads = HERE,
    stored: Slots | None = None,
    whole: bool = False,
) -> list[Group]:
    """Views of a layer without its padding.

    Args:
        queries: [batch, heads, rows, dim] of the last `rows` slots, or None.
        prompt: modalities and padding over the columns that `slots.positions` speaks of.
        slots: with positions written out.
        mask: the model's own, [batch or 1, heads or 1, rows, slots], boolean or additive; None: causal.
        rotary: (cos, sin), [batch, columns, rotary_dim] each.
        memory: [batch, ...], what the turn before left.
        most: queries of how many of the last tokens a view gets; `ALL_ROWS`: of all that are at hand.
        heads: where the layer's other heads are; `slots` are as many everywhere.
        stored: one head that memory holds for all of them (MLA); None: `slots` are what it holds.
        apart: by row of the batch; rows of different numbers are not planned together.
        whole: nothing has been cut yet: slot j is the prompt's column j.
    """
    assert slots.positions is not None
    assert slots.mass is not None
    tokens, rows = _tokens(slots, prompt, heads, whole=whole), 0 if queries is None else queries.shape[2]
    may_be_empty = heads.size > 1 or (slots.has_empty and not whole)  # what is padding is not picked
    groups = []
    for part, recent in _parts(tokens, rows, rows if most == ALL_ROWS else most, apart):
        pick = part.pick
        view = LayerView(
            keys=pick(slots.keys),
            values=pick(slots.values),
            queries=None,
            positions=pick(slots.positions),
            mass=pick(slots.mass),
            visual=pick(tokens.visual),
            rule=rule,
            bias=pick(slots.bias) if slots.bias is not None else None,
            memory=memory[part.at] if memory is not None else None,
            layer=layer,
            layers=layers,
            heads=heads,
        )
        if may_be_empty and not bool(pick(tokens.everywhere).all()):
            view.empty = ~pick(tokens.here)
        if stored is not None:
            view.stored = view.of_one_head(pick(stored.keys), pick(stored.values))
        if queries is not None:
            view.queries, masks = _recent_rows(queries, mask, part, recent, slots.positions.shape[2])
            view.rule = rule if masks is None else replace(rule, mask=masks)
        view.rotary = None if rotary is None else _tables(rotary, part.at, view.positions)
        groups.append(Group(part.index, view, part.length))
    return groups


@dataclass(frozen=True)
class _Tokens:
    """Which slots hold a real token.

    Attributes:
        here: bool [batch, kv_heads, slots]; everywhere: the same of all the layer's heads.
        real: bool [batch, slots], in some head: padding is that of the whole row; None: all are, which is known
            without waiting for the device.
        visual: bool [batch, kv_heads, slots], those of visual tokens.
    """

    here: Tensor
    everywhere: Tensor
    real: Tensor | None
    visual: Tensor


def _tokens(slots: Slots, prompt: Prompt, heads: Heads, *, whole: bool) -> _Tokens:
    assert slots.positions is not None
    if whole and heads.size == 1:
        here, visual = (x[:, None].expand_as(slots.positions) for x in (prompt.valid, prompt.visual))
        if not prompt.padded:
            return _Tokens(here, here, None, visual)
        return _Tokens(here, here, prompt.valid, visual & here)
    column = slots.positions.clamp(min=0).flatten(1)
    filled = slots.positions >= 0
    visual = prompt.visual.gather(1, column).view_as(filled)
    if heads.size == 1 and not slots.has_empty and not prompt.padded:
        return _Tokens(filled, filled, None, visual)
    here = prompt.valid.gather(1, column).view_as(filled).logical_and(filled)
    everywhere = heads.gather(here)
    return _Tokens(here, everywhere, everywhere.any(1), visual & here)


@dataclass(frozen=True)
class _Part:
    """Rows of a batch that hold equally many tokens, `length`.

    Attributes:
        index: which rows.
        is_full: that is all there is.
        real: bool [batch, slots], which slots hold a token; None: all.
        device: of the tensors that are picked from.
    """

    index: list[int]
    length: int
    is_full: bool
    real: Tensor | None
    device: torch.device

    @cached_property
    def at(self) -> Tensor:
        """Which rows, int64 [rows]."""
        if self.index == list(range(len(self.index))):  # on a device without waiting for it
            return torch.arange(len(self.index), device=self.device)
        return torch.tensor(self.index, device=self.device)

    @cached_property
    def slots(self) -> Tensor:
        """int64 [rows, length], the slots that hold a token."""
        if self.real is None:
            return torch.arange(self.length, device=self.device).expand(len(self.index), -1)
        return places(self.real[self.at], self.length)

    def pick(self, x: Tensor) -> Tensor:
        """These rows' held slots of `x` [batch, heads, slots, ...]."""
        return x if self.is_full else _of_rows(x, self.at, self.slots)


def _parts(tokens: _Tokens, rows: int, most: int, apart: Sequence[int] | None) -> Iterator[tuple[_Part, int]]:
    """Rows that are planned together, and of how many of the last `rows` they have queries, `most` at most."""
    batch, _, count = tokens.visual.shape
    device, real = tokens.visual.device, tokens.real
    sizes = [[count, rows]] * batch
    if real is not None:
        sizes = torch.stack([real.sum(1), real[:, count - rows :].sum(1)], 1).tolist()
    keys = [(length, min(recent, most), apart[row] if apart else 0) for row, (length, recent) in enumerate(sizes)]
    for key in sorted(set(keys)):
        index = [row for row in range(batch) if keys[row] == key]
        length, recent, _ = key
        yield _Part(index, length, len(index) == batch and length == count, real, device), recent


def _recent_rows(
    queries: Tensor, mask: Tensor | None, part: _Part, recent: int, count: int
) -> tuple[Tensor, Callable[[int, int], Tensor] | None]:
    """A part's queries of its last `recent` tokens, and the model's mask at them, where there is one.

    Args:
        count: slots of the layer, of whose last ones `queries` are.
    """
    rows = queries.shape[2]
    if part.is_full and mask is None:
        return queries[:, :, rows - recent :], None
    asks = part.slots[:, part.length - recent :] - (count - rows)  # rows of `queries` that hold a token
    own = queries[:, :, rows - recent :] if part.is_full else _of_rows(queries, part.at, asks)
    return own, None if mask is None else _blocks(mask, part.at, asks, part.slots)


def _blocks(mask: Tensor, at: Tensor, asks: Tensor, slots: Tensor) -> Callable[[int, int], Tensor]:
    """The model's mask at a group's rows and slots, a block of rows at a time."""
    rows = at if mask.shape[0] > 1 else torch.zeros_like(at)

    def block(start: int, stop: int) -> Tensor:
        part = mask[rows[:, None], :, asks[:, start:stop]].transpose(1, 2)  # [rows, heads, block, slots]
        return part.gather(-1, slots[:, None, None].expand(*part.shape[:3], -1))

    return block


def _of_rows(x: Tensor, at: Tensor, slots: Tensor) -> Tensor:
    """Of `x` [batch, heads, slots, ...] the rows `at` [rows], and of each its own `slots` [rows, n]."""
    return x[at[:, None], :, slots].transpose(1, 2)


def _tables(rotary: tuple[Tensor, Tensor], at: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary tables [batch, columns, dim] of the rows `at`, at their slots' positions."""
    cos, sin = (_at_positions(table.to(at.device)[at], positions) for table in rotary)
    return cos, sin


def _at_positions(table: Tensor, positions: Tensor) -> Tensor:
    """[rows, columns, dim] at `positions` [rows, kv_heads, length]: [rows, kv_heads, length, dim]."""
    rows = torch.arange(len(table), device=table.device)[:, None, None]
    return table[rows, positions]


@dataclass(frozen=True)
class Outcome:
    """What became of a layer.

    Attributes:
        compacted: its tensors, rows of unequal length padded in front.
        rows: for each row of the batch, what the report says of it.
        fate: for each row int64 [kv_heads, length], the slot that each slot lives on in, -1: evicted; with `trace`.
        memory: [batch, ...], what the method wants to see on a later turn, or None.
    """

    compacted: Compacted
    rows: list[dict[str, Any]]
    fate: list[Tensor]
    memory: Tensor | None


#: Entries of each KV head of a layer; or, where heads get their own, of each apart.
Share = int | tuple[int, ...]


def smallest(share: Share) -> int:
    """Entries of the KV head that keeps least."""
    return share if isinstance(share, int) else min(share)


def fits(groups: list[Group], budgets: Sequence[Share]) -> bool:
    """True if no row of the layer has to give up anything."""
    return all(smallest(budgets[row]) >= group.length for group in groups for row in group.index)


@exact
def observe(
    method: Method,
    groups: list[Group],
    budgets: Sequence[Share],
    lengths: Sequence[int],
    *,
    means: Sequence[int] | None = None,
    probed: Sequence[bool] = (False,),
    later: bool = False,
) -> list[Any]:
    """What `Method.allocate` is given of each group, all statistics computed and queries released.

    That is the layer's weight, 0 where nothing has to go; or whatever a method that pools entries observes.

    Args:
        budgets: entries that stay in this layer, by row of the batch; of a layer-adaptive method, their mean over
            layers, this one's not being known yet.
        means: the mean over layers of each row's budgets; None: they are given in `budgets`.
        lengths: real tokens of each row; on a later turn a layer holds fewer.
        probed: whether the plan will know of probes; both where that is still open.
        later: what a method that pools entries observes is asked for when more is known, its statistics alone now.
    """
    weights: list[Any] = []
    for group in groups:
        view, weight = group.view, 0.0
        row = group.index[0]
        mean = budgets[row] if means is None else means[row]
        assert isinstance(mean, int)
        view.mean_budget = mean
        if method.pools and group.length:
            for view.probed in probed:
                if later:
                    method.prepare(view, mean)
                else:
                    weight = method.observe(view)  # a group of one row
        elif smallest(budgets[row]) < (lengths[row] if method.layer_adaptive else group.length):
            if method.layer_adaptive:  # a group of one row
                weight = method.observe(view)
            elif method.needs.rows:
                for view.probed in probed:
                    method.prepare(view, view.mean_budget)
        weights.append(weight)
        view.release_queries()
    return weights


@exact
def compact(
    method: Method, groups: list[Group], budgets: Sequence[Share], means: Sequence[int], *, trace: bool = False
) -> Outcome:
    """Plan and cut one layer.

    Args:
        budgets: entries that each row of the batch keeps in this layer; alike within a group.
        means: the mean over layers of each row's budgets.
    """
    pieces: dict[int, Compacted] = {}  # where groups have to be put together
    rows: dict[int, dict[str, Any]] = {}
    fates: dict[int, Tensor] = {}
    memories: dict[int, Tensor] = {}
    for group in groups:
        view, budget = group.view, budgets[group.index[0]]
        view.mean_budget = means[group.index[0]]
        if smallest(budget) >= group.length:
            plan = _everything(view.storage)
        else:
            plan = method.plan(view, budget) if isinstance(budget, int) else method.plan_heads(view, budget)
        done = plan.apply(view.storage)
        fate = plan.fate(view.storage) if trace else None
        described = _described(plan, len(group.index))
        for n, row in enumerate(group.index):
            if len(groups) > 1:
                pieces[row] = _row(done, n)
            rows[row] = described[n]
            if fate is not None:
                fates[row] = fate[n]
            if plan.memory is not None:
                memories[row] = plan.memory[n]
    order = range(len(rows))
    flows = [row["flow"] for row in rows.values() if "flow" in row]
    flow = sum(flows) / len(flows) if flows else None
    # rows of one group lie side by side already
    compacted = done if len(groups) == 1 else _rectangular([pieces[row] for row in order])
    memory = torch.stack([memories[row] for row in order]) if len(memories) == len(order) else None
    fate_by_row = [fates[row] for row in order] if trace else []
    return Outcome(replace(compacted, flow=flow), [rows[row] for row in order], fate_by_row, memory)


def _everything(view: LayerView) -> Plan:
    return Plan(last(view.positions, view.length), bias=view.bias)


def _row(compacted: Compacted, n: int) -> Compacted:
    """Row `n`, as a batch of one."""
    part = slice(n, n + 1)
    bias = compacted.bias[part] if compacted.bias is not None else None
    return Compacted(
        compacted.keys[part], compacted.values[part], compacted.positions[part], compacted.mass[part], None, bias
    )


def _described(plan: Plan, rows: int) -> list[dict[str, Any]]:
    """What the report says of each row besides its counts; all numbers are read from the device at once."""
    numbers = {**({} if plan.flow is None else {"flow": plan.flow}), **plan.log}
    read = torch.stack([x.double() for x in numbers.values()], -1).tolist() if numbers else [[]] * rows
    scopes = [{}] * rows if plan.scope is None else [{"scope": word} for word in plan.scope]
    words = {f"report.{name}": word for name, word in plan.words.items()}
    return [dict(zip(numbers, row, strict=True)) | words | scope for row, scope in zip(read, scopes, strict=True)]


def _rectangular(rows: list[Compacted]) -> Compacted:
    """Rows of unequal counts as one batch, empty slots first."""
    biases = [row.bias if row.bias is not None else torch.zeros_like(row.mass) for row in rows]
    return Compacted(
        side_by_side([row.keys for row in rows], 0, empty=0),
        side_by_side([row.values for row in rows], 0, empty=0),
        side_by_side([row.positions for row in rows], 0, empty=-1),
        side_by_side([row.mass for row in rows], 0, empty=0),
        bias=side_by_side(biases, 0, empty=0) if any(row.bias is not None for row in rows) else None,
    )
