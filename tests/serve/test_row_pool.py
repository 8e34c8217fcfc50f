"""Rows of a pool hold what each would alone, whoever comes and goes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import samples

import kvweave
from kvweave import models
from kvweave.seam.row_pool import RowPool, refusal
from kvweave.serve.engine import proof
from kvweave.serve.engine.proof import prove
from kvweave.serve.engine.reading import Reading, read_on, read_prompt


@pytest.fixture(scope="module")
def readings(lab_model: tuple[Any, Any]) -> list[Reading]:
    """Four prompts of different lengths, cut to different counts."""
    model, processor = lab_model
    with kvweave.attach(model):
        return [
            read_prompt(
                model, models.encode(processor, samples(1, images)[0].messages()), kvweave.SnapKV(budget=share)
            )
            for images, share in ((2, 1.0), (3, 0.5), (5, 0.2), (8, 0.1))
        ]


@given(
    steps=st.lists(st.one_of(st.integers(0, 3), st.just("decode"), st.just("drop")), min_size=4, max_size=14),
    pick=st.randoms(use_true_random=False),
)
@settings(max_examples=8)
def test_rows_decode_as_they_do_alone(
    lab_model: tuple[Any, Any], readings: list[Reading], steps: list[Any], pick: Any
) -> None:
    """Any order of coming, decoding and leaving; each row's logits are those of its own cache."""
    model, _ = lab_model
    with kvweave.attach(model):
        pool, alone = RowPool(len(readings[0].cache.layers), 3), []
        for step in [*steps, "decode"]:
            if isinstance(step, int) and len(alone) < 3:
                assert pool.admit(readings[step].cache, 20, readings[step].position) == len(alone)
                alone.append(readings[step].fork())
            elif step == "drop" and alone:
                row = pick.randrange(len(alone))
                pool.drop(row)
                alone[row] = alone[-1]
                alone.pop()
            elif step == "decode" and alone:
                tokens = [pick.randrange(20, 100) for _ in alone]
                together = pool.decode(model, tokens)
                alone = [
                    read_on(model, own.cache, [token], own.position) for own, token in zip(alone, tokens, strict=True)
                ]
                torch.testing.assert_close(together, torch.stack([own.logits for own in alone]), atol=2e-4, rtol=1e-4)
            assert pool.rows == len(alone)
            assert pool.nbytes == pool.slots_with([]) * 2048


def test_memory_is_given_back(readings: list[Reading]) -> None:
    pool = RowPool(len(readings[0].cache.layers), 8)
    long, short = readings[0], readings[3]
    for _ in range(8):
        pool.admit(short.cache, 10, short.position)
    few = pool.nbytes
    pool.drop(0)
    pool.admit(long.cache, 1000, long.position)
    assert pool.nbytes > 4 * few
    pool.drop(pool.rows - 1)
    assert pool.nbytes == few
    for _ in range(7):
        pool.drop(0)
    assert (pool.rows, pool.nbytes) == (0, 0)


def test_a_full_pool_takes_no_more(readings: list[Reading]) -> None:
    pool = RowPool(len(readings[0].cache.layers), 1)
    pool.admit(readings[0].cache, 1, readings[0].position)
    with pytest.raises(ValueError, match="allowed is 1 rows"):
        pool.admit(readings[0].cache, 1, readings[0].position)


def test_what_a_pool_does_not_take(lab_model: tuple[Any, Any]) -> None:
    model, processor = lab_model
    inputs = models.encode(processor, samples(1, 4)[0].messages())
    with kvweave.attach(model):
        for spelling, why in {
            "snapkv": "",
            "adakv": "heads keep different counts",
            "pyramidkv": "layers keep different counts",
            "flowmm:mass_bias=true": "entries have a bias",
            "snapkv:defer=2": "the cut is still to come",
            "quantized:method=snapkv": "entries are packed in few bits",
        }.items():
            assert refusal(model, read_prompt(model, inputs, kvweave.parse_method(spelling)).cache) == why


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_is_proven_before_it_serves(attention: str) -> None:
    model, processor = models.load("lab", attention=attention)
    with kvweave.attach(model):
        assert prove(model, processor.tokenizer).alone == ""


def test_a_model_whose_rows_differ_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = models.load("lab")
    decode = RowPool.decode
    with kvweave.attach(model):
        monkeypatch.setattr(RowPool, "decode", lambda self, *args: decode(self, *args).flip(0))
        assert prove(model, processor.tokenizer).alone == "its rows decode otherwise in a pool than alone"

        def failing(self: RowPool, *args: Any) -> Any:
            raise TypeError("no mask")

        monkeypatch.setattr(RowPool, "decode", failing)
        assert "TypeError" in prove(model, processor.tokenizer).alone


@pytest.mark.parametrize("shift", [1, -1])
def test_a_position_too_many_is_seen_in_half_precision(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it changes logits by less than half precision rounds some models' by."""
    model, processor = models.load("lab", dtype="bfloat16")
    monkeypatch.setitem(proof._NEAR, torch.bfloat16, 1.0)
    admit = RowPool.admit
    with kvweave.attach(model):
        assert prove(model, processor.tokenizer).alone == ""
        monkeypatch.setattr(RowPool, "admit", lambda self, cache, left, at: admit(self, cache, left, at + shift))
        assert prove(model, processor.tokenizer).alone == "its rows decode otherwise in a pool than alone"
