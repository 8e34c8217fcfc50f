"""From recipes to sheets: computes what is missing in the folder that all tables share."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvweave import models
from kvweave.evals import store
from kvweave.evals.paper.recipes import Recipe
from kvweave.evals.paper.sheet import Sheet
from kvweave.evals.paper.study import Study
from kvweave.evals.plan import Evaluation
from kvweave.evals.run import Progress, Result, run
from kvweave.evals.tables import summarise
from kvweave.evals.tasks import Task


@dataclass
class Subject:
    """What is measured.

    Attributes:
        model: "lab", a local folder or a hub id.
        data: name of the data, for a reader: "" for the lab's own questions.
        tasks: by what paper's tasks are asked for; those of the lab whatever is asked for.
        out: the folder that all tables share.
        by_length: tasks whose prompts differ in length, for measurements of time.
        command: what a reader may type.
    """

    model: str
    data: str
    tasks: Callable[[Sequence[str]], tuple[Task, ...]]
    by_length: Callable[[], tuple[Task, ...]]
    out: Path
    seeds: tuple[int, ...] = (0,)
    dtype: str = "auto"
    device: str = "auto"
    batch: int = 50
    workers: int = 1
    command: str = ""
    _loaded: tuple[Any, Any] | None = field(default=None, repr=False)

    def load(self) -> tuple[Any, Any]:
        """The model and its processor, once."""
        if self._loaded is None:
            self._loaded = models.load(self.model, self.dtype, models.pick_device(self.device))
        return self._loaded


def evaluation(recipe: Recipe, subject: Subject) -> Evaluation | None:
    """The recipe's cells on this subject; None where nothing is scored."""
    if not recipe.budgets:
        return None
    return Evaluation(
        model=subject.model,
        tasks=subject.tasks(recipe.tasks),
        methods=recipe.parsed(),
        budgets=recipe.budgets,
        seeds=subject.seeds,
        protocols=recipe.protocols,
        dtype=subject.dtype,
        fidelity=False,  # no table of a paper has it
    )


def make(recipes: Sequence[Recipe], subject: Subject, progress: Progress | None = None) -> list[Sheet]:
    """The recipes' sheets; interrupted anywhere, the same call resumes.

    Raises:
        ValueError: the folder holds results of another model, of other data or of other code.
    """
    start = time.perf_counter()
    plans = {recipe.name: plan for recipe in recipes if (plan := evaluation(recipe, subject)) is not None}
    results: dict[str, Result] = {}
    if plans:
        study = Study.of(*plans.values())
        done = run(
            study,
            subject.out,
            batch=subject.batch,
            workers=subject.workers,
            device=subject.device,
            command=subject.command,
            progress=progress,
        )
        results = {str(result["cell"]): result for result in done}
    seconds = time.perf_counter() - start
    return [_sheet(recipe, subject, plans.get(recipe.name), results, seconds) for recipe in recipes]


def _sheet(
    recipe: Recipe, subject: Subject, plan: Evaluation | None, results: dict[str, Result], seconds: float
) -> Sheet:
    given: dict[str, Any] = {}
    if plan is not None:
        own = [results[str(cell.key)] for cell in plan.cells()]
        base = plan.labels[1] if recipe.methods else "snapkv"
        given["summary"] = summarise(plan, own, baseline=base, command=subject.command, seconds=round(seconds, 1))
    if recipe.measure is not None:
        given["measured"] = _measured(recipe, subject)
    sheet: Sheet = recipe.lay_out(recipe, subject, **given)
    return sheet


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
        "code": store.code_mark(),
        "versions": store.versions(),
    }
    conditions = json.loads(json.dumps(conditions))
    if path.exists():
        there = store.read_json(path)
        if there["conditions"] == conditions:
            return dict(there["measured"])
    measured = recipe.measure(subject, tasks, [method.name for method in recipe.parsed()])
    store.write_json(path, {"conditions": conditions, "measured": measured})
    return measured
