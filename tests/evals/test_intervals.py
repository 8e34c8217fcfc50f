"""Means, intervals and tests, by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvweave.evals.tables.intervals import compare, estimate, holm, sign_test, wilson


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


@pytest.mark.parametrize(
    ("tasks", "mean"),
    [
        ([[1.0] * 10, [1.0] * 5], 1.0),
        ([[0.0] * 4, [0.0] * 8], 0.0),
        ([[0.5] * 12], 0.5),
        ([[0.25] * 6, [0.75] * 6], 0.5),
    ],
)
def test_equal_samples_get_wilsons_interval_and_not_none(tasks, mean):
    found = estimate(tasks)
    assert found is not None
    count = sum(map(len, tasks))
    assert (found.mean, found.low, found.high) == (mean, *wilson(mean * count, count))
    assert found.high - found.low > 0.1
    assert found.low <= mean <= found.high


@given(st.lists(st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0]), min_size=1, max_size=6), min_size=1, max_size=4))
def test_no_interval_of_shares_is_a_point(tasks):
    found = estimate(tasks)
    assert found is not None
    assert 0 <= found.low < found.high <= 1
    pairs = [{str(n): score for n, score in enumerate(scores)} for scores in tasks]
    there = {str(n): by_id for n, by_id in enumerate(pairs)}
    zero = {name: dict.fromkeys(by_id, 0.0) for name, by_id in there.items()}
    difference = compare(there, zero)
    assert difference is not None
    assert -1 <= difference.low < difference.high <= 1


def test_what_is_no_share_keeps_its_own_scale():
    found = estimate([[3.0] * 4], shares=False)
    assert found is not None
    assert (found.low, found.mean, found.high) == (3, 3, 3)


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
    assert (found.better, found.worse, found.p) == (2, 0, 0.5)


def test_certain_and_absent_differences():
    all_right = {"t": {str(n): 1.0 for n in range(50)}}
    all_wrong = {"t": {str(n): 0.0 for n in range(50)}}
    better, same = compare(all_right, all_wrong), compare(all_right, all_right)
    assert better is not None
    assert better.p == 2 * 0.5**50
    assert same is not None
    assert (same.difference, same.p) == (0, 1)
    assert (better.low, better.high) == (2 * wilson(50, 50)[0] - 1, 1)
    assert same.low == pytest.approx(-same.high)
    assert same.high == pytest.approx(2 * wilson(25, 50)[1] - 1)
    assert compare(all_right, {"t": {}}) is None


def test_the_sign_test_is_that_of_fair_coins():
    assert sign_test(0, 0) == sign_test(3, 3) == 1
    assert sign_test(1, 5) == sign_test(5, 1) == pytest.approx(2 * (1 + 6) / 64)
    assert 0 < sign_test(900, 700) < 1e-5


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
