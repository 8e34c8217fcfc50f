"""Plans: what the command line may ask for, and folders that are not mixed."""

from pathlib import Path
from typing import Any

import pytest

import kvweave
from kvweave.evals import Evaluation, lab_tasks
from kvweave.evals.run.plan import label, parse_budgets, parse_methods, seeded


def plan(**options: Any) -> Evaluation:
    settings: dict[str, Any] = {
        "model": "lab",
        "tasks": lab_tasks(["lookup", "change"], 2, 6),
        "methods": parse_methods(["random,snapkv"]),
        "budgets": (0.2, 0.1),
    }
    return Evaluation(**settings | options)


def test_methods_are_read_with_their_options():
    found = parse_methods(["flowmm:theta=0.3,proxies=16,snapkv", "h2o"])
    assert [label(method) for method in found] == ["flowmm:theta=0.3,proxies=16", "snapkv", "h2o"]
    assert [method.name for method in parse_methods([])] == kvweave.list_methods()


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        (["snapkvv"], "did you mean 'snapkv'"),
        (["flowmm:thta=1"], "did you mean 'theta'"),
        (["flowmm:budget=0.3"], "--budgets"),
        (["h2o", "h2o"], "named twice"),
    ],
)
def test_methods_that_are_refused(methods: list[str], words: str):
    with pytest.raises(ValueError, match=words):
        parse_methods(methods)


def test_budgets_are_shares_or_tokens():
    assert parse_budgets(["0.5, 0.2", "64", "64"]) == (0.5, 0.2, 64)
    for text in ("0", "1.5", "nan", "much", "1GiB", "1,1.0"):
        with pytest.raises(ValueError, match="budget"):
            parse_budgets([text])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"names": ["lookupp"]}, "tasks='lookupp' is unknown"),
        ({"names": []}, "tasks is empty"),
        ({"count": 0}, "count=0"),
        ({"images": 2}, "images=2 is not allowed for action"),
        ({"images": 13}, "images=13"),
    ],
)
def test_tasks_that_are_refused(options: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        lab_tasks(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"protocols": ("seeen",)}, "protocol='seeen' is unknown"),
        ({"seeds": (-1,)}, "seeds=-1"),
        ({"dtype": "float8"}, "dtype='float8'"),
        ({"budgets": ()}, "budgets is empty"),
    ],
)
def test_plans_that_are_refused(options: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        plan(**options)


def test_the_full_cache_comes_first_and_once():
    cells = plan(methods=parse_methods(["snapkv,full"]), seeds=(0, 1)).cells()
    assert [cell.label for cell in cells[:5]] == ["full"] * 4 + ["snapkv"]
    assert len(cells) == 4 + 2 * 2 * 2
    assert len({cell.path(Path()) for cell in cells}) == len(cells)


def test_a_seed_is_also_that_of_random_draws():
    cells = plan(methods=parse_methods(["random"]), seeds=(0, 3)).cells()
    assert next(cell.method.to_dict()["seed"] for cell in cells if cell.label == "random" and cell.seed == 3) == 3
    assert seeded(kvweave.get_method("random", seed=7), 3).to_dict()["seed"] == 7
    assert seeded(kvweave.SnapKV(), 3) == kvweave.SnapKV()


def test_a_folder_belongs_to_one_plan(tmp_path: Path):
    plan().claim(tmp_path)
    plan().claim(tmp_path)
    with pytest.raises(ValueError, match=r"budgets \[0.1\] there, \[0.05\] asked for"):
        plan(budgets=(0.2, 0.05)).claim(tmp_path)
    with pytest.raises(ValueError, match=r'methods .*"theta": 0.5'):
        plan(methods=parse_methods(["random,flowmm:theta=0.5"])).claim(tmp_path)
    with pytest.raises(ValueError, match=r"seeds \[0\] there, \[1\] asked for"):
        plan(seeds=(1,)).claim(tmp_path)


def test_a_model_without_weights_leaves_nothing_behind(tmp_path: Path):
    empty, out = tmp_path / "model", tmp_path / "out"
    empty.mkdir()
    with pytest.raises(ValueError, match="is a folder without config"):
        plan(model=str(empty)).claim(out)
    assert not out.exists()
