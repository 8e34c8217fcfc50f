"""Scores of one prediction: MileBench's, quirks included, and those without."""

import pytest
from rouge import Rouge

from kvweave.evals.scores.metrics import METRICS, check_metrics
from kvweave.evals.scores.milebench import normalised

CHOICES = ("A red cube", "the blue ball", "nothing", "a red cube and a ball")


def score(name: str, prediction: str, answer: str, choices: tuple[str, ...] = CHOICES) -> float:
    return METRICS[name](prediction, answer, choices)


def test_words_as_they_stand():
    assert score("exact", "star turned red", "star turned red") == 1
    assert score("exact", "star turned blue", "star turned red") == 0
    assert score("rouge_l", "star turned blue", "star turned red") == pytest.approx(2 / 3)
    assert score("exact", "", "red") == score("rouge_l", "", "red") == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Turn\tLeft.\n", "turn left"),
        ("well-known", "well known"),  # inside a word it becomes a space
        ("well-known - yes", "wellknown  yes"),  # next to a space anywhere, it goes everywhere
        ("1,000 well-known", "1000 wellknown"),  # so it does where digits have a comma
        ("2.5 m. long", "2.5 m long"),
        ("a." * 33, "a" * 33 + "."),  # the 33rd period stays
        ("'\"quoted\"'", "quoted"),
    ],
)
def test_texts_as_its_scorer_compares_them(text: str, expected: str):
    assert normalised(text) == expected


def test_its_rouge_counts_distinct_words():
    said, right = "go left go left go", "go left then stop"
    assert score("milebench_rouge", said, right) == Rouge().get_scores(said, right)[0]["rouge-l"]["f"]
    assert score("milebench_rouge", said, right) == pytest.approx(2 * (2 / 4) * (2 / 2) / 1.5)
    assert score("strict_rouge", said, right) == pytest.approx(2 * 2 / (5 + 4))
    assert score("milebench_rouge", " . ", right) == score("strict_rouge", "", right) == 0
    with pytest.raises(ValueError, match="no words"):
        score("milebench_rouge", said, " . ")


def test_long_predictions_do_not_break_the_recursion():
    said = " ".join(f"w{n}" for n in range(1500))
    assert score("milebench_rouge", said, "w0 w1400") == pytest.approx(2 * 2 / 1502, rel=1e-3)


@pytest.mark.parametrize(
    ("prediction", "answer", "official", "strict"),
    [
        ("B", "the blue ball", 1, 1),
        ("b", "the blue ball", 1, 1),
        ("B. the blue ball", "the blue ball", 1, 1),
        ("I think the  blue\nball", "the blue ball", 1, 1),
        ("", "nothing", 1, 0),  # an empty prediction is read as C
        ("no idea", "a red cube and a ball", 0, 0),  # its letters are D and A
        ("do", "a red cube and a ball", 1, 0),  # and here a D alone
        ("a red cube and a ball", "a red cube and a ball", 0, 1),  # A's text comes first in it
        ("(D) both", "a red cube and a ball", 0, 1),
        ("Answer: D", "a red cube and a ball", 0, 1),
        ("nothing, or the blue ball", "the blue ball", 0, 0),
    ],
)
def test_choices(prediction: str, answer: str, official: float, strict: float):
    assert score("milebench_choice", prediction, answer) == official
    assert score("strict_choice", prediction, answer) == strict


def test_a_choice_with_a_point_is_found_but_not_recognised():
    assert score("milebench_choice", "2.5", "2.5", ("1", "2.5")) == 0
    assert score("strict_choice", "2.5", "2.5", ("1", "2.5")) == 1


def test_an_answer_that_is_no_choice_is_an_error():
    for name in ("milebench_choice", "strict_choice"):
        with pytest.raises(ValueError, match="'green' is not among its choices"):
            score(name, "A", "green")


@pytest.mark.parametrize(
    ("prediction", "answer", "needle", "contains", "strict"),
    [
        ("The code is 4821.", "4821", 1, 1, 1),
        ("48213", "4821", 0, 1, 0),
        ("it is kilo echo", "kilo echo", 0, 1, 1),  # its needle is one word
        ("1,000", "1000", 1, 1, 1),
    ],
)
def test_needles(prediction: str, answer: str, needle: float, contains: float, strict: float):
    assert score("milebench_needle", prediction, answer) == needle
    assert score("milebench_contains", prediction, answer) == contains
    assert score("strict_words", prediction, answer) == strict


def test_unknown_metrics_are_refused():
    assert check_metrics(["exact"]) == ("exact",)
    with pytest.raises(ValueError, match="metrics='bleu' is unknown: allowed is one of exact, "):
        check_metrics(["exact", "bleu"])
