"""`kvweave run`, as a person would type it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import kvweave
from kvweave import models
from kvweave.lab import example

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(kvweave.__file__).parents[1])}


def test_help_lists_the_commands() -> None:
    command = [sys.executable, "-m", "kvweave", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    for name in ("run", "eval", "flow", "methods", "lab"):
        assert re.search(rf"^\W*{name}\b", done.stdout, re.MULTILINE)


def test_run_from_a_shell(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvweave", "run", "--images", "3", "--repeats", "1", "--long", "0", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=ENVIRONMENT)
    told = json.loads(done.stdout)
    assert told["full"]["right"] is True
    assert told["full"]["text"] == told["right"]
    assert told["command"] == "kvweave run --images 3 --repeats 1 --long 0 --json"
    assert sorted(file.name for file in (tmp_path / "out/run").iterdir()) == ["report.json", "run.html", "run.png"]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["run"]  # nothing temporary is left


def test_answers_numbers_and_files(kvweave, tmp_path: Path) -> None:
    done = kvweave(
        "run",
        "--images",
        4,
        "--repeats",
        2,
        "--long",
        600,
        "--method",
        "flowmm:theta=0.5",
        "--method",
        "snapkv:budget=16",
    )
    assert done.code == 0
    told = json.loads((tmp_path / "out/run/report.json").read_text())
    sample = example(4, task="image_needle")
    assert told["right"] == sample.answer
    assert sample.answer in done.out
    assert [method["method"] for method in told["methods"]] == ["flowmm:budget=0.2,theta=0.5", "snapkv:budget=16"]
    flowmm, snapkv = told["methods"]
    length = told["prompt"]["tokens"]
    for layer in flowmm["layers"]:
        assert layer["kept"] == int(0.2 * length)
        assert layer["kept"] + layer["merged"] + layer["evicted"] == length
        assert layer["bytes"] / layer["bytes_before"] == pytest.approx(layer["kept"] / length)
        assert f"{layer['flow']:.3f}" in done.out
    assert [layer["kept"] for layer in snapkv["layers"]] == [16] * 4
    assert flowmm["cache_bytes"] == sum(layer["bytes"] for layer in flowmm["layers"])
    assert told["full"]["cache_bytes"] == sum(layer["bytes_before"] for layer in flowmm["layers"])
    assert flowmm["speed"]["repeats"] == 2
    assert flowmm["speed"]["steps"] == 2 * (flowmm["tokens"] - 1)
    assert flowmm["peak_bytes"] < told["full"]["peak_bytes"] == told["full"]["cache_bytes"]
    assert told["long"]["length"] == 600
    assert [speed["steps"] for speed in told["long"]["speeds"]] == [
        15
    ] * 3  # full, flowmm, snapkv; no answer ends early
    assert "behind 600" in done.out
    page = (tmp_path / "out/run/run.html").read_text()
    for wanted in (
        sample.answer,
        "flowmm:budget=0.2,theta=0.5",
        f"{flowmm['layers'][0]['flow']:.3f}",
        told["machine"],
    ):
        assert wanted in page
    with Image.open(tmp_path / "out/run/run.png") as drawn:
        assert drawn.width == 1600
        drawn.load()


def test_the_full_method_keeps_everything(kvweave) -> None:
    done = kvweave("run", "--images", 2, "--repeats", 1, "--long", 0, "--method", "full", "--json")
    told = json.loads(done.out)
    assert told["methods"][0]["text"] == told["full"]["text"]
    assert told["methods"][0]["cache_bytes"] == told["full"]["cache_bytes"]


def test_own_images_and_prompt(kvweave, picture: Path) -> None:
    other = picture.with_name("other.jpg")
    Image.new("L", (30, 90), 90).save(other)
    asked = ("--image", picture, "--image", other, "--prompt", "What colour is the star in <b>image</b>?")
    done = kvweave("run", *asked, "--repeats", 1, "--long", 0, "--max-new-tokens", 4, "--out", "made/here")
    assert done.code == 0
    told = json.loads(Path("made/here/report.json").read_text())
    assert told["prompt"]["visual"] == 50
    assert told["right"] is None
    assert told["full"]["tokens"] <= 4
    assert any("not in the model's vocabulary" in note for note in told["notes"])
    page = Path("made/here/run.html").read_text()
    assert "<b>image</b>" not in page  # what the user typed is text
    assert "&lt;b&gt;image&lt;/b&gt;" in page


@pytest.mark.parametrize(
    "asked", [("--prompt", "image"), ("--image", "picture.png")], ids=["text only", "images only"]
)
def test_one_modality_alone(kvweave, picture: Path, asked: tuple[str, ...]) -> None:
    assert kvweave("run", *asked, "--repeats", 1, "--long", 0, "--max-new-tokens", 2).code == 0


def test_a_long_text_needs_words(kvweave, picture: Path) -> None:
    done = kvweave("run", "--image", picture, "--repeats", 1, "--long", 64)
    assert done.code == 2
    assert "--long: long=64 is not allowed with a prompt that has no words to repeat: allowed is 0" in done.err


def test_an_older_run_is_replaced_and_other_files_stay(kvweave, tmp_path: Path) -> None:
    folder = tmp_path / "out/run"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    (folder / "report.json").write_text("old")
    assert kvweave("run", "--images", 1, "--task", "lookup", "--repeats", 1, "--long", 0).code == 0
    assert (folder / "mine.txt").read_text() == "mine"
    assert json.loads((folder / "report.json").read_text())["model"] == "lab"


def test_nothing_is_half_written(kvweave, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: object) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr("kvweave.report.picture.png", fail)
    done = kvweave("run", "--images", 1, "--task", "lookup", "--repeats", 1, "--long", 0)
    assert done.code == 1
    assert done.err.strip().splitlines()[-1].startswith("kvweave: unexpected RuntimeError: no ink")
    assert not any((tmp_path / "out").iterdir())


def test_a_text_only_checkpoint_is_loaded_openly(kvweave, text_model: Path, picture: Path) -> None:
    done = kvweave("run", "--model", text_model, "--prompt", "code of eagle is tango mike", "--max-new-tokens", 3)
    assert done.code == 0
    assert "reads text only" in done.err
    done = kvweave("run", "--model", text_model, "--image", picture)
    assert done.code == 2
    assert "takes no images" in done.err


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained decoder with the lab's words."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("text")
    config = LlamaConfig(
        vocab_size=160, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(models.check("lab"))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder
