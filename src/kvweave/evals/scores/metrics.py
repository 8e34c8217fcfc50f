"""Scores of one prediction, by name."""

from collections.abc import Callable, Sequence

from kvweave.evals.scores import milebench, strict
from kvweave.evals.scores.words import rouge_l

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
    "milebench_rouge": milebench.rouge,
    "milebench_choice": milebench.choice,
    "milebench_needle": milebench.needle,
    "milebench_contains": milebench.contains,
    "strict_rouge": strict.rouge,
    "strict_choice": strict.choice,
    "strict_words": strict.words,
    "strict_parts": strict.parts,
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
