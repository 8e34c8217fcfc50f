"""How a budget is shared out over layers, known before or decided by what was observed of all of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvweave.cut.rows import Group, Share
from kvweave.methods.base import Method


def share_out(
    method: Method,
    budgets: Sequence[int],
    lengths: Sequence[int],
    layers: int,
    weights: Sequence[Sequence[Any]] | None = None,
) -> list[list[Share]]:
    """Entries that each layer keeps of each row of the batch: `[layer][row]`.

    Args:
        budgets, lengths: mean entries of a layer and real tokens, by row.
        weights: `[layer][row]`, what was observed, of a layer-adaptive method; None: shares are known beforehand.
    """
    rows: list[Sequence[Share]] = []
    for row, (budget, length) in enumerate(zip(budgets, lengths, strict=True)):
        if weights is None:
            rows.append(method.layer_budgets(budget, length, layers))
        else:
            of_row = [layer[row] for layer in weights]
            rows.append(method.allocate(of_row if method.pools else _read(of_row), budget, length))
    return [list(layer) for layer in zip(*rows, strict=True)]


def coarse_shares(
    method: Method, budgets: Sequence[int], lengths: Sequence[int], layers: int
) -> list[list[Share]] | None:
    """Entries that each layer keeps of each row until the cut that waits: `[layer][row]`; None: everything."""
    rows = [method.coarse_budgets(budget, length, layers) for budget, length in zip(budgets, lengths, strict=True)]
    known = [row for row in rows if row is not None]
    return [list(layer) for layer in zip(*known, strict=True)] if len(known) == len(rows) else None


def by_row(groups: Sequence[Group], weights: Sequence[Any]) -> list[Any]:
    """What was observed of each group, for each row of the batch."""
    by = {row: weight for group, weight in zip(groups, weights, strict=True) for row in group.index}
    return [by[row] for row in range(len(by))]


def _read(weights: Sequence[Any]) -> list[Any]:
    """Those that are tensors as numbers, read from the device at once."""
    read = list(weights)
    places = [place for place, weight in enumerate(read) if isinstance(weight, Tensor)]
    if places:
        home = read[places[0]].device
        numbers = torch.cat([read[place].reshape(1).to(home, torch.float64) for place in places]).tolist()
        for place, number in zip(places, numbers, strict=True):
            read[place] = number
    return read
