"""What is asked: the interface of a task, and the lab's tasks behind it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from kvweave import lab
from kvweave.evals.tasks.lab_score import longest_answer
from kvweave.ops.brief import brief

_NAMES = (*lab.ALL_TASKS, *lab.AUXILIARY)


@dataclass(frozen=True)
class Example:
    """One prompt and its right answer.

    Attributes:
        id: unique over all seeds of a task.
        messages: for the processor's chat template, images (or their files) included.
        question: the last piece of text in `messages`, or its end; what stands before it is the context.
        answer: what a right prediction says.
        choices: what there is to choose from, where there is.
        context: the same for examples that ask about the same context; empty: no other does.
        error: why it cannot be asked, where it cannot.
    """

    id: str
    messages: list[dict[str, Any]]
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    context: str = ""
    error: str = ""


class Task(Protocol):
    """A source of examples. It travels to worker processes, so it holds its options and makes examples anew."""

    @property
    def name(self) -> str:
        """Column of the tables."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names in `metrics.METRICS`: what its score is the mean of, then what is told besides."""

    @property
    def max_new_tokens(self) -> int:
        """Where an answer is cut off."""

    def examples(self, seed: int) -> Sequence[Example]:
        """The same ones for the same seed."""

    def to_dict(self) -> dict[str, Any]:
        """All that the examples depend on, JSON-able."""


@dataclass(frozen=True)
class LabTask:
    """One of the lab's question families, on hold-out albums."""

    name: str
    count: int = 100
    images: int = 8

    @property
    def max_new_tokens(self) -> int:
        """Enough for the longest answer."""
        return longest_answer(self.name)

    @property
    def metrics(self) -> tuple[str, ...]:
        """What changed is told in three words, a list in a dozen: part of it may be right."""
        return {"change": ("exact", "rouge_l"), "listing": ("rouge_l", "exact")}.get(self.name, ("exact",))

    def examples(self, seed: int) -> list[Example]:
        """`count` questions, each about an album of its own."""
        return [
            Example(f"{self.name}/{self.images}/{seed}/{n}", sample.messages(), sample.question, sample.answer)
            for n, sample in enumerate(lab.samples(self.name, self.count, self.images, seed))
        ]

    def to_dict(self) -> dict[str, Any]:
        return {"source": "lab", **asdict(self)}


def lab_tasks(names: Sequence[str] = lab.TASKS, count: int = 100, images: int = 8) -> tuple[LabTask, ...]:
    """Tasks by name.

    Raises:
        ValueError: a name, a count or a number of images that is not allowed.
    """
    for name in names:
        if name not in _NAMES:
            raise ValueError(f"tasks={name!r} is unknown: allowed is one of {', '.join(_NAMES)}")
    if not 1 <= count < 2**31:
        raise ValueError(f"count={brief(count)} is not allowed: allowed is an int >= 1, below 2**31")
    tasks = tuple(LabTask(name, count, images) for name in dict.fromkeys(names))
    if not tasks:
        raise ValueError(f"tasks is empty: allowed is at least one of {', '.join(_NAMES)}")
    for name in names:
        try:
            lab.samples(name, 1, images)
        except ValueError as error:
            raise ValueError(f"images={brief(images)} is not allowed for {name}: {error}") from None
    return tasks
