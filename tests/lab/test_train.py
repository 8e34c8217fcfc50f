"""Batches, stages, and a run that goes on where it stopped. Eager and tiny: the real run takes an hour."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from kvweave.evals.tasks.lab_score import answers
from kvweave.lab import samples, weights_path, words
from kvweave.lab.draw import CELL, GRID
from kvweave.lab.model import Forward, create
from kvweave.lab.train import (
    CURRICULUM,
    ENLARGE,
    QUESTIONS,
    SHARES,
    Stage,
    Trainer,
    draw_batch,
    loss_and_hits,
    train,
)
from kvweave.lab.world import AUXILIARY, FAMILIES, TASKS, World, slot

TINY = (
    Stage(4, (1,), World(frames=False, needles=1), tokens=500, warm=2),
    Stage(4, (1, 2), World(), tokens=500, warm=2),
)


class TestBatches:
    def test_answers_stand_behind_their_questions(self):
        batch = draw_batch(CURRICULUM[0], seed=0, step=3, shares=SHARES)
        assert batch.tokens.shape == (len(batch.pictures), 1 + 3 * slot(GRID) + QUESTIONS)
        questions = batch.tokens[:, -QUESTIONS:]
        follows = questions.roll(-1, 1)
        asked = batch.targets != words.PAD
        assert torch.equal(follows[asked], batch.targets[asked]), "a target is the token that comes next"
        assert torch.equal(batch.families >= 0, asked)
        opening = batch.targets == words.TOKEN[words.ANSWER]
        assert (questions[opening] == words.TOKEN["?"]).all(), "prompts end at the question mark"
        assert opening.sum(1).min() >= 3, "many questions share one album"

    def test_every_family_is_asked(self):
        batch = draw_batch(Stage(1, (8,), World()), seed=0, step=0, shares=SHARES)
        assert set(batch.families.unique().tolist()) == {-1, *range(len(TASKS) + len(AUXILIARY))}

    def test_a_larger_world_is_asked_more_and_the_small_one_rehearsed(self):
        stage = replace(ENLARGE[-1], images=(3,), rehearsal=0.5, rehearsed=(2,), tokens=2400)
        batches = [draw_batch(stage, seed=0, step=step, shares=SHARES) for step in range(8)]
        assert {batch.pictures.shape[1:3] for batch in batches} == {(3, 160), (2, 80)}
        for batch in batches:
            grid = batch.pictures.shape[2] // CELL
            assert batch.tokens.shape[1] == 1 + batch.pictures.shape[1] * slot(grid) + stage.questions
        asked = torch.cat([batch.families.unique() for batch in batches])
        assert set(asked.tolist()) == {-1, *range(len(FAMILIES))}

    def test_they_follow_from_seed_and_step(self):
        one, same, other_step, other_seed = (
            draw_batch(TINY[0], seed, step, SHARES) for seed, step in ((0, 1), (0, 1), (0, 2), (1, 1))
        )
        assert torch.equal(one.pictures, same.pictures)
        assert torch.equal(one.tokens, same.tokens)
        assert not torch.equal(one.pictures, other_step.pictures)
        assert not torch.equal(one.pictures, other_seed.pictures)

    def test_no_family_with_a_share_of_zero(self):
        shares = dict.fromkeys(FAMILIES, 0.0) | {"lookup": 1.0}
        batch = draw_batch(Stage(1, (3,), World()), seed=0, step=0, shares=shares)
        assert set(batch.families.unique().tolist()) == {-1, FAMILIES.index("lookup")}


class TestStages:
    def test_the_rate_rises_holds_and_falls(self):
        stage = Stage(100, (3,), World(), warm=10, hold=0.5, floor=0.1)
        rates = [stage.rate_at(step) for step in range(100)]
        assert rates[0] == pytest.approx(0.1)
        assert rates[9:51] == pytest.approx([1.0] * 42)
        assert rates[50:] == sorted(rates[50:], reverse=True)
        assert rates[-1] == pytest.approx(0.1, abs=0.01)

    def test_frames_come_after_plain_ground_and_long_albums_last(self):
        framed = [stage.world.frames for stage in CURRICULUM]
        assert framed == sorted(framed)
        assert max(CURRICULUM[-1].images) == 12

    def test_a_stage_may_end_early(self):
        trainer = Trainer(0, [Stage(9, (1,), World(), tokens=1, warm=2, enough=-1.0)], "cpu", compiled=False)
        while not trainer.finished:
            trainer.advance()
        trainer.close()
        assert trainer.step == 3


def test_with_even_losses_every_family_weighs_the_same():
    model = create(0)
    shares = dict.fromkeys(FAMILIES, 0.0) | {"lookup": 5.0, "text_needle": 1.0}
    batch = draw_batch(Stage(1, (2,), World(), tokens=600), seed=0, step=0, shares=shares)

    def loss(family: str | None, even: bool) -> float:
        asked = batch.families >= 0 if family is None else batch.families == FAMILIES.index(family)
        part = replace(batch, targets=torch.where(asked, batch.targets, words.PAD))
        with torch.inference_mode():
            return loss_and_hits(Forward(model), part, even=even)[0].item()

    each = [loss(family, even) for family in ("lookup", "text_needle") for even in (False, True)]
    assert each[0] == pytest.approx(each[1])
    assert loss(None, even=True) == pytest.approx((each[0] + each[2]) / 2, rel=1e-5)
    assert loss(None, even=False) != pytest.approx(loss(None, even=True), rel=1e-4)


def test_some_steps_lower_the_loss():
    stage = Stage(16, (1,), World(frames=False, needles=1), tokens=1200, warm=4, hold=1.0)
    trainer = Trainer(0, [stage], "cpu", compiled=False)
    losses = [trainer.advance()["loss"] for _ in range(stage.steps)]
    trainer.close()
    assert sum(losses[-3:]) / 3 < losses[0] - 0.3


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path):
    options: dict[str, Any] = {"device": "cpu", "curriculum": TINY, "compiled": False, "progress": False}
    train(tmp_path / "whole", **options)

    def interrupt(record: dict[str, Any]) -> None:
        if record["step"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", save_every=3, on_step=interrupt, **options)
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    with pytest.raises(FileExistsError, match="resume=True"):
        train(tmp_path / "parts", **options)
    result = train(tmp_path / "parts", resume=True, **options)

    assert (result["steps"], result["already_finished"]) == (8, False)
    whole, parts = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"] for name in ("whole", "parts")
    )
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, atol=1e-6, rtol=1e-5, msg=name)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)

    assert train(tmp_path / "parts", resume=True, **options)["already_finished"]
    with pytest.raises(ValueError, match="another seed"):
        train(tmp_path / "parts", seed=1, resume=True, **options)


def test_a_run_goes_on_from_a_model(tmp_path: Path):
    stage = Stage(1, (1,), World(grid=7), tokens=1, rate=0.0)
    options: dict[str, Any] = {"device": "cpu", "curriculum": [stage], "compiled": False, "progress": False}
    train(tmp_path, start=weights_path(), **options)
    before, after = (AutoModelForImageTextToText.from_pretrained(path) for path in (weights_path(), tmp_path))
    for name, weight in after.state_dict().items():
        assert torch.equal(weight, before.state_dict()[name]), name
    with pytest.raises(ValueError, match="another seed, start"):
        train(tmp_path, resume=True, **options)
    with pytest.raises(FileNotFoundError, match="allowed is a folder"):
        train(tmp_path / "new", start=tmp_path / "nowhere", **options)


def test_a_model_from_elsewhere_is_not_overwritten(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="choose another folder"):
        train(tmp_path, resume=True)
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"


def test_a_finished_run_loads_like_any_checkpoint(tmp_path: Path):
    train(tmp_path, device="cpu", curriculum=[Stage(1, (1,), World(), tokens=1)], compiled=False)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert len(answers(model, processor, samples("lookup", 2, 2))) == 2
