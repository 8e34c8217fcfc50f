"""The page that an evaluation ends with: a few samples answered again, one at a time, for what only they can show."""

import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from kvweave import models
from kvweave.evals.one.collect import Subject, compare
from kvweave.evals.one.generating import generate
from kvweave.evals.run import store
from kvweave.evals.run.plan import FULL, PROTOCOLS, Evaluation, seeded
from kvweave.evals.tables.tables import about, notes
from kvweave.evals.tasks.tasks import Example
from kvweave.methods import Method
from kvweave.methods.flowmm import FlowMM
from kvweave.models import open_picture
from kvweave.models.chat import encode
from kvweave.ops.budget import LEAST
from kvweave.report.data import Run
from kvweave.report.evaluation import Shown, html

NAME = "index.html"
_DETAIL = 0.2  # the budget shown, where it was evaluated
_REPEATS = {"lab": 3}  # generations that are timed; of other models one


def write_page(
    evaluation: Evaluation, summary: dict[str, Any], out: Path, *, samples: int = 2, device: str = "auto"
) -> Path:
    """OUT/index.html, which loads nothing.

    Args:
        samples: how many are answered with each method, to show what it keeps of their images; 0: none, and neither
            speed nor flow is shown.
    """
    remarks = [" ".join([note, *items]) for note, items in notes(summary)]
    page = Shown()
    if samples:
        failed = {failure["id"] for failure in summary["failed"]}
        try:
            page = _shown(evaluation, samples, device, failed)
        except Exception as error:  # the numbers are there, whatever a picture or a prompt did to us
            remarks.append(f"No sample could be shown: {type(error).__name__}: {error}")
            warnings.warn(remarks[-1], stacklevel=2)
    store.write_text(out / NAME, html(summary, PROTOCOLS, about(summary), remarks, page))
    return out / NAME


def _shown(evaluation: Evaluation, samples: int, device: str, failed: Collection[str]) -> Shown:
    """The first sample of the first tasks, those that could not be answered apart."""
    budget = _DETAIL if _DETAIL in evaluation.budgets else evaluation.budgets[0]
    cells = [cell for cell in evaluation.cells() if cell.budget == budget and cell.label != FULL]
    methods = list({cell.label: seeded(cell.method, 0) for cell in cells if cell.label != "oracle"}.values())
    if not methods:
        return Shown()
    model, processor = models.load(
        evaluation.model, evaluation.dtype, device, trust_remote_code=evaluation.trust_remote_code
    )
    runs, flows = [], []
    for task in evaluation.tasks[:samples]:
        example = next((one for one in task.examples(evaluation.seeds[0]) if one.id not in failed), None)
        if example is None:
            continue
        runs.append(_run(evaluation.model, model, processor, example, methods, task.max_new_tokens))
        flows.append(_flow(model, processor, example))
    layers = [
        {
            "layer": rows[0]["layer"],
            **{name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if name != "layer"},
        }
        for rows in zip(*flows, strict=True)
    ]
    return Shown(runs, budget, layers)


def _run(name: str, model: Any, processor: Any, example: Example, methods: Sequence[Method], longest: int) -> Run:
    """The sample, answered with each method."""
    sources = [piece["image"] for turn in example.messages for piece in turn["content"] if piece["type"] == "image"]
    images = [open_picture(image) if isinstance(image, str) else image for image in sources]
    inputs = encode(processor, example.messages)
    subject = Subject(name, model, processor, inputs, images, example.question, example.answer)
    return compare(subject, methods, longest, _REPEATS.get(name, 1), "")


def _flow(model: Any, processor: Any, example: Example) -> list[dict[str, float]]:
    """FlowMM's three ratios of each compressed layer."""
    inputs = encode(processor, example.messages)
    run = generate(model, processor, inputs, FlowMM(budget=LEAST, flow_rows=0), max_new_tokens=1)  # all are cut
    return [
        {
            "layer": layer["layer"],
            "literal": layer["flow"] or 0.0,
            "balanced": layer.get("flow_balanced", 0.0),
            "nosink": layer.get("flow_nosink", 0.0),
        }
        for layer in run.report["layers"]
        if layer["compressed"]
    ]
