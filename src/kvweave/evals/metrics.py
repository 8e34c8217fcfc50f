"""Scores of one prediction, by name."""

from collections.abc import Callable, Sequence

from kvweave.evals import milebench_scores, strict_scores
from kvweave.lab.evaluate import rouge_l

Score = Callable[[str, str, Sequence[str]], float]


def _exact(prediction: str, answer: str, choices: Sequence[str] = ()) -> float:
    """1 if the prediction is the answer, word for word."""
    return float(prediction.split() == answer.split())


def _rouge_l(prediction: str, answer: str, choices: Sequence[str] = ()) -> float:
    """F1 of the longest common subsequence of words, as they stand."""
    return rouge_l(prediction, answer)


#: Each takes (prediction, answer, what there is to choose from) and gives a number in [0, 1].
METRICS: dict[str, Score] = {
    "exact": _exact,
    "rouge_l": _rouge_l,
    "milebench_rouge": milebench_scores.rouge,
    "milebench_choice": milebench_scores.choice,
    "milebench_needle": milebench_scores.needle,
    "milebench_contains": milebench_scores.contains,
    "strict_rouge": strict_scores.rouge,
    "strict_choice": strict_scores.choice,
    "strict_words": strict_scores.words,
}


def check_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """The names, if all of them are metrics.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metrics={name!r} is unknown: allowed is one of {', '.join(METRICS)}")
    return tuple(names)
