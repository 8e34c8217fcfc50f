"""A budget found by what it costs: `budget="auto:kl=0.05"`.

The prompt stays whole while the first tokens are decoded. Then a fork of the cache is cut as each of some budgets
would cut it, and the same tokens are decoded again: how far they are from what the full cache expected (mean KL, in
nats), times the method's `kl_factor`, is an estimate of how far the next ones will be. The smallest budget whose
estimate stays under the target is taken, for each row of a batch its own. That costs about six times those tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvweave.seam.cache import CompressedCache
from kvweave.seam.question import remember
from kvweave.seam.turn import State

if TYPE_CHECKING:
    from kvweave.seam.session import Session

#: Shares that may be taken, each a tenth above the one before; else everything stays.
SHARES = tuple(0.02 * 1.1**n for n in range(41))


@torch.no_grad()
def foresee(
    session: "Session", part: nn.Module, cache: CompressedCache, inputs: dict[str, Any], logits: Tensor | None
) -> None:
    """A forward pass has ended: note what the full cache expects, and find the budgets once the cut is due.

    Args:
        inputs: of the pass; logits: [batch, new, vocabulary].
    """
    turn, defer = cache.shared.turn, cache.shared.method.defer
    if turn.state is not State.WAITING or session.running.new != 1 or not cache.decoded:
        cache.steps = []
        return
    if logits is None:
        raise ValueError(
            f"budget={cache.method.budget!r} needs a model that gives logits: {type(part).__name__} does not"
        )
    cache.steps.append((inputs, logits[:, -1].float().log_softmax(-1)))
    if cache.decoded < defer:
        return
    steps, cache.steps = cache.steps, []
    assert turn.counted is not None
    counted = turn.counted[:, defer - len(steps) : defer]
    with session.running.going_aside():
        chosen, costs = _smallest(cache, lambda budgets: _cost(part, cache, steps, counted, budgets))
    _take(cache, chosen)
    rows = [
        {"entries": entries, "share": entries / max(1, length), "kl": kl}
        for entries, length, kl in zip(chosen, _lengths(cache), costs, strict=True)
    ]
    turn.note_choice({"target": cache.target, "rows": rows})


def _smallest(cache: CompressedCache, cost: Callable[[list[int]], list[float]]) -> tuple[list[int], list[float]]:
    """The smallest budgets, by row, whose cost is under the target, and that cost; found by halving."""
    target, lengths = cache.target, _lengths(cache)
    assert target is not None
    tried = [sorted({max(1, int(share * n)) for share in SHARES if share < 1} | {n}) for n in lengths]
    low, high = [0] * len(tried), [len(budgets) - 1 for budgets in tried]
    errors = [0.0] * len(tried)
    while any(a < b for a, b in zip(low, high, strict=True)):
        middle = [(a + b) // 2 for a, b in zip(low, high, strict=True)]
        costs = cost([budgets[at] for budgets, at in zip(tried, middle, strict=True)])
        for row, (at, kl) in enumerate(zip(middle, costs, strict=True)):
            if low[row] >= high[row]:
                continue
            if kl <= target:
                high[row], errors[row] = at, kl
            else:
                low[row] = at + 1
    return [budgets[at] for budgets, at in zip(tried, high, strict=True)], errors


def _cost(
    part: nn.Module,
    cache: CompressedCache,
    steps: list[tuple[dict[str, Any], Tensor]],
    counted: Tensor,
    budgets: list[int],
) -> list[float]:
    """What these budgets, by row, are expected to cost: mean KL, in nats."""
    put_back = remember(cache)
    try:
        _take(cache, budgets)
        cache.shared.turn.note_choice({"tried": budgets})
        cache.cut_waiting()
        cache.crop(-len(steps))
        divergence = torch.zeros_like(counted, dtype=torch.float32)
        for place, (inputs, expected) in enumerate(steps):
            mine = part(**inputs).logits[:, -1].float().log_softmax(-1)
            divergence[:, place] = (expected.exp() * (expected - mine)).nan_to_num(0.0).sum(-1).to(divergence.device)
    finally:
        put_back()
    mean = (divergence * counted).sum(1) / counted.sum(1).clamp(min=1)
    factor = cache.shared.method.kl_factor or 1.0
    return (factor * mean).clamp(min=0).tolist()


def _take(cache: CompressedCache, budgets: list[int]) -> None:
    """Let a copy of what waits, to which a cut adds, be cut to these budgets, by row."""
    rows = torch.arange(len(budgets))
    for layer in cache.compressed_layers:
        if layer.prompt_cut.waiting is not None:
            layer.prompt_cut.waiting = replace(layer.prompt_cut.waiting.rows(rows), budgets=list(budgets))


def _lengths(cache: CompressedCache) -> list[int]:
    waiting = next(x.prompt_cut.waiting for x in cache.compressed_layers if x.prompt_cut.waiting is not None)
    return waiting.prompt.lengths
