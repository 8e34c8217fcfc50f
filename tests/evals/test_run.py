"""Plans that are run, interrupted and resumed, and the command and tables around them."""

import csv
import json
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from kvweave.cli.console import BadInput
from kvweave.cli.eval import evaluate
from kvweave.evals import Evaluation, Example, LabTask, lab_tasks, run, summarise
from kvweave.evals.run import processes
from kvweave.evals.run.plan import parse_methods
from kvweave.evals.run.processes import Turns
from kvweave.evals.run.results import Result
from kvweave.evals.run.worker import Worker
from kvweave.evals.tables.tables import markdown


def plan(**options: Any) -> Evaluation:
    settings: dict[str, Any] = {
        "model": "lab",
        "tasks": lab_tasks(["lookup", "change"], 6, 6),
        "methods": parse_methods(["random,snapkv"]),
        "budgets": (0.2, 0.1),
    }
    return Evaluation(**settings | options)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Result]]:
    out = tmp_path_factory.mktemp("eval")
    return out, run(plan(), out, workers=1, command="kvweave eval")


def without_seconds(results: Sequence[Result]) -> list[Result]:
    return [{name: value for name, value in result.items() if name != "seconds"} for result in results]


def test_scores_follow_from_the_predictions(done: tuple[Path, list[Result]]):
    _, results = done
    evaluation = plan()
    summary = summarise(evaluation, results, baseline="random")
    for row in summary["scores"]:
        (result,) = (r for r in results if all(r["cell"][name] == row[name] for name in ("method", "budget", "task")))
        right = sum(sample["prediction"] == sample["answer"] for sample in result["samples"])
        assert row["score"] == pytest.approx(right / 6)
        assert row["samples"] == 6
        assert set(row["besides"]) == ({"rouge_l"} if row["task"] == "change" else set())
    for row in summary["means"]:
        both = [s["score"] for s in summary["scores"] if (s["method"], s["budget"]) == (row["method"], row["budget"])]
        assert row["score"] == pytest.approx(sum(both) / 2)
    assert {row["method"] for row in summary["tests"]} == {"snapkv"}


def test_budgets_are_equal_and_measured(done: tuple[Path, list[Result]]):
    _, results = done
    for result in results:
        for sample in result["samples"]:
            share = result["cell"]["budget"]
            assert sample["kept"] == [int(share * sample["length"] + 1e-9)] * 4
            assert sample["bytes"] == sum(sample["kept"]) * 2 * 2 * 32 * 4
    assert summarise(plan(), results)["unequal"] == []


def test_random_loses_clearly_to_the_full_cache(done: tuple[Path, list[Result]]):
    summary = summarise(plan(), done[1], baseline="full")
    scores = {(row["method"], row["budget"]): row for row in summary["means"]}
    assert scores["full", 1.0]["score"] >= 0.9
    assert scores["random", 0.2]["high"] < scores["full", 1.0]["low"]
    (test,) = (t for t in summary["tests"] if (t["method"], t["budget"]) == ("random", 0.2))
    assert test["high"] < 0
    assert test["p"] < 0.01


def test_an_interrupted_plan_resumes(
    done: tuple[Path, list[Result]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    finished = 0

    def interrupt(result: Result, count: int, total: int, was_there: bool) -> None:
        nonlocal finished
        finished = count
        if count == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan(), tmp_path, workers=1, command="kvweave eval", progress=interrupt)
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert finished == len(cells) == 4

    computed: list[Any] = []
    original = Worker.__call__
    monkeypatch.setattr(Worker, "__call__", lambda self, cell, *rest: computed.append(cell) or original(self, cell))
    results = run(plan(), tmp_path, workers=1, command="kvweave eval")
    assert len(computed) == len(results) - 4
    assert all(path.stat().st_mtime_ns == time for path, time in cells.items())
    assert without_seconds(results) == without_seconds(done[1])

    computed.clear()
    assert run(plan(), tmp_path, workers=1) == results
    assert not computed
    with pytest.raises(ValueError, match=r"budgets \[0.2, 0.1\] there, \[0.05\] asked for"):
        run(plan(budgets=(0.05,)), tmp_path, workers=1)


def test_an_interrupted_cell_goes_on_with_its_next_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one = plan(tasks=lab_tasks(["lookup"], 7, 2), methods=parse_methods(["snapkv"]), budgets=(0.3,))
    expected = run(one, tmp_path / "whole", batch=2)

    def interrupt(cell: Any, done: int, total: int) -> None:
        assert total == 7
        if cell.label == "snapkv" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(one, tmp_path / "cut", batch=2, tick=interrupt)
    (path,) = (tmp_path / "cut" / "cells").glob("*snapkv*")
    begun = json.loads(path.read_text())
    assert (len(begun["samples"]), begun["missing"]) == (4, 3)
    asked: list[str] = []
    original = Worker._answers

    def noting(self: Worker, cell: Any, batch: Any, held: Any) -> Any:
        asked.extend(example.id for example in batch)
        return original(self, cell, batch, held)

    monkeypatch.setattr(Worker, "_answers", noting)
    results = run(one, tmp_path / "cut", batch=2)
    assert asked == [sample["id"] for sample in expected[1]["samples"][4:]]
    assert without_seconds(results) == without_seconds(expected)


def test_what_was_torn_while_it_was_written_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        run(plan(tasks=lab_tasks(["lookup"], 3, 1), methods=parse_methods(["full"])), tmp_path / "torn")
    assert not [path for path in (tmp_path / "torn").rglob("*") if path.is_file()]


class Cluster:
    """Stands in for Ray: actors are made and called in this process, their arguments pickled as on the way."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.killed = 0

    def is_initialized(self) -> bool:
        return True

    def remote(self, **needs: Any) -> Any:
        self.asked.append(needs)

        def actor(kind: Any) -> Any:
            def make(*arguments: Any) -> Any:
                made = kind(*pickle.loads(pickle.dumps(arguments)))
                compute = lambda *job: Reference(made.compute(*pickle.loads(pickle.dumps(job))))  # noqa: E731
                return SimpleNamespace(compute=SimpleNamespace(remote=compute))

            return SimpleNamespace(remote=make)

        return actor

    def wait(self, references: "list[Reference]", num_returns: int) -> Any:
        return references[-num_returns:], references[:-num_returns]

    def get(self, reference: "Reference") -> Any:
        return reference.value

    def kill(self, actor: Any) -> None:
        self.killed += 1


@dataclass(frozen=True, eq=False)
class Reference:
    value: Any


def test_a_cluster_finds_what_one_process_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cluster = Cluster()
    monkeypatch.setitem(sys.modules, "ray", cluster)
    small = plan(tasks=lab_tasks(["lookup"], 3, 2), methods=parse_methods(["snapkv"]))
    one = run(small, tmp_path / "one")
    assert without_seconds(run(small, tmp_path / "two", workers=2, ray="local")) == without_seconds(one)
    assert cluster.asked == [{"num_cpus": 1, "num_gpus": 0}]
    assert cluster.killed == 2
    with pytest.raises(FileNotFoundError, match="is not the plan's folder on every machine"):
        processes.Remote(Worker(small, tmp_path / "elsewhere", 1, "cpu", {}))


def test_without_ray_its_address_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'kvweave\[ray\]'"):
        run(plan(), tmp_path, ray="auto")


def test_a_damaged_file_is_named(tmp_path: Path):
    one = plan(tasks=lab_tasks(["lookup"], 1, 1), methods=parse_methods(["full"]))
    run(one, tmp_path, workers=1)
    (path,) = (tmp_path / "cells").iterdir()
    path.write_text("{")
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        run(one, tmp_path, workers=1)


def test_two_workers_find_what_one_finds(tmp_path: Path):
    small = plan(tasks=lab_tasks(["lookup"], 3, 2), methods=parse_methods(["snapkv"]), protocols=("seen", "unseen"))
    one = run(small, tmp_path / "one", workers=1)
    two = run(small, tmp_path / "two", workers=2)
    assert without_seconds(one) == without_seconds(two)


def test_workers_stay_where_they_have_read_and_help_where_most_is_left():
    cells = plan(
        tasks=lab_tasks(["lookup", "change", "action"], 1, 3),
        methods=parse_methods(["snapkv,random,peak"]),
        budgets=(0.2,),
    ).cells()
    turns = Turns({n: cell for n, cell in enumerate(cells) if cell.label != "full"})
    given = [(worker, turns.next(worker)) for worker in (0, 1, 0, 1, 0, 1, 1, 0, 1)]
    places = [(worker, job[1].task.name) for worker, job in given if job]
    assert places == [
        (0, "lookup"), (1, "change"), (0, "lookup"), (1, "change"), (0, "lookup"), (1, "change"),
        (1, "action"), (0, "action"), (1, "action"),
    ]  # fmt: skip
    assert turns.next(0) is None
    numbers = sorted(job[0] for _, job in given if job)
    assert numbers == list(range(3, 12))


@dataclass(frozen=True)
class Broken(LabTask):
    """A lab task whose second sample has no readable image."""

    def examples(self, seed: int) -> list[Example]:
        found = super().examples(seed)
        bad = [{"role": "user", "content": [{"type": "image", "image": "gone.png"}, {"type": "text", "text": "? ?"}]}]
        found[1] = Example(found[1].id, bad, "? ?", "")
        return found


def test_failed_samples_are_listed_and_not_scored(tmp_path: Path):
    broken = plan(tasks=(Broken("lookup", 3, 4),), methods=parse_methods(["full"]))
    results = run(broken, tmp_path, workers=1)
    summary = summarise(broken, results)
    (row,) = summary["scores"]
    assert (row["samples"], row["failed"], row["score"]) == (2, 1, 1)
    (failure,) = summary["failed"]
    assert failure["id"] == "lookup/4/0/1"
    assert "gone.png" in failure["error"]
    assert "1 answers are missing" in markdown(summary)
    again: list[bool] = []
    run(broken, tmp_path, workers=1, progress=lambda result, count, total, was_there: again.append(was_there))
    assert again == [False]  # what failed is tried again


# -------------------------------------------------------------------- the command

app = typer.Typer()
app.command()(evaluate)
SMALL = ["--tasks", "lookup,action", "--count", "2", "--images", "6", "--budgets", "0.2", "--workers", "1"]


def test_the_command_writes_its_tables(tmp_path: Path):
    arguments = [*SMALL, "--methods", "random", "--methods", "snapkv,flowmm:theta=0.3", "--out", str(tmp_path)]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert "flowmm:theta=0.3" in first.stdout
    text = (tmp_path / "table.md").read_text()
    for words in ("Command: `kvweave", "torch", "seeds 0", "| snapkv |", "Difference to snapkv", "By task at 20 %"):
        assert words in text
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert len(rows) == 2 * 4
    assert {row["equal"] for row in rows} == {"True"}

    second = CliRunner().invoke(app, [*arguments, "--json", "--quiet"])
    summary = json.loads(second.stdout)
    assert summary == json.loads((tmp_path / "table.json").read_text())
    assert {row["method"] for row in summary["means"]} == {"full", "random", "snapkv", "flowmm:theta=0.3"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "nothing"], "tasks='nothing' is unknown"),
        (["--methods", "nothing"], "method='nothing' is unknown"),
        (["--budgets", "2.5"], "budget=2.5"),
        (["--budgets", ","], "budgets is empty"),
        (["--seeds", "a"], "seeds='a'"),
        (["--protocol", "heard"], "protocol='heard' is unknown"),
        (["--baseline", "h2o", "--methods", "snapkv"], "baseline='h2o' is not evaluated"),
        (["--workers", "0"], "workers=0"),
        (["--batch", "0"], "batch=0"),
        (["--data", "no/such/folder"], "data='no/such/folder' does not exist"),
        (["--data", ".", "--images", "4"], "--images 4 is for generated questions"),
        (["--adversarial"], "--adversarial is for a folder of data"),
        (["--model", "no/such/folder"], "model='no/such/folder' does not exist"),
        (["--device", "abacus"], "device='abacus'"),
    ],
)
def test_bad_input_is_refused_before_any_work(tmp_path: Path, arguments: list[str], words: str):
    out = tmp_path / "out"
    result = CliRunner().invoke(app, [*arguments, "--quiet", "--out", str(out)])
    assert isinstance(result.exception, BadInput)
    assert words in str(result.exception)
    assert not out.exists()
