"""Contexts that are asked probes before they are cut: what is counted, what is left behind, and what is refused."""

from dataclasses import replace

import pytest
import torch
from test_deferred import HEARD, Listening, kept
from tiny import assert_close, cut_of, decode, masked, picture_inputs, text_inputs, text_model, vision_model, words

import kvweave
from kvweave import lab, models

PROBES = [[11, 12, 13], [44, 5]]
WEAVE = kvweave.Weave(budget=0.3, proxies=4, recent=4)
METHODS = {
    "weave": WEAVE,
    "peak": kvweave.Peak(budget=0.3, recent=4),
    "snapkv": kvweave.SnapKV(budget=0.3, window=4),
    "meda": kvweave.get_method("meda", budget=0.3),
    "streaming_llm": kvweave.StreamingLLM(budget=0.3),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@every_method
@pytest.mark.parametrize("lengths", [(26,), (26, 19, 5)], ids=["one", "batch"])
def test_probes_leave_nothing_behind_but_the_cut(method, lengths):
    model, inputs = text_model(), text_inputs(lengths)
    plain = decode(model, inputs, 1)[1]
    with kvweave.compress(model, method, probes=PROBES, probe_tokens=4) as session:
        mine, logits = decode(model, inputs, 6)
    assert torch.equal(logits[:, :1], plain)
    cut = cut_of(session.cache, 26, merged=method is not METHODS["peak"], mass_bias=method.biases_logits)
    with masked(model, cut):
        same, expected = decode(model, inputs, 6)
    assert_close(logits, expected)
    assert torch.equal(mine, same)
    assert session.cache.get_seq_length() == 31
    told = session.report["probes"]
    assert (told["count"], told["tokens"]) == (2, 3 + 2 + 3 + 3)
    assert told["seconds"] > 0
    assert session.report["deferred"] == 0


def test_what_is_counted_is_what_probes_and_answers_attend_to():
    model, inputs = text_model(attention="eager"), text_inputs((26,))
    HEARD.clear()
    with kvweave.compress(model, Listening(budget=0.3, window=4), probes=PROBES, probe_tokens=3) as session:
        decode(model, inputs, 2)
    sums, rows = [0.0, 0.0], 0
    for probe in PROBES:
        ids = torch.cat([inputs["input_ids"], torch.tensor([probe])], 1)
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
        with torch.no_grad():
            attentions = model(whole[:, :-1], output_attentions=True).attentions
        rows += whole.shape[1] - 1 - 26
        for layer in range(2):
            sums[layer] += attentions[layer][:, :, 26:, :26].sum(2).unflatten(1, (2, 2)).mean(2)
    for layer in range(2):
        assert_close(HEARD[layer], sums[layer] / rows)
    assert session.report["probes"]["tokens"] == rows


@every_method
def test_a_held_cache_is_cut_as_a_session_cuts(method):
    model, inputs = text_model(), text_inputs((26, 19))
    with kvweave.compress(model, method, probes=PROBES, probe_tokens=4) as session:
        decode(model, inputs, 1)
    cache = kvweave.CompressedCache(model.config, method, hold=True)
    handle = kvweave.attach(model)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(**inputs, position_ids=positions, past_key_values=cache)
    assert {layer.positions.shape[-1] for layer in cache.layers} == {26}
    cache.compress(probes=PROBES, probe_tokens=4)
    assert kept(cache) == kept(session.cache)
    handle.detach()


@every_method
def test_a_held_cache_may_be_cut_without_probes(method):
    model, ids = text_model(), words(1, 26)
    cache = kvweave.CompressedCache(model.config, method, hold=True)
    handle = kvweave.attach(model)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        cache.compress()
        plain = kvweave.CompressedCache(model.config, replace(method, defer=0))
        model(input_ids=ids, past_key_values=plain)
    assert kept(cache) == kept(plain)
    handle.detach()


def test_a_row_of_a_batch_gives_what_it_gives_alone():
    """Its answers end where they end alone."""
    model = text_model()
    stop = int(decode(model, {"input_ids": torch.tensor([PROBES[0]])}, 1)[0])
    sets = []
    for inputs in (text_inputs((26,)), text_inputs((26, 19, 26))):
        for ends in (stop, None):
            model.generation_config.eos_token_id = ends
            with kvweave.compress(model, WEAVE, probes=PROBES, probe_tokens=6) as session:
                model.generate(**inputs, max_new_tokens=1)
            sets.append([layer[0] for layer in kept(session.cache)])
    assert sets[0] == sets[2]
    assert sets[1] == sets[3]


def test_pictures_and_positions_of_many_axes():
    model, inputs = vision_model(), picture_inputs((26, 19))
    with kvweave.compress(model, WEAVE, probes=PROBES, probe_tokens=4) as session:
        mine, logits = decode(model, inputs, 6)
    with masked(model, cut_of(session.cache, 26, merged=True, mass_bias=True)):
        same, expected = decode(model, inputs, 6)
    assert_close(logits, expected)
    assert torch.equal(mine, same)


def test_chunked_prefill_is_asked_once_it_is_complete():
    model, inputs = text_model("llava"), text_inputs((26, 19))
    with kvweave.compress(model, WEAVE, probes=PROBES, probe_tokens=4) as session:
        decode(model, inputs, 3)
        whole = kept(session.cache)
        decode(model, inputs, 3, prefill_chunk_size=7)
    assert kept(session.cache) == whole
    assert session.report["probes"]["count"] == 2


@pytest.fixture(scope="module")
def lab_model():
    return models.load()


@pytest.mark.parametrize("probes", ["default", ["list image #3 ?", [7, 8]]], ids=["default", "own"])
def test_texts_are_asked_by_the_processors_chat_template(lab_model, probes):
    model, processor = lab_model
    sample = lab.example(images=4, task="image_needle")
    inputs = models.encode(processor, sample.messages())
    with kvweave.compress(model, WEAVE, probes=probes, processor=processor, probe_tokens=3) as session:
        model.generate(**inputs, max_new_tokens=3)
    asked = session.probes.answered
    assert session.report["probes"]["count"] == len(asked) == (12 if probes == "default" else 2)
    assert processor.tokenizer.decode(asked[0]).startswith("list image #")
    assert asked[-1] == [7, 8] or probes == "default"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"probes": []}, "probes=[] is empty"),
        ({"probes": [[]]}, "probes: [] is empty"),
        ({"probes": [""], "processor": "lab"}, "is empty"),
        ({"probes": ["what is this?"]}, "processor=None"),
        ({"probes": "default"}, "processor=None"),
        ({"probes": "describe"}, "probes='describe'"),
        ({"probes": [1.5]}, "probes: 1.5"),
        ({"probes": 7}, "probes=7"),
        ({"probes": [[1]], "probe_tokens": 0}, "probe_tokens=0"),
        ({"probes": [[1]], "probe_tokens": 2.5}, "probe_tokens=2.5"),
    ],
)
def test_probes_that_are_not_allowed(lab_model, options, words):
    if options.get("processor"):
        options = options | {"processor": lab_model[1]}
    with pytest.raises((ValueError, TypeError)) as caught:
        kvweave.compress(text_model(), WEAVE, **options)
    assert words in str(caught.value)


def test_probes_on_a_cache_that_was_cut_already():
    model, ids = text_model(), words(1, 26)
    handle = kvweave.attach(model)
    plain = kvweave.CompressedCache(model.config, METHODS["snapkv"])
    held = kvweave.CompressedCache(model.config, METHODS["snapkv"], hold=True)
    with pytest.raises(ValueError, match="no whole prompt"):
        held.compress(probes=PROBES)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=plain)
        model(input_ids=ids, past_key_values=held)
        with pytest.raises(ValueError, match=r"probes=.*cut already"):
            plain.compress(probes=PROBES)
        held.compress(probes=PROBES, probe_tokens=2)
        with pytest.raises(ValueError, match=r"probes=.*cut already"):
            held.compress(probes=PROBES)
    handle.detach()
    other = kvweave.CompressedCache(model.config, METHODS["snapkv"], hold=True)
    handle = kvweave.attach(model)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=other)
    handle.detach()
    with pytest.raises(ValueError, match="attach"):
        other.compress(probes=PROBES)


def test_probes_and_drafts_of_an_assistant_go_together():
    """Drafts wait for the cut, and so for the probes."""
    model = text_model()
    ids = words(1, 9, seed=4).repeat(1, 3)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with kvweave.compress(model, WEAVE, probes=PROBES) as session:
        expected = decode(model, inputs, 6)[1]
        assert_close(decode(model, inputs, 6, prompt_lookup_num_tokens=2)[1], expected)
    assert session.report["probes"]["count"] == len(PROBES)


def test_probes_are_refused_where_the_prompt_comes_with_tokens_behind_it():
    model, ids = text_model(), words(1, 27)
    cache = kvweave.CompressedCache(model.config, WEAVE)
    cache.declare_prompt(24)
    with kvweave.compress(model, WEAVE, probes=PROBES), pytest.raises(ValueError, match="tokens behind it"):
        model(input_ids=ids, past_key_values=cache)


@pytest.mark.parametrize("probe", [[11, 2, 13], [11, 12, 2]], ids=["inside", "last"])
def test_an_end_of_turn_in_a_probe_is_no_end_of_its_answer(probe):
    """Chat templates end a user's turn by the token that ends a reply."""
    model, inputs = text_model(), text_inputs((26,))
    told = []
    for stop in (None, 2):
        model.generation_config.eos_token_id = stop
        cache = kvweave.CompressedCache(model.config, METHODS["snapkv"], hold=True)
        handle = kvweave.attach(model)
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
            cache.compress(probes=[probe], probe_tokens=3)
        handle.detach()
        told.append(cache)
    assert [cache.report["probes"]["tokens"] for cache in told] == [5, 5]
    assert kept(told[0]) == kept(told[1])


def test_the_end_of_an_answer_ends_it():
    model, inputs = text_model(), text_inputs((26,))
    cache = kvweave.CompressedCache(model.config, METHODS["snapkv"], hold=True)
    handle = kvweave.attach(model)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        ids = torch.cat([inputs["input_ids"], torch.tensor([[11, 12, 13]])], 1)
        model.generation_config.eos_token_id = int(model(input_ids=ids).logits[0, -1].argmax())
        cache.compress(probes=[[11, 12, 13]], probe_tokens=9)
    handle.detach()
    assert cache.report["probes"]["tokens"] == 3 + 1
