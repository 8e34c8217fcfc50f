"""`kvweave methods`, `flow` and `lab`."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import kvweave as library
from kvweave.cli.console import writing
from kvweave.methods.allocation import Profile


def test_methods_lists_them_all(kvweave) -> None:
    listed = json.loads(kvweave("methods", "--json").out)["methods"]
    assert [told["name"] for told in listed] == library.list_methods()
    for told in listed:
        assert told["summary"].endswith(".")
        assert told["name"] in kvweave("methods").out
        for option in told["options"]:
            assert option.keys() == {"name", "default", "allowed", "help"}


def test_one_method_in_detail(kvweave) -> None:
    told = json.loads(kvweave("methods", "snapkv", "--json").out)
    assert {option["name"]: option["default"] for option in told["options"]} == {
        "budget": 0.2,
        "window": 32,
        "kernel": 5,
    }
    shown = kvweave("methods", "snapkv").out
    for words in ("window", "an int >= 1", "an odd int >= 1"):
        assert words in shown


def test_flow_of_the_example(kvweave, tmp_path: Path) -> None:
    done = kvweave("flow", "--images", 3, "--theta", 0.4, "--json")
    told = json.loads(done.out)
    assert told == json.loads((tmp_path / "out/flow/flow.json").read_text())
    assert len(told["layers"]) == 4
    for layer in told["layers"]:
        assert 0 < layer["literal"] < 1
        assert layer["scope"] == ("cross" if layer["literal"] > 0.4 else "intra")
    with Image.open(tmp_path / "out/flow/flow.png") as drawn:
        drawn.load()
    shown = kvweave("flow", "--images", 3).out
    assert f"{told['layers'][0]['literal']:.3f}" in shown


@pytest.mark.parametrize("asked", [["--prompt", "?"], ["--image", "picture.png"]], ids=["text only", "images only"])
def test_flow_of_one_modality(kvweave, picture: Path, asked: list[str]) -> None:
    assert kvweave("flow", *asked, "--json").code == 0


def test_lab_eval(kvweave, tmp_path: Path) -> None:
    asked = ("lab", "eval", "--count", 2, "--images", 3, "--task", "lookup", "--task", "text_needle")
    told = json.loads(kvweave(*asked, "--json").out)
    assert told == json.loads((tmp_path / "out/lab-eval/scores.json").read_text())
    assert set(told["scores"]["3"]) == {"lookup", "text_needle"}
    assert "1.000" in kvweave(*asked).out


def test_lab_example(kvweave, tmp_path: Path) -> None:
    told = json.loads(kvweave("lab", "example", "--images", 2, "--task", "change", "--json").out)
    sample = library.lab.example(2, task="change")
    assert told["answer"] == sample.answer
    pictures = [piece["image"] for piece in told["content"] if "image" in piece]
    for name, picture in zip(pictures, sample.images, strict=True):
        with Image.open(tmp_path / "out/example" / name) as saved:
            assert saved.tobytes() == picture.tobytes()


def test_lab_train_passes_everything_on(kvweave, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def train(out: Path, seed: int, device: str, **options: Any) -> dict[str, Any]:
        seen.update(out=out, seed=seed, device=device, resume=options["resume"], start=options["start"])
        options["on_step"]({"step": 1, "loss": 1.0, "accuracy": dict.fromkeys(library.lab.TASKS, 0.5)})
        return {"steps": 1, "already_finished": False, "accuracy": {}}

    monkeypatch.setattr("kvweave.lab.train.train", train)
    told = json.loads(kvweave("lab", "train", "--seed", 3, "--device", "cpu", "--resume", "--json").out)
    assert told["steps"] == 1
    assert seen == {"out": Path("out/lab"), "seed": 3, "device": "cpu", "resume": True, "start": None}
    assert kvweave("lab", "train", "--world", "large").code == 0
    assert seen["start"] == library.lab.weights_path()


def test_lab_train_refuses_what_it_cannot_start_from(kvweave) -> None:
    for options, words in (
        (("--world", "huge"), "--world 'huge' is unknown: allowed is one of small, large"),
        (("--start", "nowhere"), "start 'nowhere' is not allowed: allowed is a folder"),
    ):
        done = kvweave("lab", "train", *options)
        assert done.code == 2
        assert words in " ".join(done.err.split())


def test_lab_train_does_not_overwrite(kvweave, tmp_path: Path) -> None:
    (tmp_path / "out/lab").mkdir(parents=True)
    (tmp_path / "out/lab/checkpoint.pt").write_bytes(b"precious")
    done = kvweave("lab", "train")
    assert done.code == 2
    assert "out/lab" in done.err
    assert "resume" in done.err


def test_files_appear_together_or_not_at_all(tmp_path: Path) -> None:
    def write(folder: Path, fail: bool) -> None:
        with writing(folder) as partial:
            (partial / "a").write_text("new")
            if fail:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "deep/out", fail=True)
    assert not list((tmp_path / "deep").iterdir())
    write(tmp_path / "deep/out", fail=False)
    assert (tmp_path / "deep/out/a").read_text() == "new"


def test_stopping_is_no_error(kvweave, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvweave.lab.train.train", train)
    done = kvweave("lab", "train")
    assert done.code == 130
    assert done.err.strip().splitlines()[-1] == "kvweave: stopped"


def test_calibrate_makes_a_profile(kvweave, tmp_path: Path) -> None:
    ended = kvweave("calibrate", "--model", "lab", "--prompts", 2, "--out", "made/lab.json", "--json")
    told = json.loads(ended.out)
    assert (ended.code, told["prompts"]) == (0, 2)
    assert (told["layers"], told["kv_heads"]) == Profile.read("made/lab.json").shape
    spelled = "snapkv:allocation=profile,profile=made/lab.json"
    assert kvweave("run", "--model", "lab", "--method", spelled, "--json").code == 0
    refused = kvweave("calibrate", "--out", "made")
    assert (refused.code, "--out 'made' is a folder" in refused.err) == (2, True)
    refused = kvweave("calibrate", "--lessons", 20)
    assert (refused.code, "--lessons 20 is of --fit, which is 0" in refused.err) == (2, True)
    assert kvweave("calibrate", "--fit", 2, "--lessons", 3).code == 2  # before anything is read
    ended = kvweave("calibrate", "--prompts", 1, "--fit", 2, "--lessons", 14, "--out", "made/fitted.json")
    assert (ended.code, "KL at 20%, held-out replies:" in ended.out) == (0, True)
    assert kvweave("run", "--method", "weave:profile=made/fitted.json", "--json").code == 0
    refused = kvweave("calibrate", "--text", "none.txt")
    assert (refused.code, "none.txt" in refused.err) == (2, True)
