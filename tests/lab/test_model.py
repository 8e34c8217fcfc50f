"""The packaged model answers, and the forward made for training is the model's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from kvweave.evals.scores.words import rouge_l
from kvweave.evals.tables.intervals import wilson
from kvweave.evals.tasks.lab_score import answers, evaluate, score
from kvweave.lab import LARGE_TASKS, TASKS, samples, weights_path, words
from kvweave.lab.model import Forward, configuration, create, patches
from kvweave.lab.world import Albums, World


@pytest.mark.parametrize(
    ("segments", "grid"), [(("walk",), 5), (("single", "pair", "walk", "pair"), 5), (("single", "pair"), 10)]
)
def test_the_training_forward_agrees_with_transformers(model: Any, segments: tuple[str, ...], grid: int):
    rng = np.random.default_rng(0)
    albums = Albums(2, segments, rng, World(grid=grid))
    pictures = torch.from_numpy(albums.pictures(rng))
    question = torch.tensor(words.encode("question: what did the robot do ? <a>")).expand(2, -1)
    tokens = torch.cat([torch.from_numpy(albums.tokens()), question], 1)
    with torch.inference_mode():
        fast = Forward(model)(tokens, pictures)
        own = model.model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=patches(pictures).flatten(0, 2),
            image_grid_thw=torch.tensor([[1, 2 * grid, 2 * grid]] * 2 * albums.images),
            mm_token_type_ids=(tokens == words.IMAGE).int(),
        ).last_hidden_state
    torch.testing.assert_close(fast, own, atol=1e-4, rtol=0)


def test_the_packaged_model_has_the_configuration_it_is_trained_with(model: Any):
    trained, packaged = configuration().to_dict(), model.config.to_dict()
    for part in ("text_config", "vision_config"):
        for key in (
            "hidden_size",
            "intermediate_size",
            "rope_parameters",
            "vocab_size",
            "patch_size",
            "depth",
        ):
            assert trained[part].get(key) == packaged[part].get(key), (part, key)


def test_seeds_make_the_start():
    one, same, other = (create(seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("task", TASKS)
def test_the_packaged_model_answers(model: Any, processor: Any, task: str):
    asked = samples(task, 40, 8, seed=1)
    assert score(asked, answers(model, processor, asked, batch_size=20)).exact >= 0.95


@pytest.mark.parametrize("task", LARGE_TASKS)
def test_the_large_world_is_answered(large_model: Any, task: str):
    processor = AutoProcessor.from_pretrained(weights_path("large"))
    asked = samples(task, 20, 8, seed=1)
    assert score(asked, answers(large_model, processor, asked, batch_size=10)).exact >= 0.85


def test_a_batch_answers_what_its_rows_answer_alone(model: Any, processor: Any):
    asked = [samples(task, 1, images, seed=2)[0] for task in TASKS for images in (3, 6)]
    heard: list[int] = []
    together = answers(model, processor, asked, batch_size=5, on_batch=heard.append)
    assert together == answers(model, processor, asked, batch_size=1)
    assert heard == [5, 10]


def test_evaluation_reports_counts_and_intervals(model: Any, processor: Any):
    heard: list[tuple[int, int]] = []
    report = evaluate(
        model, processor, ["lookup", "change"], count=6, images=[3, 4], batch=4,
        progress=lambda done, total: heard.append((done, total)),
    )  # fmt: skip
    assert heard[-1] == (24, 24)
    assert sorted(heard) == heard
    entry = report["scores"]["4"]["change"]
    assert entry["count"] == 6
    assert entry["low"] <= entry["exact"] <= entry["high"]
    assert entry["exact"] <= entry["rouge_l"] + 1e-9


class TestScores:
    def test_rouge_l(self):
        assert rouge_l("star turned red", "star turned red") == 1
        assert rouge_l("star turned blue", "star turned red") == pytest.approx(2 / 3)
        assert rouge_l("red star", "star red") == pytest.approx(1 / 2)
        assert rouge_l("", "red") == 0

    def test_wilson(self):
        low, high = wilson(190, 200)
        assert (round(low, 3), round(high, 3)) == (0.910, 0.973)
        assert wilson(200, 200)[1] == 1
        assert wilson(0, 200)[0] == 0

    def test_training_samples_are_refused(self):
        with pytest.raises(ValueError, match="hold-out"):
            score(samples("lookup", 1, 3, split="train"), ["red"])

    def test_missing_answers_are_refused(self):
        with pytest.raises(ValueError, match="1 answers for 2 samples"):
            score(samples("lookup", 2, 3), ["red"])

    def test_batch_size(self, model: Any, processor: Any):
        with pytest.raises(ValueError, match="batch_size"):
            answers(model, processor, samples("lookup", 1, 3), batch_size=0)
