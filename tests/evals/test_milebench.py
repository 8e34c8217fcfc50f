"""MileBench from a disk: prompts, truncation, bad folders; and the same scores either way."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kvweave.evals import Evaluation, lab_tasks, run, summarise
from kvweave.evals.run.plan import parse_methods
from kvweave.evals.run.results import Result
from kvweave.evals.tables.outputs import write_outputs
from kvweave.evals.tasks.export import export
from kvweave.evals.tasks.milebench import IMAGE, MileBenchTask, Options, milebench_tasks
from kvweave.evals.tasks.questions import read


def write(
    home: Path,
    name: str,
    data: list[dict[str, Any]],
    instructions: Any = ("Look.",),
    kind: str = "open-ended",
    **more: Any,
) -> Path:
    """A task's folder; samples name their images, which are drawn."""
    folder = home / name
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for sample in data:
        for file in sample["task_instance"]["images_path"]:
            Image.new("RGB", (8, 8), (10, 200, 30)).save(folder / "images" / file)
    meta = {"task_instruction": instructions, "question_type": kind, **more}
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"meta_data": meta, "data": data}, indent=1))
    return path


def sample(number: int, context: str, images: int, response: str = "red", **asked: Any) -> dict[str, Any]:
    files = [f"{number}-{n}.jpg" for n in range(images)]
    return {
        "sample_id": number,
        "task_instruction_id": 0,
        "task_instance": {"context": context, "images_path": files, **asked},
        "response": response,
        "image_quantity_level": "Few",
    }


def only(home: Path, **options: Any) -> Any:
    (task,) = milebench_tasks(home, options=Options(**options))
    (found,) = task.samples()
    return found


# -------------------------------------------------------------------- prompts


def test_a_prompt_as_it_is_composed(tmp_path: Path):
    write(tmp_path, "CLEVR-Change", [sample(7, "{image#1}{image#2}Difference:", 2)], ["Explain. \n"])
    (task,) = milebench_tasks(tmp_path)
    (found,) = task.samples()
    assert found.prompt == f"Explain. \n\n{IMAGE}{IMAGE}Difference:"
    assert [Path(image).name for image in found.images] == ["7-0.jpg", "7-1.jpg"]
    (example,) = task.examples(0)
    (turn,) = example.messages
    assert [piece["type"] for piece in turn["content"]] == ["text", "image", "image", "text"]
    assert (example.question, example.answer, example.id) == ("Difference:", "red", "CLEVR-Change/0/7")
    assert task.metrics == ("milebench_rouge", "strict_rouge")
    assert task.max_new_tokens == 512


@pytest.mark.parametrize(("name", "line"), [("Movie", "A. up\nB. down"), ("GPR1200", "up\ndown")])
def test_choices_are_listed_with_letters_but_for_one_task(tmp_path: Path, name: str, line: str):
    asked = sample(0, "{table#1}Where?", 1, "up", choice_list=["up", "down"])
    write(tmp_path, name, [asked], {"0": "Pick."}, kind="multi-choice")
    assert only(tmp_path).prompt == f"Pick.\n{IMAGE}Where?\nChoice list: \n{line}\nYour answer is: "
    (task,) = milebench_tasks(tmp_path, options=Options(scoring="strict"))
    assert task.metrics == ("strict_choice", "milebench_choice")
    (example,) = task.examples(0)
    assert example.choices == ("up", "down")


def test_combined_images_stand_in_front(tmp_path: Path):
    asked = sample(3, "First {image#1}, then {image#2}: what?", 2, combined_1_images=["3-all.jpg"])
    write(tmp_path, "ALFRED", [asked])
    (tmp_path / "ALFRED" / "combined_1_images").mkdir()
    Image.new("RGB", (16, 8)).save(tmp_path / "ALFRED" / "combined_1_images" / "3-all.jpg")
    found = only(tmp_path, combined=1)
    assert found.prompt == f"{IMAGE}\nLook.\nFirst <Image 1> , then <Image 2> : what?"
    assert [Path(image).name for image in found.images] == ["3-all.jpg"]
    with pytest.raises(ValueError, match=r"looked for <Task>/<Task>_combined_2.json, found ALFRED/"):
        milebench_tasks(tmp_path, options=Options(combined=2))


def test_adversarial_questions_have_a_file_of_their_own(tmp_path: Path):
    path = write(tmp_path, "DocVQA", [sample(0, "{image#1}a?", 1)])
    other = write(tmp_path / "else", "DocVQA", [sample(0, "{image#1}b?", 1)])
    path.with_name("DocVQA-adv.json").write_text(other.read_text())
    assert only(tmp_path, adversarial=True).prompt.endswith("b?")
    assert (
        milebench_tasks(tmp_path)[0].to_dict()["mark"]
        != milebench_tasks(tmp_path, options=Options(adversarial=True))[0].to_dict()["mark"]
    )


def test_images_and_places_that_do_not_match(tmp_path: Path):
    write(tmp_path, "IEdit", [sample(0, "what {image#1}?", 2), sample(1, "{image#1}{image#1} what?", 1)])
    (task,) = milebench_tasks(tmp_path)
    more, fewer = task.examples(0)
    assert [piece["type"] for piece in more.messages[0]["content"]] == ["text", "image", "text", "image", "text"]
    assert not more.error
    assert fewer.error == "1 images for 2 places in its text"


class Words:
    """A tokenizer of words."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[str]]:
        return {"input_ids": text.split()}

    def decode(self, tokens: list[str]) -> str:
        return " ".join(tokens)


@pytest.mark.parametrize(
    ("limit", "expected", "kept"),
    [
        (100, f"a b{IMAGE}c d{IMAGE}e f", 2),
        (17, f"a b{IMAGE}c d{IMAGE}e f", 2),  # 1 + 2 + 5 + 2 + 5 + 2
        (16, f"{IMAGE}c d{IMAGE}e f", 2),
        (14, f"c d{IMAGE}e f", 1),
        (9, f"{IMAGE}e f", 1),
        (7, "e f", 0),
        (2, "f", 0),
    ],
)
def test_the_official_truncation_keeps_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, expected: str, kept: int
):
    monkeypatch.setattr("kvweave.evals.tasks.milebench._tokenizer", lambda model: Words())
    write(tmp_path, "ALFRED", [sample(0, "a b{image#1}c d{image#2}e f", 2)])
    found = only(tmp_path, truncation="official", max_context_len=limit, tokens_per_image=5)
    assert found.prompt == f"Look.\n{expected}"
    assert [Path(image).name for image in found.images] == ["0-0.jpg", "0-1.jpg"][2 - kept :]


# -------------------------------------------------------------------- bad input


def refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    for word in words:
        assert word in str(error.value)


def test_folders_that_are_not_milebench(tmp_path: Path):
    refused(lambda: milebench_tasks(tmp_path / "gone"), "gone' does not exist", "allowed is a folder")
    refused(lambda: milebench_tasks(tmp_path), "looked for <Task>/<Task>.json, found nothing")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "pictures").mkdir()
    refused(lambda: milebench_tasks(tmp_path), "found notes.txt, pictures/")
    write(tmp_path / "data", "ALFRED", [sample(0, "{image#1}?", 1)])
    refused(lambda: milebench_tasks(tmp_path / "data" / "ALFRED"), "one task's folder: try", "images/")
    refused(lambda: milebench_tasks(tmp_path / "data", ["ALFERD"]), "tasks='ALFERD' is unknown", "ALFRED")


def test_missing_images_name_their_sample(tmp_path: Path):
    path = write(tmp_path, "ALFRED", [sample(4, "{image#1}?", 1), sample(5, "{image#1}{image#2}?", 2)])
    (path.parent / "images" / "5-1.jpg").unlink()
    refused(lambda: milebench_tasks(tmp_path), "ALFRED: sample_id 5 has an image that is not there", "5-1.jpg")
    assert len(milebench_tasks(tmp_path, options=Options(count=1))[0].samples()) == 1


def test_damaged_files_name_their_line(tmp_path: Path):
    path = write(tmp_path, "ALFRED", [sample(0, "{image#1}?", 1)])
    whole = path.read_text()
    path.write_text(whole.replace('"sample_id": 0,', '"sample_id": 0'))
    line = whole[: whole.index('"task_instruction_id"')].count("\n") + 1
    refused(lambda: read(path), f"ALFRED.json, line {line}", "damaged JSON")
    for old, new, words in (
        ('"response": "red"', '"reply": "red"', "looked for response"),
        ('"context"', '"text"', "looked for task_instance with a string 'context'"),
        ('"images_path"', '"images"', "list 'images_path'"),
        ('"task_instruction_id": 0', '"task_instruction_id": 3', "task_instruction has no entry 3"),
        ('"data"', '"samples"', "a list 'data'"),
        ('"task_instruction":', '"instructions":', "'task_instruction'"),
    ):
        path.write_text(whole.replace(old, new))
        refused(lambda: read(path), "ALFRED.json", words)
    path.write_bytes(whole.encode().replace(b"red", b"\xff"))
    refused(lambda: read(path), f"line {whole[: whole.index('red')].count(chr(10)) + 1}: no UTF-8")


def test_unknown_kinds_metrics_and_options_are_refused(tmp_path: Path):
    write(tmp_path, "Other", [sample(0, "{image#1}?", 1)], kind="essay")
    refused(lambda: milebench_tasks(tmp_path), "question_type='essay' has no metric")
    write(tmp_path, "Other", [sample(0, "{image#1}?", 1)], kvweave={"metrics": ["bleu"]})
    refused(lambda: milebench_tasks(tmp_path), "metrics='bleu' is unknown")
    refused(lambda: Options(scoring="lenient"), "scoring='lenient' is unknown")
    refused(lambda: Options(truncation="right"), "truncation='right' is unknown")
    refused(lambda: Options(count=0), "count=0 is not allowed")


# -------------------------------------------------------------------- the lab's questions, either way


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("lab")
    for task in lab_tasks(["text_needle", "change"], 3, 6):
        export(task, home, seed=2)
    return home


def evaluated(tasks: Any, out: Path, **options: Any) -> tuple[Evaluation, list[Result]]:
    plan = Evaluation(
        "lab", tuple(tasks), parse_methods(["snapkv"]), (0.3,), (2,), protocols=("seen", "unseen"), **options
    )
    return plan, run(plan, out)


@pytest.fixture(scope="module")
def read_back(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, list[Result], Path]:
    out = tmp_path_factory.mktemp("eval")
    tasks = milebench_tasks(exported, ["text_needle", "change"])
    return *evaluated(tasks, out), out


def test_exported_questions_score_the_same(read_back: tuple[Evaluation, list[Result], Path], tmp_path: Path):
    plan, results, _ = read_back
    drawn, expected = evaluated(lab_tasks(["text_needle", "change"], 3, 6), tmp_path)
    mine, theirs = summarise(plan, results), summarise(drawn, expected)
    assert mine["means"] == theirs["means"]
    for one, other in zip(results, expected, strict=True):
        assert one["cell"] == other["cell"]
        pairs = zip(one["samples"], other["samples"], strict=True)
        assert all(a["prediction"] == b["prediction"] and a["kept"] == b["kept"] for a, b in pairs)
    assert mine["means"][0]["score"] == 1


def test_the_output_is_laid_out_for_its_own_scorer(read_back: tuple[Evaluation, list[Result], Path]):
    plan, results, out = read_back
    folder = write_outputs(plan, results, out)
    assert folder == out / "outputs"
    home = folder / "lab-snapkv-0.3-seen" / "text_needle"
    said = json.loads((home / "pred.json").read_text())
    (result,) = (r for r in results if r["cell"] | {"seed": 0} == {
        "protocol": "seen", "task": "text_needle", "seed": 0, "method": "snapkv", "budget": 0.3
    })  # fmt: skip
    assert [one["sample_id"] for one in said] == list(range(3))
    assert [one["pred_response"] for one in said] == [one["prediction"] for one in result["samples"]]
    assert set(said[0]) == {
        *("sample_id", "image", "question", "gt_response", "gen_model_id", "pred_response", "gen_kwargs")
    }
    assert said[0]["question"].count(IMAGE) == len(said[0]["image"]) == 6
    scores = [float(one["score"]) for one in json.loads((home / "eval_score.json").read_text())]
    found = json.loads((home / "eval.json").read_text())
    assert found["Rouge-L f"] == pytest.approx(sum(scores) / 3, abs=1e-3)
    assert found["image_quantity_level-Result"]["Medium"][1] == 3
    assert json.loads((folder / "result.json").read_text())["lab-snapkv-0.3-seen"]
    lines = (folder / "result.csv").read_text().splitlines()
    assert lines[0] == "Model,text_needle (Rouge-L f),change (Rouge-L f)"
    assert len(lines) == 1 + 4


def test_a_sample_that_cannot_be_asked_fails_alone(tmp_path: Path):
    words = "image #1 {image#1} the old lion sleeps near river question: what colour is the star in image #1 ?"
    broken = sample(1, "image #1 {image#1} {image#2} " + words, 1)
    write(tmp_path, "ALFRED", [sample(0, words, 1), broken, sample(2, words, 1)])
    plan = Evaluation("lab", milebench_tasks(tmp_path, options=Options(max_new_tokens=4)), parse_methods(["full"]))
    results = run(plan, tmp_path / "out")
    (failed,) = summarise(plan, results)["failed"]
    assert failed["id"] == "ALFRED/0/1"
    assert "1 images for" in failed["error"]
    folder = write_outputs(plan, results, tmp_path / "out")
    assert folder is not None
    home = folder / "lab-full-1.0-seen" / "ALFRED"
    assert [one["sample_id"] for one in json.loads((home / "pred.json").read_text())] == [0, 2]
    assert not (home / "eval.json").exists()


def test_a_changed_file_is_another_plan(exported: Path, tmp_path: Path):
    tasks = milebench_tasks(exported, ["change"], Options(count=1))
    plan = Evaluation("lab", tasks, parse_methods(["full"]))
    plan.claim(tmp_path)
    other = Evaluation("lab", (MileBenchTask("change", str(exported), Options(count=2)),), parse_methods(["full"]))
    with pytest.raises(ValueError, match=r'tasks .*"count": 1.* there, .*"count": 2'):
        other.claim(tmp_path)
