"""Biases and values of entries, fitted so that reference rows see what they saw of the whole prompt (SPEC
17.1).

All KV heads at once, in float64: the systems are small, and a fit must not fail where keys are alike. Attention
Matching (2602.16284) and GRKV (2605.31105) fit alike; the pull towards what is there, the cap and the gate are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvweave.ops.reference_rows import ReferenceRows, entry_attention


@dataclass(frozen=True)
class Entries:
    """What a layer is to keep, before it is cast.

    Attributes:
        slot: int64 [batch, kv_heads, kept], where an entry stands; -1: it is empty.
        keys, values: [batch, kv_heads, kept, dim]; bias: [batch, kv_heads, kept].
        mutable: bool [batch, kv_heads, kept], entries that a fit may change.
    """

    slot: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor
    mutable: Tensor


@dataclass(frozen=True)
class Settings:
    """`ridge`: pull towards what is there; `cap`: most that values move, as a share of their norm, or None;
    `bound`: most that a bias moves; `steps`: of the biases, after they were clamped."""

    ridge: float
    cap: float | None = None
    bound: float = 1.0
    steps: int = 2


@dataclass(frozen=True)
class Outcome:
    """Entries after their fit, and what the report says.

    Attributes:
        entries: with new values and biases.
        kind: int64 [batch, kv_heads], which of the kinds each head took.
        held_out: [2, batch], mean error of the unfitted entries and of the winner on the rows held out.
        step: [batch], mean of the values' step over their norm.
    """

    entries: Entries
    kind: Tensor
    held_out: Tensor
    step: Tensor


def solve(matrix: Tensor, right: Tensor, ridge: Tensor, *, least_norm: bool) -> Tensor:
    """The minimiser of |Z d - y|^2 + ridge |d|^2, the least one where ridge is 0 everywhere.

    Args:
        matrix: Z [..., n, m]; right: y [..., n, k]; ridge: [...].
        least_norm: ridge is 0 everywhere; singular values under 1e-6 of the largest are dropped.
    Returns:
        [..., m, k].
    """
    if least_norm:
        return torch.matmul(torch.linalg.pinv(matrix, rtol=1e-6), right)
    n, m = matrix.shape[-2:]
    ridge = torch.where(ridge > 0, ridge, 1.0)[..., None, None]  # Z is zero: so is the solution
    if n <= m:
        gram = torch.matmul(matrix, matrix.mT) + ridge * torch.eye(n, dtype=matrix.dtype, device=matrix.device)
        return torch.matmul(matrix.mT, torch.linalg.solve(gram, right))
    gram = torch.matmul(matrix.mT, matrix) + ridge * torch.eye(m, dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve(gram, torch.matmul(matrix.mT, right))


def fit_biases(rows: ReferenceRows, entries: Entries, on: Tensor, settings: Settings) -> Entries:
    """Entries whose biases give each row the denominator that the prompt gave it.

    Args:
        on: bool [batch, 1, rows], the rows to fit on.
    """
    share = (rows.entry_logits(entries.keys, entries.bias, entries.slot) - rows.log_sum_exp()[..., None]).exp()
    gap = 1 - share.sum(-1, keepdim=True)
    weight = (rows.weight * on).sqrt()[..., None]
    share = (share * weight * entries.mutable[:, :, None]).double()
    gap = (gap * weight).double()
    size, ridge = _ridge(rows, share, on, settings)
    low, high = torch.tensor([-settings.bound, settings.bound], dtype=torch.float64, device=share.device).exp()
    factor = (1 + solve(share, gap, ridge, least_norm=settings.ridge == 0)).clamp(low, high)  # [..., kept, 1]
    for _ in range(settings.steps):
        away = factor - 1
        slope = torch.matmul(share.mT, torch.matmul(share, away) - gap) + ridge[..., None, None] * away
        factor = (factor - slope / (size + ridge).clamp(min=1e-30)[..., None, None]).clamp(low, high)
    moved = torch.where(entries.mutable, factor[..., 0].log(), 0)
    return replace(entries, bias=entries.bias + moved.to(entries.bias.dtype))


def fit_values(rows: ReferenceRows, entries: Entries, output: Tensor, on: Tensor, settings: Settings) -> Entries:
    """Entries whose values give each row the output that the prompt gave it.

    Args:
        output: [batch, kv_heads, rows, dim], of the whole prompt; on: as `fit_biases`.
    """
    share = entry_attention(rows.entry_logits(entries.keys, entries.bias, entries.slot))
    gap = output - torch.matmul(share, entries.values)
    weight = (rows.weight * on).sqrt()[..., None]
    share = (share * weight * entries.mutable[:, :, None]).double()
    _, ridge = _ridge(rows, share, on, settings)
    step = solve(share, (gap * weight).double(), ridge, least_norm=settings.ridge == 0)
    step = step * entries.mutable[..., None]
    if settings.cap is not None:
        own = (entries.values * entries.mutable[..., None]).double().flatten(2).norm(dim=-1)
        factor = (settings.cap * own / step.flatten(2).norm(dim=-1).clamp(min=1e-30)).clamp(max=1)
        step = step * factor[..., None, None]
    return replace(entries, values=entries.values + step.to(entries.values.dtype))


def _ridge(rows: ReferenceRows, matrix: Tensor, on: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """|Z|^2, and the ridge: its share by token of the rows fitted on. [batch, kv_heads] both."""
    size = matrix.square().sum((-2, -1))
    return size, settings.ridge * size / rows.tokens(on).clamp(min=1).to(size.dtype)


def error(rows: ReferenceRows, entries: Entries, output: Tensor, on: Tensor) -> Tensor:
    """How far the entries' outputs are from the prompt's, on the rows `on`: [batch, kv_heads]."""
    share = entry_attention(rows.entry_logits(entries.keys, entries.bias, entries.slot))
    return rows.error(output, torch.matmul(share, entries.values.to(share.dtype)), on)


def fit(
    rows: ReferenceRows, values: Tensor, entries: Entries, kinds: Sequence[str], settings: Settings, *, gate: bool
) -> Outcome:
    """Entries fitted by the last of the kinds, or with a gate by the one that does best on rows held out.

    Args:
        values: [batch, kv_heads, length, dim], of the prompt's slots.
        kinds: some of "none", "values", "both", in the order in which they have to prove themselves.
    """
    output = rows.output(values)
    every = rows.counted
    fits = [_fitted(rows, entries, output, kind, every, settings) for kind in kinds]
    batch, kv_heads = entries.slot.shape[:2]
    winner = torch.full((batch, kv_heads), len(kinds) - 1, device=entries.slot.device)
    check = every & rows.held_out
    errors = torch.zeros(2, batch, dtype=output.dtype, device=output.device)
    if gate:
        winner = torch.zeros_like(winner)
        best = first = error(rows, entries, output, check)
        proven = check.any(-1)  # [batch, 1]
        for number, kind in enumerate(kinds[1:], 1):
            tried = _fitted(rows, entries, output, kind, every & ~check, settings)
            wrong = error(rows, tried, output, check)
            better = (wrong < 0.99 * best) & proven
            winner, best = torch.where(better, number, winner), torch.where(better, wrong, best)
        errors = torch.stack([first.mean(-1), best.mean(-1)])
    chosen_values = _of(winner, [x.values for x in fits])
    chosen_bias = _of(winner, [x.bias for x in fits])
    step = ((chosen_values - entries.values) * entries.mutable[..., None]).flatten(2).norm(dim=-1)
    own = (entries.values * entries.mutable[..., None]).flatten(2).norm(dim=-1).clamp(min=1e-12)
    return Outcome(replace(entries, values=chosen_values, bias=chosen_bias), winner, errors, (step / own).mean(-1))


def _fitted(
    rows: ReferenceRows, entries: Entries, output: Tensor, kind: str, on: Tensor, settings: Settings
) -> Entries:
    if kind == "both":
        entries = fit_biases(rows, entries, on, settings)
    return entries if kind == "none" else fit_values(rows, entries, output, on, settings)


def _of(which: Tensor, options: Sequence[Tensor]) -> Tensor:
    """For each head [batch, kv_heads] the option of its number."""
    chosen = options[0]
    for number, option in enumerate(options[1:], 1):
        chosen = torch.where((which == number).view(*which.shape, *[1] * (option.dim() - 2)), option, chosen)
    return chosen
