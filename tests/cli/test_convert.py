"""`kvweave convert`, and `--model` with folders that transformers does not read by itself."""

import json
import os
import subprocess
import sys

import pytest
import torch
from published_folders import edit, write_internvl, write_mobilevlm
from test_published_inputs import picture, user
from test_published_weights import internvl_inputs, mobilevlm_inputs
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from kvweave import models


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch):
    """Whoever asks on stdin, or runs a checkpoint's code, fails the test."""

    def refuse(*_):
        raise AssertionError("asked on stdin")

    monkeypatch.setattr("builtins.input", refuse)


def write(folder, kind):
    write_mobilevlm(folder) if kind == "mobilevlm" else write_internvl(folder, kind)
    for name in ("configuration_internvl_chat", "modeling_internvl_chat", "tokenization_internlm2"):
        (folder / f"{name}.py").write_text("raise AssertionError('ran')\n")


KINDS = ["internlm2", "qwen2", "mobilevlm"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_auto_classes_load_what_was_converted(tmp_path, kvweave, kind):
    write(tmp_path / "model", kind)
    (tmp_path / "out").mkdir()
    ended = kvweave("convert", "model", "out", "--json")
    assert ended.code == 0, ended.err
    before = models.from_published(tmp_path / "model")
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert json.loads(ended.out)["parameters"] == after.num_parameters() == before.num_parameters()
    inputs = (mobilevlm_inputs if kind == "mobilevlm" else internvl_inputs)(before)
    with torch.no_grad():
        assert torch.equal(after(**inputs).logits, before(**inputs).logits)
    assert after.config.image_token_id == before.config.image_token_id
    assert after.generation_config.eos_token_id == before.generation_config.eos_token_id
    first, second = (
        models.processor_from_published(tmp_path / "model"),
        AutoProcessor.from_pretrained(tmp_path / "out", backend="pil"),  # as the original, torchvision or not
    )
    assert type(first) is type(second)
    asked = [user(picture(90, 60), picture(60, 90), "What is  this?")]
    mine, theirs = models.encode(first, asked), models.encode(second, asked)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    if kind == "mobilevlm":
        with pytest.raises(ValueError, match="backend='torchvision' is not allowed"):
            AutoProcessor.from_pretrained(tmp_path / "out", backend="torchvision")
    loaded, processor = models.load(str(tmp_path / "out"))
    assert type(loaded) is type(before)
    assert type(processor) is type(first)


def test_a_decoder_is_written_alone(tmp_path, kvweave):
    write(tmp_path / "model", "qwen2")
    ended = kvweave("convert", "model", "out", "--decoder", "--json")
    assert ended.code == 0, ended.err
    said = json.loads(ended.out)
    assert said["model"] == "Qwen2ForCausalLM"
    assert said["tokenizer"]
    before, after = models.load(str(tmp_path / "model")), models.load(str(tmp_path / "out"))
    ids = before[1].tokenizer("What is  this?", return_tensors="pt")
    assert after[1]("What is  this?", return_tensors="pt")["input_ids"].tolist() == ids["input_ids"].tolist()
    with torch.no_grad():
        assert torch.allclose(after[0](**ids).logits, before[0](**ids).logits, atol=1e-5)
    ended = kvweave("convert", "lab", "lab-decoder", "--decoder")
    assert ended.code == 2
    assert "SOURCE: its TokenizersBackend is read back as a Qwen2Tokenizer" in ended.err
    ended = kvweave("convert", "lab", "lab-decoder", "--decoder", "--no-tokenizer")
    assert ended.code == 0, ended.err
    assert "lab-decoder, a Qwen2ForCausalLM" in ended.out
    assert not (tmp_path / "lab-decoder" / "tokenizer.json").exists()


def test_transformers_alone_reads_a_converted_internvl(tmp_path, kvweave):
    """In a process that never imports kvweave: model and processor, to the same answer."""
    write(tmp_path / "model", "internlm2")
    assert kvweave("convert", "model", "out").code == 0
    picture(90, 60).save(tmp_path / "shown.png")
    asked = [user("", "What is  this?")]
    asked[0]["content"][0] = {"type": "image", "image": str(tmp_path / "shown.png")}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    (tmp_path / "ask.py").write_text(
        "import json, sys, transformers as t\n"
        "model = t.AutoModelForImageTextToText.from_pretrained('out')\n"
        "processor = t.AutoProcessor.from_pretrained('out')\n"
        "options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors='pt')\n"
        "inputs = processor.apply_chat_template(json.load(open('asked.json')), **options)\n"
        "assert 'kvweave' not in sys.modules\n"
        "print(model.generate(**inputs, max_new_tokens=5)[0].tolist())\n"
    )
    ran = subprocess.run([sys.executable, "ask.py"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ran.returncode == 0, ran.stderr
    model, processor = models.load(str(tmp_path / "model"))
    mine = model.generate(**models.encode(processor, asked), max_new_tokens=5)[0].tolist()
    assert json.loads(ran.stdout) == mine


@pytest.mark.parametrize("kind", KINDS)
def test_run_answers_from_a_published_folder(tmp_path, kvweave, kind):
    write(tmp_path / "model", kind)
    ended = kvweave(
        "run", "--model", "model", "--images", "2", "--max-new-tokens", "3", "--method", "snapkv", "--budget", "0.2",
        "--out", "page", "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["model"] == "model"
    assert (tmp_path / "page" / "run.html").is_file()


def test_a_tokenizer_is_had_without_the_weights(tmp_path):
    write(tmp_path / "model", "internlm2")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    assert models.load_tokenizer(str(tmp_path / "model"))("the")["input_ids"][0] == 1
    assert type(models.load_tokenizer("lab")) is type(AutoTokenizer.from_pretrained(models.check("lab")))


def test_a_hub_id_is_kept_and_read_like_a_folder(tmp_path, monkeypatch):
    """From the hub's cache, laid out as a download leaves it, where the hub cannot be reached."""
    kept = tmp_path / "models--open--vlm"
    write(kept / "snapshots" / ("a" * 40), "internlm2")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("kvweave.models.source._unreached", lambda name: "no route to host")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model, processor = models.load("open/vlm")
    assert type(model).__name__ == "InternVLForConditionalGeneration"
    assert processor.image_token == "<IMG_CONTEXT>"
    assert models.checkpoint_mark("open/vlm") == "a" * 40


# -------------------------------------------------------------------- refusals


def test_what_cannot_be_converted_is_refused_in_one_line(tmp_path, kvweave):
    write(tmp_path / "model", "internlm2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    cases = [
        (("convert", "open/vlm", "out"), "open/vlm/config.json cannot be read"),
        (("convert", "./nowhere", "out"), "'./nowhere' does not exist"),
        (("convert", "model", "full"), "DESTINATION 'full' is not empty: allowed is"),
        (("convert", "model", "model"), "DESTINATION 'model' is not empty"),
        (("convert", "lab", "out"), "model_type='qwen2_5_vl' in no known layout"),
        (("convert", "model", "full/mine.txt"), "is a file"),
        (("convert", "model", "out", "--dtype", "int8"), "dtype='int8'"),
        (("convert", "model", "out", "--no-tokenizer"), "--no-tokenizer is not allowed without --decoder"),
        (("convert", "model", "full", "--decoder"), "DESTINATION 'full' is not empty"),
    ]
    for arguments, words in cases:
        ended = kvweave(*arguments)
        assert ended.code == 2, ended.err
        assert words in ended.err
        assert ended.err.count("\n") == 1
    edit(tmp_path / "model" / "config.json", ps_version="v1")
    ended = kvweave("run", "--model", "model")
    assert ended.code == 2
    assert "ps_version='v1': allowed is 'v2'" in ended.err
    assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path / "full") == ["mine.txt"]


def test_an_error_while_writing_leaves_nothing(tmp_path, kvweave, monkeypatch):
    write(tmp_path / "model", "internlm2")

    def fail(*_, **__):
        raise OSError("no room")

    monkeypatch.setattr("transformers.QianfanOCRProcessor.save_pretrained", fail)
    assert kvweave("convert", "model", "out").code == 1
    assert sorted(os.listdir(tmp_path)) == ["model"]
