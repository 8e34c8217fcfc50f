"""Rows that change places, as beams do, take along all that waits for their cut and all that a turn left behind."""

from dataclasses import dataclass

import pytest
import torch
from tiny import IMAGE, assert_close, decode, picture_inputs, text_inputs, text_model, vision_model, words

import kvweave

SWAPPED = torch.tensor([1, 0])
WAITING = {
    "h2o": kvweave.H2O(budget=0.3, defer=4),
    "weave": kvweave.Weave(budget=0.3, proxies=4, recent=4, defer=4),
    "d2o": kvweave.get_method("d2o", budget=0.3, var_norm="none", defer=4),
    "turned keys": kvweave.FlowMM(budget=0.3, proxies=4, rope_aware=True, defer=4),
}
KEPT_FOR_LATER = {
    "d2o": kvweave.get_method("d2o", budget=0.4),
    "flowmm": kvweave.FlowMM(budget=0.3, proxies=4),
    "turned keys": kvweave.FlowMM(budget=0.3, proxies=4, rope_aware=True, flow="cross"),
}


def one_row_without_pictures():
    """Two prompts of unequal length: a padded one with two pictures, and text alone."""
    inputs = picture_inputs((20,), pictures=2)
    text = text_inputs((26,), images=(), seed=3)
    front = torch.zeros(1, 6, dtype=torch.long)
    return inputs | {
        "input_ids": torch.cat([torch.cat([front, inputs["input_ids"]], 1), text["input_ids"]]),
        "attention_mask": torch.cat([torch.cat([front, inputs["attention_mask"]], 1), text["attention_mask"]]),
        "mm_token_type_ids": torch.cat([torch.cat([front, inputs["mm_token_type_ids"]], 1), torch.zeros(1, 26)]),
    }


def assert_rows_swapped(cache, other):
    for one, two in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(one.positions, two.positions[SWAPPED])
        assert_close(one.mass, two.mass[SWAPPED])
        assert_close(one.keys, two.keys[SWAPPED])
        assert_close(one.values, two.values[SWAPPED])


@pytest.mark.parametrize("method", WAITING.values(), ids=WAITING)
def test_a_cut_that_waits_comes_to_the_rows_where_they_are_then(method):
    """One row of pictures that has ended, one row of text that goes on: nothing of them is alike."""
    model, inputs = vision_model(), one_row_without_pictures()
    model.generation_config.eos_token_id = stop = int(decode(model, inputs, 2)[0][0, 1])
    caches = []
    for moved in (False, True):
        with kvweave.compress(model, method) as session:
            tokens = model.generate(**inputs, max_new_tokens=4, suppress_tokens=[IMAGE])
            cache = session.cache
        assert stop in tokens[0, 26:]
        assert stop not in tokens[1, 26:]
        assert cache.waits
        if moved:
            cache.reorder_cache(SWAPPED)
        cache.freeze()
        assert cache.report["deferred"] == 3
        caches.append(cache)
    assert not torch.equal(caches[0].layers[0].positions[0], caches[0].layers[0].positions[1])
    assert_rows_swapped(caches[1], caches[0])


@pytest.mark.parametrize("method", KEPT_FOR_LATER.values(), ids=KEPT_FOR_LATER)
def test_a_later_turn_finds_what_the_first_left_of_each_row(method):
    """D2O's threshold, modalities, rotary tables: after two turns rows are what they are where none has moved."""
    model, inputs = vision_model(), one_row_without_pictures()
    more = words(2, 12, seed=8)
    caches = []
    for moved in (False, True):
        rows = SWAPPED if moved else slice(None)
        with torch.no_grad(), kvweave.compress(model, method) as session:
            out = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True, suppress_tokens=[IMAGE])
            cache = session.cache
            if moved:
                cache.reorder_cache(SWAPPED)
            start = inputs["attention_mask"].sum(1)[:, None] + model.model.rope_deltas.view(2, 1)
            position = (start + 1 + torch.arange(12)).expand(3, 2, 12)
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, 13, dtype=torch.long)], 1)
            model(
                input_ids=more[rows], attention_mask=mask[rows], position_ids=position[:, rows], past_key_values=cache
            )
        assert out.sequences.shape[1] == 28
        assert cache.report["layers"][0]["rows"][0]["length"] == (39 if moved else 33)
        caches.append(cache)
    assert_rows_swapped(caches[1], caches[0])


HEARD: list[torch.Tensor] = []


@dataclass(frozen=True)
class FirstLayerListener(kvweave.SnapKV):
    """Notes what decoded tokens are said to attend to in the first layer."""

    name = "first layer's listener"

    def plan(self, view, budget):
        if view.decoded is not None and view.layer == 0:
            HEARD[:] = [view.decoded]
        return super().plan(view, budget)


def test_each_beam_is_cut_by_its_own_tokens():
    """The tokens that a beam has when the cut comes, however often it was moved, and no other's."""
    model, inputs = text_model(attention="eager"), text_inputs((26, 26))
    fed = []  # of each row, moved along with it

    def note(module, args, kwargs):
        if kwargs["input_ids"].shape[1] == 1:
            fed.append(kwargs["input_ids"])

    moves = []
    with kvweave.compress(model, FirstLayerListener(budget=0.3, window=4, defer=3)) as session:
        hook = model.register_forward_pre_hook(note, with_kwargs=True)
        reorder = kvweave.CompressedCache.reorder_cache

        def follow(cache, beams):
            if len(fed) < 3:
                fed[:] = [tokens[beams] for tokens in fed]
                moves.append(beams.tolist())
            return reorder(cache, beams)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kvweave.CompressedCache, "reorder_cache", follow)
            model.generate(**inputs, max_new_tokens=7, num_beams=3)
        hook.remove()
    assert session.report["deferred"] == 3
    assert any(beams != list(range(6)) for beams in moves[1:])  # they did move while the cut was waiting
    whole = torch.cat([inputs["input_ids"].repeat_interleave(3, 0), *fed[:3]], 1)
    with torch.no_grad():
        first = model(whole, output_attentions=True).attentions[0]
    assert_close(HEARD[0], first[:, :, 26:, :26].mean(2).unflatten(1, (2, 2)).mean(2))
    assert (HEARD[0][0] - HEARD[0][1]).abs().max() > 1e-3
