"""Training on a tiny model: it learns, goes on where it stopped, and stops where it must."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.lab.smol.conftest import lines

from kvweave.lab.smol.albums import FAMILIES
from kvweave.lab.smol.model import Adapters, create, load_language, own_state
from kvweave.lab.smol.processor import load_tokenizer
from kvweave.lab.smol.train import STATE, Lengths, Painters, Recipe, Trainer, draw_batch, train

TINY = Recipe(look=0.5, pictures=4, tokens=600, lengths=(Lengths(0.5, 2, 2), Lengths(1.0, 2, 3)))
EVENLY = dict.fromkeys(FAMILIES, 1.0)

pytestmark = pytest.mark.usefixtures("noise_pictures")


@pytest.fixture
def run(tiny_language, tmp_path):
    return partial(train, tmp_path / "run", tiny_language, recipe=TINY)


@pytest.mark.parametrize("look", [1.0, 0.0])
def test_the_loss_falls_on_a_batch_seen_again(tiny_language, look):
    trainer = Trainer(tiny_language, replace(TINY, look=look, tower_rate=1e-3, adapter_rate=2e-2))
    batch = draw_batch(trainer.tokenizer, trainer.recipe, 0, 0, 0.1, EVENLY)
    losses = [trainer.advance(batch, 0.1)["loss"] for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]


def test_the_language_model_itself_stays_as_it_is(tiny_language):
    trainer = Trainer(tiny_language, replace(TINY, look=0.0))
    before = {name: weight.clone() for name, weight in trainer.language_model.state_dict().items()}
    own = {name: weight.clone() for name, weight in own_state(trainer.model, trainer.adapters).items()}
    trainer.advance(draw_batch(trainer.tokenizer, trainer.recipe, 0, 0, 0.1, EVENLY), 0.1)
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.language_model.state_dict().items())
    changed = {
        name
        for name, weight in own_state(trainer.model, trainer.adapters).items()
        if not torch.equal(weight, own[name])
    }
    assert {name.split(".")[0] for name in changed} == {"vision_tower", "multi_modal_projector", "adapters"}


class StoppedError(Exception):
    pass


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(tiny_language, run, tmp_path):
    def stop(record):
        if record["step"] == 5:
            raise StoppedError

    whole = train(tmp_path / "whole", tiny_language, recipe=TINY, steps=8)
    with pytest.raises(StoppedError):
        run(steps=8, save_every=0.0, on_step=stop)
    resumed = run(steps=8, resume=True)
    assert resumed["accuracy"] == whole["accuracy"]
    one, other = (load_file(tmp_path / name / STATE) for name in ("whole", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [record["step"] for record in lines(tmp_path / "run" / "log.jsonl")] == list(range(1, 9))


def test_what_is_shipped_is_small_in_type_and_whole(run, tmp_path, tiny_language):
    run(steps=2)
    state = load_file(tmp_path / "run" / STATE)
    model = create(load_language(tiny_language))
    assert state.keys() == own_state(model, Adapters(model.model.language_model)).keys()
    assert {weight.dtype for weight in state.values()} == {torch.bfloat16}


def test_another_process_draws_the_same_batches(tiny_language):
    tokenizer = load_tokenizer(tiny_language)
    painters = Painters(tokenizer, TINY, 3, workers=1)
    try:
        for step in range(3):
            there, here = painters.batch(step, 0.9, EVENLY), draw_batch(tokenizer, TINY, 3, step, 0.9, EVENLY)
            assert torch.equal(there.packed.tokens, here.packed.tokens)
            assert torch.equal(there.scenes.cells, here.scenes.cells)
    finally:
        painters.close()


def test_a_loss_that_is_no_number_stops_the_run(run, tiny_language, tmp_path):
    model = create(load_language(tiny_language))
    state = own_state(model, Adapters(model.model.language_model))
    state["multi_modal_projector.linear_2.bias"] = torch.full((64,), torch.nan)
    save_file({name: weight.detach().contiguous() for name, weight in state.items()}, tmp_path / "broken")
    with pytest.raises(FloatingPointError, match="step 1: loss nan"):
        run(steps=4, start=tmp_path / "broken")


def test_what_is_not_allowed_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="steps=1 and minutes=1"):
        run(steps=1, minutes=1)
    run(steps=1)
    with pytest.raises(FileExistsError, match="holds a run"):
        run(steps=1)
    with pytest.raises(ValueError, match="another seed or recipe"):
        run(steps=2, resume=True, seed=1)
