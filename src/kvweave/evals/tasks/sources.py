"""What a model is asked where no data are named: the questions of its own world, which need no files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvweave import lab
from kvweave.evals.tasks.smol import KNOWN, smol_tasks
from kvweave.evals.tasks.tasks import Task, lab_tasks
from kvweave.evals.tasks.text import DEFAULT_KINDS, KINDS, text_tasks
from kvweave.lab.smol import FAMILIES


@dataclass(frozen=True)
class Source:
    """Questions made on the spot.

    Attributes:
        make: (names, count, size) to tasks; ValueError for what is not allowed.
        tasks: asked where none are named; all_tasks: all there are.
        unit: what a size counts; size: of an album or text where none is named.
        example: the task of the example that is shown, sized example_size; by_length: whose time is measured.
    """

    make: Callable[[Sequence[str], int, int], Sequence[Task]]
    tasks: tuple[str, ...]
    all_tasks: tuple[str, ...]
    unit: str = "images"
    size: int = 8
    example: str = "image_needle"
    example_size: int = 12
    by_length: str = "lookup"


SOURCES = {
    "lab": Source(lab_tasks, lab.TASKS, lab.ALL_TASKS),
    "lab-large": Source(lab_tasks, lab.LARGE_TASKS, lab.ALL_TASKS),
    "smol": Source(smol_tasks, FAMILIES, KNOWN),
    "smol-text": Source(text_tasks, DEFAULT_KINDS, KINDS, "tokens", 600, "needle", 600, "needle"),
}


def source(model: str, questions: str | None = None) -> Source:
    """Of the model's own world, or by name; other models are asked the lab's.

    Raises:
        ValueError: an unknown name.
    """
    if questions is not None and questions not in SOURCES:
        raise ValueError(f"questions={questions!r} is unknown: allowed is one of {', '.join(SOURCES)}")
    return SOURCES[questions] if questions else SOURCES.get(model, SOURCES["lab"])


def make_tasks(source: Source, tasks: Sequence[str], count: int | None, **sizes: int | None) -> "tuple[Task, ...]":
    """Tasks by name, all of the source's own if there are none; `sizes` are images and tokens, where they are named.

    Raises:
        ValueError: a name, count or size that is not allowed, or a size that this source does not have.
    """
    for unit, size in sizes.items():
        if size is not None and unit != source.unit:
            raise ValueError(f"{unit}={size} is not of these questions: allowed is {source.unit}")
    size = sizes.get(source.unit)
    names: Any = tasks or source.tasks
    return tuple(source.make(names, 100 if count is None else count, source.size if size is None else size))
