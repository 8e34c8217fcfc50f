"""From recipes to sheets: computes what is missing in the folder that all tables share."""

import json
import time
from collections.abc import Sequence
from typing import Any

from kvweave import models
from kvweave.evals.paper.recipe import Recipe
from kvweave.evals.paper.sheet import Sheet
from kvweave.evals.paper.study import Study
from kvweave.evals.paper.subject import Subject
from kvweave.evals.run import store
from kvweave.evals.run.plan import Evaluation
from kvweave.evals.run.results import Result
from kvweave.evals.run.worker import Progress, run
from kvweave.evals.tables.tables import summarise


def evaluations(recipe: Recipe, subject: Subject) -> list[Evaluation]:
    """The recipe's cells on this subject, an evaluation for each protocol; none where nothing is scored."""
    return [
        Evaluation(
            model=subject.model,
            tasks=subject.tasks(recipe.tasks),
            methods=tuple(recipe.parsed().values()),
            budgets=recipe.budgets,
            seeds=subject.seeds,
            protocols=(protocol,),
            dtype=subject.dtype,
            trust_remote_code=subject.trust_remote_code,
            fidelity=False,  # no table of a paper has it
        )
        for protocol in recipe.protocols
        if recipe.budgets
    ]


def make(recipes: Sequence[Recipe], subject: Subject, progress: Progress | None = None) -> list[Sheet]:
    """The recipes' sheets; interrupted anywhere, the same call resumes.

    Raises:
        ValueError: the folder holds results of another model, of other data or of other code.
    """
    start = time.perf_counter()
    plans = {recipe.name: evaluations(recipe, subject) for recipe in recipes}
    parts = [part for plan in plans.values() for part in plan]
    results: dict[str, Result] = {}
    if parts:
        study = Study.of(*parts)
        cells = run(
            study,
            subject.out,
            batch=subject.batch,
            workers=subject.workers,
            device=subject.device,
            command=subject.command,
            progress=progress,
        )
        results = {str(result["cell"]): result for result in cells}
    seconds = time.perf_counter() - start
    return [_sheet(recipe, subject, plans[recipe.name], results, seconds) for recipe in recipes]


def _sheet(
    recipe: Recipe, subject: Subject, plan: Sequence[Evaluation], results: dict[str, Result], seconds: float
) -> Sheet:
    parts: dict[str, Any] = {}
    for part in plan:
        own = [results[str(cell.key)] for cell in part.cells()]
        base = part.labels[1] if recipe.methods else "snapkv"
        summary = summarise(part, own, baseline=base, command=subject.command, seconds=round(seconds, 1))
        parts["summary"] = _together(parts["summary"], summary) if "summary" in parts else summary
    if recipe.measure is not None:
        parts["measured"] = _measured(recipe, subject)
    return recipe.lay_out(recipe, subject, **parts)


def _together(summary: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two protocols' summaries as one."""
    return {name: [*summary[name], *other[name]] if name != "about" else value for name, value in summary.items()}


def _measured(recipe: Recipe, subject: Subject) -> dict[str, Any]:
    """What the recipe measures, or measured before under the same conditions."""
    assert recipe.measure is not None
    path = subject.out / "measured" / (recipe.name.replace(":", "-") + ".json")
    tasks = subject.by_length()
    conditions = {
        "model": subject.model,
        "dtype": subject.dtype,
        "device": models.pick_device(subject.device),
        "tasks": [task.to_dict() for task in tasks],
        "code": store.code_mark("evals/paper", "evals/one"),  # which measure
        "versions": store.versions(),
    }
    conditions = json.loads(json.dumps(conditions))
    if path.exists():
        there = store.read_object(path, conditions=dict, measured=dict)
        if there["conditions"] == conditions:
            return dict(there["measured"])
    measures = recipe.measure(subject, tasks, [method.name for method in recipe.parsed().values()])
    store.write_json(path, {"conditions": conditions, "measured": measures})
    return measures
