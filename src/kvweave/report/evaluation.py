"""An evaluation as one page of HTML that loads nothing: scores by budget, memory, speed, flow, kept tokens."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from kvweave.report.data import Run, size
from kvweave.report.page import data_uri, script_json, text
from kvweave.report.picture import shares

_DIFFERENCE = ("protocol", "method", "budget", "baseline", "difference", "low", "high", "p_holm")


@dataclass(frozen=True)
class Shown:
    """What a page shows beside an evaluation's summary.

    Attributes:
        runs: a few samples, answered with the full cache and with each method at `budget`.
        flow: for each compressed layer {"layer", "literal", "balanced", "nosink"}, means over the runs.
    """

    runs: Sequence[Run] = ()
    budget: float | int | None = None
    flow: Sequence[dict[str, float]] = field(default_factory=list)


def html(
    summary: dict[str, Any], protocols: Mapping[str, str], about: Sequence[str], notes: Sequence[str], shown: Shown
) -> str:
    """The page.

    Args:
        summary: as `evals.summarise` gives it; protocols: what each is called.
        about, notes: sentences on how it was made, and what to know.
    """
    template = resources.files("kvweave.report").joinpath("evaluation.html").read_text(encoding="utf-8")
    facts = summary["about"]
    tasks = ", ".join(dict.fromkeys(row["task"] for row in summary["scores"]))
    parts = {
        "title": text(f"{facts['model']}: methods at equal budgets"),
        "summary": text(f"{len({row['method'] for row in summary['means']})} methods · tasks: {tasks}"),
        "command": text(facts["command"]),
        "about": "".join(f"<p class=fine>{text(line)}</p>" for line in about if not line.startswith("Command:")),
        "notes": "".join(f"<p class=note>{text(note)}</p>" for note in notes),
        "data": script_json(_data(summary, protocols, shown)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _data(summary: dict[str, Any], protocols: Mapping[str, str], shown: Shown) -> dict[str, Any]:
    """What the page's script draws."""
    names = dict.fromkeys(row["protocol"] for row in summary["means"])
    return {
        "protocols": [{"name": name, "label": protocols[name]} for name in names],
        "tasks": list(dict.fromkeys(row["task"] for row in summary["scores"])),
        "means": [{name: _short(value) for name, value in row.items()} for row in summary["means"]],
        "scores": [
            {name: _short(row[name]) for name in ("protocol", "method", "budget", "task", "score", "low", "high")}
            for row in summary["scores"]
        ],
        "differences": [{name: _short(row[name]) for name in _DIFFERENCE} for row in summary["tests"]],
        "memory": _memory(summary),
        "speed": _speed(shown.runs),
        "budget": shown.budget,
        "flow": [{name: _short(value) for name, value in row.items()} for row in shown.flow],
        "samples": [_sample(run) for run in shown.runs],
    }


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _memory(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Mean bytes of a sample's cache, by method and budget."""
    sizes: dict[tuple[str, float], list[float]] = {}
    for row in summary["scores"]:
        if row["bytes"] is not None:
            sizes.setdefault((row["method"], row["budget"]), []).append(row["bytes"])
    return [
        {"method": method, "budget": budget, "bytes": sum(all_) / len(all_), "text": size(sum(all_) / len(all_))}
        for (method, budget), all_ in sizes.items()
    ]


def _speed(runs: Sequence[Run]) -> dict[str, dict[str, float | None]]:
    """Mean over samples of tokens a second, and of milliseconds of prefill, by method; "full" among them."""
    answers: dict[str, list[Any]] = {}
    for run in runs:
        for name, answer in [("full", run.full), *((answer.method, answer) for answer in run.answers)]:
            answers.setdefault(_label(name), []).append(answer.speed)
    speeds: dict[str, dict[str, float | None]] = {}
    for name, all_ in answers.items():
        rates = [speed.tokens_per_second for speed in all_ if speed.tokens_per_second is not None]
        speeds[name] = {
            "tokens": round(sum(rates) / len(rates), 1) if rates else None,
            "prefill": round(1000 * sum(speed.prefill_seconds for speed in all_) / len(all_), 1),
        }
    return speeds


def _label(spelling: str) -> str:
    """A method's row in the tables: its spelling without the budget."""
    name, _, options = spelling.partition(":")
    rest = ",".join(option for option in options.split(",") if not option.startswith("budget="))
    return f"{name}:{rest}" if rest else name


def _sample(run: Run) -> dict[str, Any]:
    """A question with its images, and what each method kept of their cells."""
    methods = []
    for answer in run.answers:
        share = shares(answer, len(run.tokens))
        cells = [
            [[round(float(share.kept[at]), 2), round(float(share.merged[at]), 2)] for at in grid.tokens]
            for grid in run.grids
        ]
        methods.append({"name": _label(answer.method), "text": answer.text, "cells": cells})
    return {
        "question": run.question,
        "right": run.right,
        "full": run.full.text,
        "images": [data_uri(image) for image in run.images],
        "grids": [{"image": grid.image, "rows": grid.rows, "columns": grid.columns} for grid in run.grids],
        "methods": methods,
    }
