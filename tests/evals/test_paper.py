"""The papers' tables: recipes that are well-formed, cells that are shared, sheets that say what was measured."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import kvweave
from kvweave import models
from kvweave.cli import app
from kvweave.cli.console import BadInput
from kvweave.evals import lab_tasks
from kvweave.evals.answer.answering import prefill, prepare
from kvweave.evals.paper import RECIPES, Subject, find, make, timing
from kvweave.evals.paper.make import evaluations
from kvweave.evals.paper.printed import printed, read, remark
from kvweave.evals.paper.study import Study
from kvweave.methods import parse_method

ASKED = {"flowmm:table1", "flowmm:table2", "flowmm:table3", "flowmm:table4", "flowmm:fig3", "flowmm:fig4"}
ASKED |= {"flashcache:latency", "flashcache:budget", "flashcache:outliers", "lookm:merges", "lookm:budget"}


def subject(out: Path, **options: Any) -> Subject:
    """Two tasks of one short prompt each."""
    settings: dict[str, Any] = {
        "model": "lab",
        "data": "",
        "tasks": lambda names: lab_tasks(["lookup", "change"], 1, 3),
        "by_length": lambda: lab_tasks(["lookup"], 1, 2),
        "out": out,
    }
    return Subject(**settings | options)


def test_every_table_that_was_asked_for_is_there():
    assert set(RECIPES) >= ASKED
    with pytest.raises(ValueError, match="did you mean 'flowmm:table1'"):
        find("flowm:table1")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_well_formed(name: str, tmp_path: Path):
    recipe = find(name)
    assert len(recipe.shown()) == len(recipe.parsed())
    plan = evaluations(recipe, subject(tmp_path))
    assert [part.protocols for part in plan] == [(each,) for each in recipe.protocols if recipe.budgets]
    if not recipe.methods:
        assert {*kvweave.list_methods(), "oracle"} == set(recipe.shown())
        assert not set(recipe.marked) - {*kvweave.list_methods(), "weave"}


def test_what_two_tables_need_is_computed_once(tmp_path: Path):
    names = "flowmm:table1", "flowmm:fig4", "lookm:budget"
    plans = [part for name in names for part in evaluations(find(name), subject(tmp_path))]
    study = Study.of(*plans)
    keys = [json.dumps(cell.key) for cell in study.cells()]
    assert len(keys) == len(set(keys))
    assert set(keys) == {json.dumps(cell.key) for plan in plans for cell in plan.cells()}
    assert [cell.label for cell in study.cells()[:5]] == ["full"] * 4 + [study.cells()[4].label]
    places = [(cell.key["protocol"], cell.key["task"]) for cell in study.cells()[4:]]
    assert places == sorted(places, key=places.index)  # those of a prompt together


def test_a_folder_takes_further_tables_and_no_other_data(tmp_path: Path):
    theta, parts = (find(name) for name in ("flowmm:table3", "flowmm:table4"))
    (first,) = make([theta], subject(tmp_path))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    make([theta, parts], subject(tmp_path))
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert before.items() < after.items()
    with pytest.raises(ValueError, match=r"tasks .*\"count\": 1.* there, .*\"count\": 2.* asked for"):
        make([theta], subject(tmp_path, tasks=lambda names: lab_tasks(["lookup"], 2, 3)))
    rows = first.tables[0].rows
    assert [row[0] for row in rows] == ["full", *(f"theta {theta:g}" for theta in (0.1, 0.2, 0.3, 0.4, 0.5))]
    assert rows[0][1].startswith("1.00 [")
    means = {row["method"]: row["score"] for row in first.data["means"]}
    assert [float(row[1].split()[0]) for row in rows] == pytest.approx(list(means.values()), abs=0.005)


FEW = {"flowmm": "flowmm", "random": "random"}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_runs_and_is_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = find(name)
    few = dict(list(recipe.methods.items())[:2]) or FEW
    protocols = recipe.protocols if name == "flowmm:table1" else ("seen",)
    small = replace(recipe, methods=few, budgets=recipe.budgets[:2], protocols=protocols)
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "TOKENS", 4)
    monkeypatch.setattr(timing, "list_methods", lambda: ["full", "flashcache", "snapkv", "weave"])
    given = subject(tmp_path, tasks=lambda names: lab_tasks(["lookup"], 1, 2), command=f"kvweave paper {name}")
    (sheet,) = make([small], given)
    paths = sheet.write(tmp_path)
    told = json.loads(paths[0].read_text())
    text = paths[1].read_text()
    assert told["title"] in text
    assert f"kvweave paper {name}" in text
    assert len(told["tables"]) >= 1
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    if recipe.measure is not None and not recipe.budgets:
        again = replace(small, measure=lambda *given: pytest.fail("measured again"))
        (same,) = make([again], given)
        assert same.tables == sheet.tables


def test_what_a_cut_takes_includes_one_that_waits(monkeypatch: pytest.MonkeyPatch):
    sessions = []

    def noted(*given):
        sessions.append(kvweave.compress(*given))
        return sessions[-1]

    monkeypatch.setattr(timing, "compress", noted)
    model, processor = models.load("lab")
    (task,) = lab_tasks(["lookup"], 1, 4)
    batch = prepare(processor, task.examples(0), "seen")
    shared = prefill(model, batch, 1)
    for name in ("snapkv", "weave", "weave2"):
        method = kvweave.get_method(name, budget=0.2)
        assert timing._cut(model, batch.inputs, shared, method, method.defer) > 0
        totals = sessions[-1].report["totals"]
        assert totals["kept"] == totals["layers"] * (shared.start // 5)


def test_tables_of_all_methods_take_those_that_are_named():
    named = find("flowmm:fig4").with_methods("snapkv,flowmm:theta=0.3")
    assert list(named.parsed().values()) == [parse_method("snapkv"), parse_method("flowmm:theta=0.3")]
    assert find("flowmm:table3").with_methods("snapkv") is find("flowmm:table3")
    with pytest.raises(ValueError, match="snapkw"):
        named.with_methods("snapkw")


def test_the_paper_stands_beside_its_own_model_and_data_only():
    qwen = "Qwen/Qwen2.5-VL-7B-Instruct"
    assert printed("table1", qwen, "MileBench")["flowmm, ALFRED"] == pytest.approx(0.3543)
    assert printed("table3", qwen, "MileBench")["theta 0.3, ALFRED"] == pytest.approx(0.3543)
    assert printed("table4", qwen, "MileBench")["without both, Spot-the-Diff"] == pytest.approx(0.2524)
    for model, data in (("lab", "MileBench"), (qwen, "")):
        assert printed("table1", model, data) == {}
        assert "paper's numbers" in remark("table1", model, data)
    assert read("table2")["gpu"] == "A100"


def test_the_command_lists_and_refuses(tmp_path: Path):
    listed = CliRunner().invoke(app, ["paper", "--list", "--json"])
    assert set(json.loads(listed.stdout)) == set(RECIPES)
    for arguments, words in (
        (["flowmm:table9"], "paper='flowmm:table9' is unknown"),
        ([], "NAME is missing: allowed is a name"),
        (["flowmm:table1", "--data", str(tmp_path)], str(tmp_path)),
        (["flowmm:table1", "--model", "no/such/folder"], "no/such/folder"),
    ):
        result = CliRunner().invoke(app, ["paper", *arguments, "--out", str(tmp_path / "out"), "--quiet"])
        assert isinstance(result.exception, BadInput), result.output
        assert words in str(result.exception)
        assert not (tmp_path / "out").exists()
