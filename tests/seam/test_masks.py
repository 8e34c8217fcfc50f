"""What the model's mask hides of the slots behind a cut, which may be padding, and of those before it."""

import copy

import pytest
import torch
from compiling import Graphs
from tiny import assert_close, cut_of, masked, text_model, words
from transformers import DynamicCache

import kvweave

CONTEXT = words(1, 30)
QUESTIONS = words(2, 10, seed=5)
QUESTIONS[1, :4] = 0  # a question of six tokens, padded in front: padding in the middle of its row
STREAMING = kvweave.StreamingLLM(budget=0.5, sinks=4)
PADDED = torch.cat([torch.ones(2, 30, dtype=torch.long), (QUESTIONS != 0).long()], 1)
HIDDEN = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 37, dtype=torch.long)], 1)


def answer(model, ids, mask, cache, steps=5, **options):
    """Logits [batch, steps, vocabulary] of `generate` on a cache that holds the first columns."""
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=steps,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return torch.stack(out.logits, 1)


def read_once(model, cache, rows=2):
    """The context read into `cache`, for several questions."""
    with torch.no_grad():
        model(input_ids=CONTEXT, past_key_values=cache)
    cache.batch_repeat_interleave(rows)
    return cache


def cached_context(model, how="frozen", method=STREAMING):
    cache = read_once(model, kvweave.CompressedCache(model.config, method, hold=how == "held"))
    if how == "held":
        cache.compress()
    if how == "frozen":
        cache.freeze()
    return cache


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("how", ["frozen", "held", "cut again"])
@pytest.mark.parametrize("mask", [PADDED, HIDDEN], ids=["questions of unequal length", "columns hidden later"])
def test_questions_on_one_context_see_what_their_mask_shows(attention, how, mask):
    model = text_model(attention=attention)
    ids = torch.cat([CONTEXT.expand(2, -1), QUESTIONS], 1)
    handle = kvweave.attach(model)
    cache = cached_context(model, how)
    cuts = [cut_of(cache, 30)]
    mine = answer(model, ids, mask, cache)
    if how == "cut again":
        cuts.append(cut_of(cache, 40))
    handle.detach()
    with masked(model, *cuts):
        expected = answer(model, ids, mask, read_once(model, DynamicCache(config=model.config)))
    assert_close(mine, expected)


def test_a_question_of_one_token_may_hide_columns_too():
    model = text_model()
    ids = torch.cat([CONTEXT.expand(2, -1), QUESTIONS[:, -1:]], 1)
    mask = HIDDEN[:, :31]
    handle = kvweave.attach(model)
    cache = cached_context(model)
    cut = cut_of(cache, 30)
    mine = answer(model, ids, mask, cache)
    handle.detach()
    with masked(model, cut):
        expected = answer(model, ids, mask, read_once(model, DynamicCache(config=model.config)))
    assert_close(mine, expected)


def test_the_next_question_sees_what_the_last_one_hid():
    model = text_model()
    ids = torch.cat([CONTEXT.expand(2, -1), QUESTIONS], 1)
    handle = kvweave.attach(model)
    cache, fresh = cached_context(model), cached_context(model)
    answer(model, ids, HIDDEN, cache)
    cache.crop(30 - cache.get_seq_length())
    again, expected = (answer(model, ids, PADDED, x) for x in (cache, fresh))
    handle.detach()
    assert torch.equal(again, expected)


@pytest.mark.parametrize(
    "method",
    [
        kvweave.Weave(budget=0.4, proxies=4, recent=4),
        kvweave.SnapKV(budget=0.4, window=4, defer=2),
        kvweave.get_method("adakv", budget=0.4, window=4, defer=2),
    ],
    ids=["weave", "snapkv", "adakv"],
)
def test_a_padded_second_turn_before_its_deferred_cut(method):
    model = text_model()
    handle = kvweave.attach(model)
    cache = kvweave.CompressedCache(model.config, method)
    out = model.generate(CONTEXT.expand(2, -1), past_key_values=cache, max_new_tokens=6)
    seen = cache.get_seq_length()
    cut = cut_of(cache, seen, merged=True, mass_bias=method.biases_logits)
    ids = torch.cat([out, QUESTIONS], 1)
    mask = torch.cat([torch.ones_like(out), (QUESTIONS != 0).long()], 1)
    mine = answer(model, ids, mask, cache, steps=3)
    handle.detach()
    with masked(model, cut):
        plain = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=out[:, :seen], past_key_values=plain)
        expected = answer(model, ids, mask, plain, steps=3)
    assert_close(mine, expected)


def test_a_padded_turn_that_needs_no_cut_drops_its_padding():
    """A budget in tokens that the conversation has not outgrown, after a turn that was cut."""
    model = text_model()
    handle = kvweave.attach(model)
    cache = kvweave.CompressedCache(model.config, kvweave.StreamingLLM(budget=20, sinks=4))
    out = model.generate(CONTEXT.expand(2, -1), past_key_values=cache, max_new_tokens=1)
    cache.crop(-14)  # 16 columns are left, of which few are held
    one = cut_of(cache, 16)
    ids = torch.cat([out[:, :16], QUESTIONS], 1)
    mask = torch.cat([PADDED[:, :16], PADDED[:, 30:]], 1)
    mine = answer(model, ids, mask, cache)
    two = cut_of(cache, 26)
    assert (cache.layers[0].positions[1, 0] >= 16).sum() == 6 + 4  # no padding; decoded tokens
    handle.detach()
    with masked(model, one, two):
        plain = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=out[:, :16], past_key_values=plain)
        expected = answer(model, ids, mask, plain)
    assert_close(mine, expected)


@pytest.mark.parametrize("mask", [PADDED, HIDDEN], ids=["questions of unequal length", "columns hidden later"])
@pytest.mark.parametrize("method", [STREAMING, kvweave.get_method("adakv", budget=0.4, window=4)])
def test_compiled_steps_see_what_the_mask_shows(mask, method):
    model, graphs = text_model(), Graphs()
    ids = torch.cat([CONTEXT.expand(2, -1), QUESTIONS], 1)
    handle = kvweave.attach(model)
    plain, compiled = (
        answer(model, ids, mask, cached_context(model, method=method), **options)
        for options in ({}, graphs.compiling())
    )
    handle.detach()
    assert graphs
    assert_close(compiled, plain)


def test_reserved_room_hears_a_mask_by_hand():
    model = text_model()
    ids, mask = torch.cat([CONTEXT.expand(2, -1), QUESTIONS], 1), HIDDEN
    handle, logits = kvweave.attach(model), []
    for reserved in (False, True):
        cache = cached_context(model)
        with torch.no_grad():
            model(input_ids=ids[:, 30:], past_key_values=cache, attention_mask=torch.ones_like(mask))
            if reserved:
                cache.reserve(4)
            steps = []
            for n in range(4):
                whole = torch.cat([mask, torch.ones(2, n + 1, dtype=torch.long)], 1)
                position = torch.full((2, 1), 40 + n)
                step = model(ids[:, n : n + 1], attention_mask=whole, past_key_values=cache, position_ids=position)
                steps.append(step.logits)
        logits.append(torch.cat(steps, 1))
    handle.detach()
    assert_close(logits[1], logits[0])


def test_decoding_reads_no_mask_where_it_hides_nothing_that_is_held():
    """And asks the device so once a prompt, not once a token."""
    model = text_model()
    ids = torch.cat([QUESTIONS, QUESTIONS], 1)
    mask = ids != 0
    mask[1, 4:] = True  # padding in front of the prompt alone, which its cut leaves behind
    cache = kvweave.CompressedCache(model.config, STREAMING)
    asked, look = [], type(cache.shared.turn).look

    class Counted(type(cache.shared.turn)):
        def look(self, **options):
            before = self.shown
            look(self, **options)
            asked.append((before, self.shown, self.sees_all))

    cache.shared.turn.__class__ = Counted
    handle = kvweave.attach(model)
    model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5)
    handle.detach()
    assert asked == [(None, None, False), (None, True, True), *[(True, True, True)] * 3]


def test_copies_of_a_cache_may_hide_different_columns():
    model = text_model()
    ids = torch.cat([CONTEXT.expand(2, -1), QUESTIONS], 1)
    handle = kvweave.attach(model)
    cache = cached_context(model)
    other = copy.deepcopy(cache)
    one, two = answer(model, ids, PADDED, cache), answer(model, ids, HIDDEN, other)
    handle.detach()
    assert not torch.allclose(one[1], two[1], atol=1e-2)
