"""Making a profile, from prompts to its file; what was done before an interruption is not done again."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvweave.evals.calibration.fit import fit, lessons
from kvweave.evals.calibration.prompts import Prompt
from kvweave.evals.calibration.shares import BUDGETS, Table, shares_of
from kvweave.evals.run.store import read_object, write_json
from kvweave.methods.allocation import Profile
from kvweave.models.chat import encode
from kvweave.seam.profiles import model_mark

_DIGITS = 4

#: Told what is going on, how much of it is done, of how much.
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Fitting:
    """How shares are fitted.

    Attributes:
        prompts: whose replies they are fitted to.
        steps: of gradient descent at each budget.
    """

    prompts: Sequence[Prompt]
    steps: int


def calibrate(
    model: Any,
    processor: Any,
    prompts: Sequence[Prompt],
    out: Path,
    fitting: Fitting | None = None,
    tell: Tell = lambda what, done, total: None,
) -> tuple[Profile, dict[float, dict[str, float]]]:
    """Make the profile, and write it to `out`.

    Args:
        prompts: whose mean shares it begins from.
        fitting: None: the means are the profile.
    Returns:
        The profile, and by budget what `fit` says a cut costs; nothing of means.
    Raises:
        ValueError: the model has no layer that kvweave compresses, or says too little to fit to.
    """
    mark = model_mark(model)
    begun = out.with_name(f".{out.name}.begun")
    done: dict[str, dict[str, Any]] = {"prompts": {}, "fitted": {}}
    if begun.is_file():
        there = read_object(begun, fingerprint=str, prompts=dict, fitted=dict)
        done = done if there["fingerprint"] != mark else {name: there[name] for name in done}

    def keep(kind: str, key: str, value: Any) -> None:
        done[kind][key] = value
        write_json(begun, {"fingerprint": mark, **done}, indent=None)

    means = _means(model, processor, prompts, done["prompts"], keep, tell)
    about: dict[str, Any] = {"prompts": [prompt.name for prompt in prompts]}
    costs: dict[float, dict[str, float]] = {}
    if fitting is not None:
        means, costs = _fitted(model, processor, means, fitting, done["fitted"], keep, tell)
        costs = {budget: {name: round(nats, _DIGITS) for name, nats in of.items()} for budget, of in costs.items()}
        about |= {"steps": fitting.steps, "lessons": [prompt.name for prompt in fitting.prompts]}
        about["costs"] = {str(budget): of for budget, of in costs.items()}
    shares = tuple(tuple(tuple(round(x, _DIGITS) for x in heads) for heads in table) for table in means)
    profile = Profile(mark, BUDGETS, shares)
    profile.write(str(out), **about)
    begun.unlink(missing_ok=True)
    return profile, costs


def _means(
    model: Any,
    processor: Any,
    prompts: Sequence[Prompt],
    done: dict[str, Any],
    keep: Callable[[str, str, Any], None],
    tell: Tell,
) -> Table:
    tables = []
    for number, prompt in enumerate(prompts):
        tell("prompts", number, len(prompts))
        inputs = encode(processor, prompt.messages)
        key = _digest(inputs["input_ids"].numpy().tobytes(), prompt.name)
        if key not in done:
            keep("prompts", key, shares_of(model, processor, dict(inputs)))
        tables.append(done[key])
    tell("prompts", len(prompts), len(prompts))
    return torch.tensor(tables, dtype=torch.float64).mean(0).tolist()


def _fitted(
    model: Any,
    processor: Any,
    means: Table,
    fitting: Fitting,
    done: dict[str, Any],
    keep: Callable[[str, str, Any], None],
    tell: Tell,
) -> tuple[Table, dict[float, dict[str, float]]]:
    """Tables of the same form, each fitted from the means at its budget, and what cuts by them cost."""
    names = [prompt.name for prompt in fitting.prompts]
    keys = {budget: _digest(repr(means).encode(), *names, f"{fitting.steps}", f"{budget}") for budget in BUDGETS}
    learned = None
    for table, (budget, key) in zip(means, keys.items(), strict=True):
        if key not in done:
            learned = learned or lessons(model, processor, fitting.prompts, lambda *n: tell("replies", *n))
            start = [share for heads in table for share in heads]
            shares, costs = fit(
                model, learned, start, budget, fitting.steps, lambda *n, b=budget: tell(f"shares at {b:.0%}", *n)
            )
            keep("fitted", key, {"shares": shares, "costs": costs})
    heads = len(means[0][0])
    tables = [
        [done[key]["shares"][n : n + heads] for n in range(0, len(done[key]["shares"]), heads)]
        for key in keys.values()
    ]
    return tables, {budget: done[key]["costs"] for budget, key in keys.items()}


def _digest(data: bytes, *names: str) -> str:
    return hashlib.sha256(data + "".join(names).encode()).hexdigest()[:16]
