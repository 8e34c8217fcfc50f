"""Scores and intervals, by hand."""

import numpy as np
import pytest

from kvweave.evals.metrics import METRICS, RESAMPLES, compare, estimate
from kvweave.lab.evaluate import wilson


def test_scores_of_one_prediction():
    exact, rouge_l = METRICS["exact"], METRICS["rouge_l"]
    assert exact("star turned red", "star turned red") == 1
    assert exact("star turned blue", "star turned red") == 0
    assert rouge_l("star turned blue", "star turned red") == pytest.approx(2 / 3)
    assert exact("", "red") == rouge_l("", "red") == 0


def test_a_mean_weighs_every_task_the_same():
    found = estimate([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0]])
    assert found is not None
    assert found.mean == pytest.approx(0.625)
    assert found.low < 0.625 < found.high


def test_equal_tasks_of_right_and_wrong_get_wilsons_interval():
    found = estimate([[1.0] * 10, [1.0] * 10])
    assert found is not None
    assert (found.low, found.high) == wilson(20, 20)
    assert found.low == pytest.approx(20 / (20 + 1.96**2))


def test_partial_scores_get_a_bootstrap_interval():
    scores = np.random.default_rng(0).random(400).tolist()
    found = estimate([scores])
    assert found is not None
    error = np.std(scores) / 20
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.2 * error)


def test_a_task_without_a_score_leaves_no_mean():
    assert estimate([[1.0], []]) is None
    assert estimate([]) is None


def test_pairs_are_compared_on_common_samples():
    ours = {"lookup": {"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.0}}
    theirs = {"lookup": {"a": 1.0, "b": 0.0, "c": 0.0, "e": 1.0}}
    found = compare(ours, theirs)
    assert found is not None
    assert found.difference == pytest.approx(2 / 3)
    assert (found.low, found.high) == (0, 1)  # all three draws are a: 1 in 27
    assert found.p == pytest.approx(2 / 27, abs=0.02)


def test_certain_and_absent_differences():
    all_right = {"t": {str(n): 1.0 for n in range(50)}}
    all_wrong = {"t": {str(n): 0.0 for n in range(50)}}
    better, same = compare(all_right, all_wrong), compare(all_right, all_right)
    assert better is not None
    assert better.p == pytest.approx(2 / (RESAMPLES + 1))
    assert same is not None
    assert (same.difference, same.p) == (0, 1)
    assert compare(all_right, {"t": {}}) is None
