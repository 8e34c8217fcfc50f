"""Folders and files that somebody else wrote: they lead nowhere else, and what is wrong with them is one line."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import kvweave
from inputs import JSON, bomb
from kvweave.evals import Evaluation, Options, lab_tasks, milebench_tasks, run, summarise
from kvweave.evals.run import store
from kvweave.evals.run.plan import parse_methods
from kvweave.evals.tables.outputs import write_outputs
from kvweave.evals.tables.page import write_page

WORDS = "image #1 {image#1} the old lion sleeps near river question: what colour is the star in image #1 ?"
META = {"task_instruction": ["Look."], "question_type": "open-ended"}


def sample(number: int, files: Any) -> dict[str, Any]:
    asked = {"context": WORDS, "images_path": files}
    return {"sample_id": number, "task_instruction_id": 0, "task_instance": asked, "response": "red"}


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A data folder with one task whose samples name these images; `ok.png` is there, and a secret beside it all."""

    def make(*images: Any) -> Path:
        home = tmp_path / "data"
        (home / "ALFRED" / "images").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(home / "ALFRED" / "images" / "ok.png")
        Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
        data = [sample(n, files) for n, files in enumerate(images)]
        (home / "ALFRED" / "ALFRED.json").write_text(json.dumps({"meta_data": META, "data": data}))
        return home

    return make


# -------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    "name", ["../../../secret.png", "x/../ok.png", "..", "nul\0.png", "half \ud800.png", "{outside}/secret.png"]
)
def test_images_may_not_leave_the_folder(folder: Callable[..., Path], tmp_path: Path, name: str):
    home = folder([name.format(outside=tmp_path)])
    with pytest.raises(ValueError, match=r"ALFRED\.json: image .* leaves the folder: allowed is a file in "):
        milebench_tasks(home)


@pytest.mark.parametrize("linked", ["file", "folder", "task"])
def test_links_may_not_leave_the_folder(folder: Callable[..., Path], tmp_path: Path, linked: str):
    home = folder(["inner/secret.png" if linked == "folder" else "secret.png"])
    images = home / "ALFRED" / "images"
    if linked == "file":
        (images / "secret.png").symlink_to(tmp_path / "secret.png")
    elif linked == "folder":
        (images / "inner").symlink_to(tmp_path)
    else:
        shutil.rmtree(images)
        images.symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"image '.*secret.png' leaves the folder"):
        milebench_tasks(home)


def test_links_inside_and_a_linked_folder_are_fine(folder: Callable[..., Path], tmp_path: Path):
    home = folder(["again.png"])
    (home / "ALFRED" / "images" / "again.png").symlink_to(home / "ALFRED" / "images" / "ok.png")
    (tmp_path / "link").symlink_to(home)
    for place in (home, tmp_path / "link"):
        (task,) = milebench_tasks(place)
        assert len(task.samples()) == 1


def test_combined_images_may_not_leave_it_either(folder: Callable[..., Path]):
    home = folder(["ok.png"])
    path = home / "ALFRED" / "ALFRED.json"
    told = json.loads(path.read_text())
    for wrong, words in (
        (["../../../secret.png"], "leaves the folder"),
        ([5], "of file names"),
        ("x", "of file names"),
    ):
        told["data"][0]["task_instance"]["combined_1_images"] = wrong
        path.write_text(json.dumps(told))
        with pytest.raises(ValueError, match=words):
            milebench_tasks(home, options=Options(combined=1))


# -------------------------------------------------------------------- files of questions


@pytest.mark.parametrize("files", [[5], [None], [["ok.png"]], "ok.png", {"0": "ok.png"}, None])
def test_images_are_names_of_files(folder: Callable[..., Path], files: Any):
    with pytest.raises(ValueError, match=r"sample 1 of the file .*looked for a list 'images_path' of file names"):
        milebench_tasks(folder(files))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"data": ' + "9" * 5000 + "}"])
def test_json_that_no_reader_reads(folder: Callable[..., Path], text: str):
    home = folder(["ok.png"])
    (home / "ALFRED" / "ALFRED.json").write_text(text)
    with pytest.raises(ValueError, match=r"ALFRED\.json: (its JSON is nested too deeply|damaged JSON)"):
        milebench_tasks(home)
    (home / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=r"plan\.json is damaged"):
        store.read_json(home / "plan.json")


QUESTIONS = {
    "meta_data": {**META, "kvweave": {"metrics": ["exact"], "max_new_tokens": 3}},
    "data": [sample(0, ["ok.png"])],
}
QUESTIONS["data"][0]["task_instance"] |= {"choice_list": ["red", "blue"], "question": "?"}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in nested JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def changed(value: Any, path: tuple[Any, ...], to: Any, gone: bool) -> Any:
    """A copy with another value at one place, or without it."""
    if not path:
        return to
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if gone:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return value


@given(st.sampled_from(places(QUESTIONS)), JSON, st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_change_is_read_or_refused(folder: Callable[..., Path], place: tuple[Any, ...], to: Any, gone: bool):
    home = folder(["ok.png"])
    path = home / "ALFRED" / "ALFRED.json"
    path.write_text(json.dumps(changed(QUESTIONS, place, to, gone)))
    os.utime(path, ns=(0, hash((place, repr(to), gone)) % 2**60))  # `read` remembers a file by its time
    said = ""
    try:
        for task in milebench_tasks(home):
            json.dumps([task.to_dict(), task.metrics, task.max_new_tokens])
            assert all(isinstance(example.answer, str) for example in task.examples(0))
    except ValueError as refused:
        said = str(refused)
    assert len(said.splitlines()) <= 1
    assert len(said) < 1000


# -------------------------------------------------------------------- results


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    evaluation = Evaluation("lab", lab_tasks(["lookup"], 1, 1), parse_methods(["snapkv"]), (0.5,))
    out = tmp_path_factory.mktemp("eval")
    run(evaluation, out)
    return evaluation, out


@pytest.mark.parametrize("entry", ["failed", "samples", "missing", "seconds", "cell", "metrics"])
def test_a_cell_without_an_entry_is_named(evaluated: tuple[Evaluation, Path], tmp_path: Path, entry: str):
    evaluation, done = evaluated
    out = shutil.copytree(done, tmp_path / "out")
    path = next((out / "cells").glob("*snapkv*"))
    told = json.loads(path.read_text())
    del told[entry]
    path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=f"snapkv.*json is damaged: '{entry}' is missing; delete it"):
        run(evaluation, out)


@given(st.data(), JSON, st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
def test_any_cell_is_read_or_refused(evaluated: tuple[Evaluation, Path], data: Any, to: Any, gone: bool):
    evaluation, out = evaluated
    path = next((out / "cells").glob("*snapkv*"))
    whole = path.read_text()
    found = json.loads(whole)
    place = data.draw(
        st.sampled_from([(), *((name,) for name in found), *(("samples", 0, x) for x in found["samples"][0])])
    )
    path.write_text(json.dumps(changed(found, place, to, gone)))
    try:
        summarise(evaluation, run(evaluation, out))
    except ValueError as refused:
        assert path.name in str(refused)  # noqa: PT017
    finally:
        path.write_text(whole)


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"tasks": 3}', "[" * 100_000])
def test_a_plan_that_is_none(evaluated: tuple[Evaluation, Path], tmp_path: Path, text: str):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=r"plan\.json is damaged|holds results of other options"):
        evaluated[0].claim(tmp_path)


# -------------------------------------------------------------------- pictures


@pytest.mark.parametrize("kind", ["no picture", "too large"])
def test_a_first_image_that_cannot_be_read_costs_its_own_sample_only(
    folder: Callable[..., Path], tmp_path: Path, kind: str
):
    home = folder(["bad.png"], ["ok.png"])
    bad = home / "ALFRED" / "images" / "bad.png"
    if kind == "no picture":
        bad.write_text("words")
    else:
        bomb(bad)
    tasks = milebench_tasks(home, options=Options(max_new_tokens=3))
    evaluation = Evaluation("lab", tasks, parse_methods(["snapkv"]), (0.5,))
    results = run(evaluation, tmp_path / "out", batch=2)
    summary = summarise(evaluation, results)
    assert {failure["id"] for failure in summary["failed"]} == {"ALFRED/0/0"}
    assert all(("cannot be read" if kind == "no picture" else "pixels") in one["error"] for one in summary["failed"])
    page = write_page(evaluation, summary, tmp_path / "out", samples=1).read_text()
    assert WORDS.rpartition("{image#1}")[2].split("question: ")[1] in page  # the second sample is shown
    assert write_outputs(evaluation, results, tmp_path / "out") is not None


def test_a_page_without_its_samples_says_so(folder: Callable[..., Path], tmp_path: Path):
    home = folder(["ok.png"])
    evaluation = Evaluation("lab", milebench_tasks(home), parse_methods(["snapkv"]), (0.5,))
    summary = _empty(evaluation)
    (home / "ALFRED" / "images" / "ok.png").write_text("gone bad")
    with pytest.warns(UserWarning, match="No sample could be shown: PictureError"):
        page = write_page(evaluation, summary, tmp_path / "out", samples=1)
    assert "No sample could be shown" in page.read_text()


def _empty(evaluation: Evaluation) -> dict[str, Any]:
    cells = [
        {
            "cell": cell.key,
            "metrics": list(cell.task.metrics),
            "samples": [],
            "failed": [],
            "missing": 0,
            "equal": None,
        }
        | {"batch": 1, "cpu": "", "device": "cpu", "seconds": 0.0}
        for cell in evaluation.cells()
    ]
    return summarise(evaluation, cells)


# -------------------------------------------------------------------- what tells results apart


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("package") / "kvweave"
    ours = Path(kvweave.__file__).parent
    for path in (*ours.rglob("*.py"), *ours.glob("profiles/*.json")):
        (home / path.relative_to(ours)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, home / path.relative_to(ours))
    return home


def marks_after(package: Path, name: str, *also: str) -> bool:
    """Whether a change to a file, made if it is not there, is another mark."""
    path = package / name
    before, whole = store.code_mark(*also, home=package), path.read_bytes() if path.exists() else None
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((whole or b"") + b"\n# changed\n")
    after = store.code_mark(*also, home=package)
    path.unlink() if whole is None else path.write_bytes(whole)
    return before != after


def test_the_mark_is_that_of_the_package(package: Path):
    assert store.code_mark(home=package) == store.code_mark()


@pytest.mark.parametrize(
    "name",
    [
        *("evals/scores/metrics.py", "evals/scores/milebench.py", "evals/scores/words.py", "evals/scores/new.py"),
        *("evals/answer/answering.py", "evals/tasks/tasks.py", "evals/run/worker.py", "evals/new/any.py"),
        *("methods/snapkv.py", "ops/merge.py", "seam/layer.py", "cut/rows.py", "memory/slots.py", "lab/world.py"),
        *("models/chat.py", "plan.py", "view.py", "new.py"),
    ],
)
def test_what_decides_answers_and_scores_changes_the_mark(package: Path, name: str):
    assert marks_after(package, name)


@pytest.mark.parametrize("name", ["cli/run.py", "report/page.py", "evals/tables/page.py", "evals/paper/recipes.py"])
def test_what_lays_them_out_does_not(package: Path, name: str):
    assert not marks_after(package, name)


def test_what_a_paper_measures_itself_is_its_own(package: Path):
    assert marks_after(package, "evals/paper/timing.py", "evals/paper")


def test_files_that_are_taken_apart_are_told_apart(package: Path):
    one, two = package / "one.py", package / "two.py"
    marks = set()
    for first, second in ((b"a", b"b"), (b"ab", b""), (b"", b"ab")):
        one.write_bytes(first)
        two.write_bytes(second)
        marks.add(store.code_mark(home=package))
    one.unlink()
    two.unlink()
    assert len(marks) == 3
