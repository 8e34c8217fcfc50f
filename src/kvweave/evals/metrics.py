"""Scores of one prediction, intervals of their means, and the paired comparison of two methods."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvweave.lab.evaluate import rouge_l, wilson

RESAMPLES = 2000
_SEED = 0  # of the bootstrap: the same results give the same table

Floats = NDArray[np.float64]


def exact(prediction: str, answer: str) -> float:
    """1 if the prediction is the answer, word for word."""
    return float(prediction.split() == answer.split())


#: Each takes (prediction, answer) and gives a number in [0, 1].
METRICS: dict[str, Callable[[str, str], float]] = {"exact": exact, "rouge_l": rouge_l}


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks, each weighing the same, with its 95 % interval."""

    mean: float
    low: float
    high: float


def estimate(tasks: Sequence[Sequence[float]]) -> Estimate | None:
    """The mean of the tasks' means; None where a task has no score.

    Scores of 0 and 1, equally many a task, get Wilson's interval, which holds near 0 and 1 and does not count on
    tasks being alike; others a bootstrap over the samples of each task.
    """
    if not tasks or not all(tasks):
        return None
    mean = float(np.mean([np.mean(scores) for scores in tasks]))
    if {score for scores in tasks for score in scores} <= {0.0, 1.0} and len({len(x) for x in tasks}) == 1:
        low, high = wilson(round(sum(map(sum, tasks))), sum(map(len, tasks)))
    else:
        low, high = np.percentile(_resampled(tasks), [2.5, 97.5]).tolist()
    return Estimate(mean, low, high)


@dataclass(frozen=True)
class Comparison:
    """A method's mean minus the baseline's on the same samples, its 95 % interval, and a two-sided p-value."""

    difference: float
    low: float
    high: float
    p: float


def compare(
    tasks: Mapping[str, Mapping[str, float]], baseline: Mapping[str, Mapping[str, float]]
) -> Comparison | None:
    """Paired bootstrap over the samples of each task; None where a task has no sample that both answered.

    Args:
        tasks, baseline: scores by task and sample id.
    """
    pairs = [
        [score - baseline[task][id_] for id_, score in scores.items() if id_ in baseline[task]]
        for task, scores in tasks.items()
    ]
    if not pairs or not all(pairs):
        return None
    means = _resampled(pairs)
    low, high = np.percentile(means, [2.5, 97.5]).tolist()
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    difference = float(np.mean([np.mean(scores) for scores in pairs]))
    return Comparison(difference, low, high, min(1.0, 2 * (tail + 1) / (RESAMPLES + 1)))


def _resampled(tasks: Sequence[Sequence[float]]) -> Floats:
    """Means over tasks of samples drawn with replacement within each: [RESAMPLES]."""
    random = np.random.default_rng(_SEED)
    means = np.zeros(RESAMPLES)
    for scores in tasks:
        drawn = random.integers(len(scores), size=(RESAMPLES, len(scores)))
        means += np.asarray(scores, dtype=np.float64)[drawn].mean(1)
    return means / len(tasks)
