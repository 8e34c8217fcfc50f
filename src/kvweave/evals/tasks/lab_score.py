"""How well a model answers the lab's questions, by `model.generate` on hold-out albums.

`answers` takes any model and processor and leaves `generate` as it is, so that a caller can wrap the model in
`kvweave.compress`, say, and measure what that costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from kvweave.evals.scores.metrics import METRICS
from kvweave.evals.scores.words import rouge_l
from kvweave.evals.tables.intervals import wilson
from kvweave.lab.world import TASKS, Sample, parse, require_holdout
from kvweave.models.chat import encode

if TYPE_CHECKING:
    from kvweave.evals.tasks.tasks import Task

LONGEST_ANSWER = 6  # tokens: the opening, up to three words, the end, and one to spare
LONGEST_LIST = 15  # four objects, a digit and a robot


@dataclass(frozen=True)
class Score:
    """How many answers were right word for word; the words' overlap; and a 95 % interval of the first."""

    count: int
    right: int
    exact: float
    rouge_l: float
    low: float
    high: float


def longest_answer(task: str) -> int:
    """Tokens that are enough for any answer of a task."""
    return LONGEST_LIST if parse(task)[1] == "listing" else LONGEST_ANSWER


def answers(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    on_batch: Callable[[int], None] | None = None,
    **generate: Any,
) -> list[str]:
    """What the model answers, greedily unless `generate` says otherwise; `on_batch` hears how many are done.

    Prompts of one batch are padded on the left. `max_new_tokens` is by default what the longest answer takes.
    Further keywords go to `model.generate`.
    """

    if max_new_tokens is None:
        max_new_tokens = max((longest_answer(sample.task) for sample in samples), default=LONGEST_ANSWER)
    conversations = [sample.messages() for sample in samples]
    return answered(model, processor, conversations, batch_size, max_new_tokens, on_batch, **generate)


def answered(
    model: Any,
    processor: Any,
    conversations: Sequence[Sequence[dict[str, Any]]],
    batch_size: int,
    max_new_tokens: int,
    on_batch: Callable[[int], None] | None = None,
    **generate: Any,
) -> list[str]:
    """What `answers` does, of any messages."""
    import torch

    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    replies: list[str] = []
    for first in range(0, len(conversations), batch_size):
        inputs = encode(processor, *conversations[first : first + batch_size]).to(model.device)
        with torch.inference_mode():
            tokens = model.generate(**inputs, **{"max_new_tokens": max_new_tokens, "do_sample": False} | generate)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        replies += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        if on_batch:
            on_batch(len(replies))
    return replies


def evaluate(
    model: Any,
    processor: Any,
    tasks: Iterable[str] = TASKS,
    count: int = 200,
    images: Iterable[int] = (8, 12),
    seed: int = 0,
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
    make: Callable[[Sequence[str], int, int], Sequence[Task]] | None = None,
    **generate: Any,
) -> dict[str, Any]:
    """Accuracy on `count` hold-out albums for each task and number of images, or of tokens if `make` takes these.

    `make` makes tasks as those in `kvweave.evals.tasks.sources`; None: the lab's. An answer is right if the task's
    first metric gives it 1. `progress` hears (answers given, answers in all). Further keywords go to
    `model.generate`. The result can be written as JSON:
    ``{"seed": ..., "count": ..., "scores": {"8": {"lookup": {"exact": ..., ...}}}}``.
    """
    from kvweave.evals.tasks.tasks import lab_tasks

    make = make or lab_tasks
    tasks, images = tuple(tasks), tuple(images)
    total, count_so_far = count * len(tasks) * len(images), 0
    scores: dict[str, dict[str, Any]] = {}
    for number in images:
        for task in make(tasks, count, number):
            examples = task.examples(seed)
            report = None if progress is None else partial(_report, progress, count_so_far, total)
            conversations = [example.messages for example in examples]
            replies = answered(model, processor, conversations, batch, task.max_new_tokens, report, **generate)
            scores.setdefault(str(number), {})[task.name] = asdict(
                _score([one.answer for one in examples], replies, task.metrics[0])
            )
            count_so_far += count
    return {"seed": seed, "count": count, "scores": scores}


def _report(progress: Callable[[int, int], None], before: int, total: int, answered: int) -> None:
    progress(before + answered, total)


def score(samples: Sequence[Sample], replies: Sequence[str]) -> Score:
    """Compare answers with those of hold-out samples; ValueError for training samples or unequal lengths."""
    require_holdout(samples)
    if len(samples) != len(replies) or not samples:
        raise ValueError(f"{len(replies)} answers for {len(samples)} samples")
    return _score([sample.answer for sample in samples], replies)


def _score(answers: Sequence[str], replies: Sequence[str], metric: str = "exact") -> Score:
    right = sum(METRICS[metric](reply, answer, ()) == 1 for answer, reply in zip(answers, replies, strict=True))
    overlap = sum(rouge_l(reply, answer) for answer, reply in zip(answers, replies, strict=True))
    low, high = wilson(right, len(replies))
    return Score(len(replies), right, right / len(replies), overlap / len(replies), low, high)
