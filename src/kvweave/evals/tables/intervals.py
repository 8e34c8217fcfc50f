"""Means of scores with their intervals, and the paired comparison of two methods."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb, sqrt

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
_SEED = 0  # of the bootstrap: the same results give the same table

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks, each weighing the same, with its 95 % interval."""

    mean: float
    low: float
    high: float


def estimate(tasks: Sequence[Sequence[float]], *, shares: bool = True) -> Estimate | None:
    """The mean of the tasks' means; None where a task has no score.

    Scores of 0 and 1, equally many a task, get Wilson's interval, which holds near 0 and 1 and does not count on
    tasks being alike; others a bootstrap over the samples of each task. Equal samples leave a bootstrap nothing to
    draw from: they get Wilson's, too.

    Args:
        shares: scores lie between 0 and 1.
    """
    if not tasks or not all(tasks):
        return None
    mean = float(np.mean([np.mean(scores) for scores in tasks]))
    if {score for scores in tasks for score in scores} <= {0.0, 1.0} and len({len(x) for x in tasks}) == 1:
        return Estimate(mean, *wilson(round(sum(map(sum, tasks))), sum(map(len, tasks))))
    return Estimate(mean, *_interval(tasks, mean, (0, 1) if shares else None))


def _interval(tasks: Sequence[Sequence[float]], mean: float, ends: tuple[float, float] | None) -> tuple[float, float]:
    """A bootstrap's 95 %, or where all samples of each task are equal Wilson's on the scale between `ends`."""
    if ends is None or any(max(scores) > min(scores) for scores in tasks):
        low, high = np.percentile(_resampled(tasks), [2.5, 97.5]).tolist()
        return low, high
    count, scale = sum(map(len, tasks)), ends[1] - ends[0]
    low, high = wilson(count * (mean - ends[0]) / scale, count)
    return ends[0] + scale * low, ends[0] + scale * high


@dataclass(frozen=True)
class Comparison:
    """A method's mean minus the baseline's on the same samples.

    Attributes:
        low, high: 95 % interval, by a paired bootstrap within each task; where all differences of each are equal,
            Wilson's on the scale from -1 to 1.
        better, worse: samples on which the method scores higher, and lower.
        p: two-sided, of the exact sign test on those (McNemar's test where scores are 0 and 1).
    """

    difference: float
    low: float
    high: float
    better: int
    worse: int
    p: float


def compare(
    tasks: Mapping[str, Mapping[str, float]], baseline: Mapping[str, Mapping[str, float]]
) -> Comparison | None:
    """Compare on the samples that both answered; None where a task has none.

    Args:
        tasks, baseline: scores by task and sample id.
    """
    pairs = [
        [score - baseline[task][id_] for id_, score in scores.items() if id_ in baseline[task]]
        for task, scores in tasks.items()
    ]
    if not pairs or not all(pairs):
        return None
    better, worse = (sum(sign * pair > 0 for scores in pairs for pair in scores) for sign in (1, -1))
    difference = float(np.mean([np.mean(scores) for scores in pairs]))
    low, high = _interval(pairs, difference, (-1, 1))
    return Comparison(difference, low, high, better, worse, sign_test(better, worse))


def sign_test(better: int, worse: int) -> float:
    """Two-sided p-value of as lopsided a split of `better + worse` fair coins."""
    count = better + worse
    tail = sum(comb(count, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**count)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order: below alpha, a claim holds however many were tested."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def _resampled(tasks: Sequence[Sequence[float]]) -> Floats:
    """Means over tasks of samples drawn with replacement within each: [RESAMPLES]."""
    random = np.random.default_rng(_SEED)
    means = np.zeros(RESAMPLES)
    for scores in tasks:
        samples = random.integers(len(scores), size=(RESAMPLES, len(scores)))
        means += np.asarray(scores, dtype=np.float64)[samples].mean(1)
    return means / len(tasks)


def wilson(right: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 % by default."""
    share = min(1.0, max(0.0, right / count))
    middle = share + z * z / (2 * count)
    spread = z * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
