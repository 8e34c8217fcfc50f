"""A cut that waits for decoded tokens: what they looked at, when it comes, and that decoding reads what it left."""

from dataclasses import replace

import pytest
import torch
from methods_for_tests import HEARD, Heavier, Listening
from tiny import (
    Cut,
    assert_close,
    cut_of,
    decode,
    masked,
    picture_inputs,
    text_inputs,
    text_model,
    vision_model,
    words,
)

import kvweave

WEAVE = kvweave.Weave(budget=0.3, proxies=4, recent=4)
METHODS = {
    "weave": WEAVE,
    "snapkv": kvweave.SnapKV(budget=0.3, window=4, defer=2),
    "h2o": kvweave.H2O(budget=0.3, defer=3),
    "adakv": kvweave.get_method("adakv", budget=0.3, window=4, defer=2),
    "meda": kvweave.get_method("meda", budget=0.3, defer=2),
    "streaming_llm": kvweave.StreamingLLM(budget=0.3, defer=1),
    "quantized": kvweave.Quantized(kvweave.SnapKV(budget=0.3, window=4), defer=2, bits=8, group=8, residual=64),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
INPUTS = text_inputs((26, 19))


def kept(cache, end=26):
    """For each layer, row and head the columns of the prompt that are left."""
    return [
        [[[int(p) for p in head if 0 <= p < end] for head in row] for row in layer.positions]
        for layer in cache.layers
    ]


def late_cut(cache, end, start):
    """The cut at column `end` as it is seen from column `start` on: what was decoded in between stays."""
    merges = isinstance(cache.method, kvweave.MergingMethod)
    cut = cut_of(cache, end, merged=merges, mass_bias=cache.method.biases_logits)
    if start == end:
        return cut
    bias = {n: torch.cat([x, x.new_zeros(*x.shape[:2], start - end)], -1) for n, x in cut.bias.items()}
    contents = cut.contents and {
        n: tuple(
            torch.cat([old, own[:, :, own.shape[2] - cache.decoded :][:, :, : start - end]], 2) for old, own in pair
        )
        for n, (keys, values) in cut.contents.items()
        for pair in [((keys, cache.layers[n].keys), (values, cache.layers[n].values))]
    }
    return Cut(start, bias, contents)


@every_method
@pytest.mark.parametrize("redecode", [False, True], ids=["kept", "redecoded"])
@pytest.mark.parametrize(("lengths", "attention"), [((26,), "sdpa"), ((26, 19, 5), "eager")])
def test_decoding_reads_the_whole_prompt_and_then_what_the_cut_left(method, redecode, lengths, attention):
    model, inputs = text_model(attention=attention), text_inputs(lengths)
    method = replace(method, redecode=redecode)
    plain = decode(model, inputs, 7)[1]
    with kvweave.compress(model, method) as session:
        mine, logits = decode(model, inputs, 7)
    first = 0 if redecode else method.defer
    assert torch.equal(logits[:, 0], plain[:, 0])
    if attention == "eager":
        assert_close(logits[:, : 1 + first], plain[:, : 1 + first])
    assert (logits - plain)[:, 1 + first :].abs().max() > 1e-2
    with masked(model, late_cut(session.cache, 26, 26 + first)):
        same, expected = decode(model, inputs, 7)
    assert_close(logits, expected, 1e-5)
    assert torch.equal(mine, same)
    report = session.report
    assert report["deferred"] == method.defer
    assert report["totals"]["kept"] == 2 * round(sum(int(0.3 * n + 1e-9) for n in lengths) / len(lengths))
    assert session.cache.get_seq_length() == 26 + 6


@pytest.mark.parametrize("tokens", [1, 3])
def test_what_is_counted_is_the_models_own_attention(tokens):
    model, inputs = text_model(attention="eager"), text_inputs((26,))
    plain = model.generate(**inputs, max_new_tokens=tokens + 1, output_attentions=True, return_dict_in_generate=True)
    HEARD.clear()
    with kvweave.compress(model, Listening(budget=0.3, window=4, defer=tokens)):
        decode(model, inputs, tokens + 1)
    for layer in range(2):
        rows = [step[layer][:, :, 0, :26] for step in plain.attentions[1:]]
        wanted = torch.stack(rows).mean(0).unflatten(1, (2, 2)).mean(2)
        assert_close(HEARD[layer], wanted)


def test_peak_memory_is_the_whole_cache_and_the_tokens_before_the_cut():
    with kvweave.compress(text_model(), WEAVE) as session:
        decode(session.model, text_inputs((200,)), 5)
    totals = session.report["totals"]
    assert totals["peak_bytes"] == 2 * 2 * 2 * 202 * 8 * 4  # layers, heads, keys and values
    assert totals["bytes_before"] == 2 * 2 * 2 * 200 * 8 * 4
    assert totals["bytes"] == 2 * 2 * 2 * 60 * 8 * 4


@every_method
def test_a_shorter_reply_is_never_cut(method):
    with kvweave.compress(text_model(), method) as session:
        decode(session.model, INPUTS, method.defer)
    assert session.report["deferred"] is None
    assert session.report["totals"]["kept"] == session.report["totals"]["length"]
    assert session.cache.layers[0].positions.shape[-1] == 26 + method.defer - 1


def test_the_cut_comes_with_the_last_token_that_counts():
    with kvweave.compress(text_model(), WEAVE) as session:
        decode(session.model, INPUTS, 3)
    assert session.report["deferred"] == 2
    assert session.cache.layers[0].positions.shape[-1] == 7 + 2


@every_method
@pytest.mark.parametrize("chunk", [5, 25])
def test_chunked_prefill_equals_one_piece(method, chunk):
    model = text_model("llava")
    with kvweave.compress(model, method) as session:
        tokens, logits = decode(model, INPUTS, 6)
        whole = session.cache
        mine, mine_logits = decode(model, INPUTS, 6, prefill_chunk_size=chunk)
    assert kept(session.cache) == kept(whole)
    assert_close(mine_logits, logits)
    assert torch.equal(mine, tokens)


def test_a_declared_prompt_in_pieces_waits_as_well():
    model, ids = text_model("llava"), words(1, 34)
    handle = kvweave.attach(model)
    caches = [kvweave.CompressedCache(model.config, WEAVE) for _ in range(2)]
    with torch.no_grad():
        model(input_ids=ids[:, :30], past_key_values=caches[0])
        caches[1].declare_prompt(30)
        for start, stop in ((0, 12), (12, 29), (29, 30)):
            model(input_ids=ids[:, start:stop], past_key_values=caches[1])
        for cache in caches:
            assert cache.waits
            for n in range(30, 34):
                model(input_ids=ids[:, n : n + 1], past_key_values=cache)
            assert not cache.waits
    handle.detach()
    assert kept(caches[0], 30) == kept(caches[1], 30)


@pytest.mark.parametrize("method", [METHODS["snapkv"], METHODS["h2o"], WEAVE], ids=["snapkv", "h2o", "weave"])
def test_rejected_candidates_do_not_count(method):
    """Prompt look-up on a prompt that repeats itself: greedy tokens, and so the cut, are those of plain decoding."""
    model = text_model()
    ids = words(1, 9, seed=4).repeat(1, 3)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    method = replace(method, defer=4)
    with kvweave.compress(model, method) as session:
        decode(model, inputs, 6)
        plain = session.cache
        for number in (2, 5):
            model.generate(**inputs, max_new_tokens=12, prompt_lookup_num_tokens=number)
            assert session.report["deferred"] >= 4
            assert kept(session.cache, 27) == kept(plain, 27)


def test_a_row_that_ended_early_gives_what_it_gives_alone():
    """Its end and the padding behind it are not counted; only the batch goes on."""
    model = text_model()
    method = kvweave.SnapKV(budget=0.3, window=4, defer=4, redecode=True)
    alone_tokens, _ = decode(model, text_inputs((26,)), 6)
    stop = int(alone_tokens[0, 2])
    with kvweave.compress(model, method) as session:
        model.generate(**text_inputs((26,)), max_new_tokens=6, eos_token_id=stop)
        alone = kept(session.cache)
        model.generate(**INPUTS, max_new_tokens=6, eos_token_id=stop)
        together = kept(session.cache)
        model.generate(**text_inputs((26,)), max_new_tokens=6)
        longer = kept(session.cache)
    assert [layer[0] for layer in together] == [layer[0] for layer in alone]
    assert [layer[0] for layer in longer] != [layer[0] for layer in alone]  # else nothing was proven


@pytest.mark.parametrize("redecode", [False, True])
def test_beams_carry_along_what_waits(redecode):
    model = text_model()
    method = replace(WEAVE, defer=3, redecode=redecode)
    with kvweave.compress(model, method) as session:
        model.generate(**INPUTS, max_new_tokens=8, num_beams=3)
        assert session.report["deferred"] == 3
        assert session.cache.layers[0].positions.shape[0] == 6
        whole = model.generate(**INPUTS, max_new_tokens=4, num_beams=3)
    assert torch.equal(whole[:, :26], INPUTS["input_ids"])


def test_reordered_rows_are_cut_as_they_would_have_been():
    model = text_model()
    with kvweave.compress(model, METHODS["h2o"]) as session:
        decode(model, INPUTS, 5)
        straight = kept(session.cache)
        decode(model, INPUTS, 3)  # two of three tokens are in
        cache = session.cache
        cache.reorder_cache(torch.tensor([1, 0]))
        mask = torch.ones(2, 29, dtype=torch.long)
        mask[:, :26] = INPUTS["attention_mask"].flip(0)
        tokens = decode(text_model(), INPUTS, 3)[0]
        step = tokens[:, 2:].flip(0)
        with torch.no_grad():
            position = mask.sum(1, keepdim=True) - 1
            model(input_ids=step, attention_mask=mask, position_ids=position, past_key_values=cache)
    assert kept(cache) == [layer[::-1] for layer in straight]


@pytest.mark.parametrize("redecode", [False, True])
def test_sampling_and_streamers_see_no_draft(redecode):
    class Heard:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    model, inputs, heard = text_model(), text_inputs((26,)), Heard()
    with kvweave.compress(model, replace(WEAVE, redecode=redecode)) as session:
        torch.manual_seed(0)
        out = model.generate(**inputs, max_new_tokens=6, do_sample=True, streamer=heard)
    assert heard.tokens == [*out[0].tolist(), "end"]
    assert session.report["deferred"] == 2
    assert session.cache.get_seq_length() == 31


def test_a_second_turn_defers_again():
    model = text_model("llava")
    handle = kvweave.attach(model)
    cache = kvweave.CompressedCache(model.config, WEAVE)
    ids = words(1, 30)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, past_key_values=cache)
    one = late_cut(cache, 30, 32)
    again = torch.cat([out, words(1, 11, seed=9)], 1)
    mask = torch.ones_like(again)
    options = {"past_key_values": cache, "return_dict_in_generate": True, "output_logits": True}
    result = model.generate(again, attention_mask=mask, max_new_tokens=6, **options)
    handle.detach()
    assert cache.report["deferred"] == 2
    assert {layer.positions.shape[-1] for layer in cache.layers} == {int(0.3 * 46) + 5}
    assert cache.report["layers"][0]["length"] == 46
    two = late_cut(cache, 46, 48)
    with masked(model, one, two):
        expected = decode(model, {"input_ids": again, "attention_mask": mask}, 6)[1]
    assert_close(torch.stack(result.logits, 1)[:, 3:], expected[:, 3:])


def test_a_turn_that_comes_before_the_cut_compresses_all_of_it():
    model = text_model("llava")
    handle = kvweave.attach(model)
    cache = kvweave.CompressedCache(model.config, WEAVE)
    ids = words(1, 50)
    with torch.no_grad():
        model(input_ids=ids[:, :30], past_key_values=cache)
        model(input_ids=ids[:, 30:31], past_key_values=cache)
        assert cache.waits
        model(input_ids=ids[:, 31:46], past_key_values=cache)
        assert cache.waits
        assert {layer.positions.shape[-1] for layer in cache.layers} == {46}
        for n in range(46, 50):
            model(input_ids=ids[:, n : n + 1], past_key_values=cache)
    handle.detach()
    assert {layer.positions.shape[-1] for layer in cache.layers} == {int(0.3 * 46) + 4}


def test_freezing_makes_the_cut_at_once():
    model = text_model("llava")
    with torch.no_grad(), kvweave.compress(model, WEAVE) as session:
        model(input_ids=words(1, 30))
        cache = session.cache
        assert cache.waits
        cache.freeze()
        assert {layer.positions.shape[-1] for layer in cache.layers} == {9}
        waiting = kept(cache, 30)
        model(input_ids=words(1, 30))
    with torch.no_grad(), kvweave.compress(model, replace(WEAVE, defer=0)) as session:
        model(input_ids=words(1, 30))
    assert waiting == kept(session.cache, 30)


def test_cropping_into_the_prompt_forgets_the_cut():
    model = text_model("llava")
    with torch.no_grad(), kvweave.compress(model, WEAVE) as session:
        model(input_ids=words(1, 30))
        session.cache.crop(-3)
        assert not session.cache.waits
        assert session.cache.layers[0].positions.shape[-1] == 27


@pytest.mark.parametrize("redecode", [False, True])
def test_pictures_and_positions_of_many_axes(redecode):
    model, inputs = vision_model(), picture_inputs((26, 19))
    method = replace(WEAVE, redecode=redecode, rope_aware=True)
    with kvweave.compress(model, method) as session:
        mine, logits = decode(model, inputs, 6)
    with masked(model, late_cut(session.cache, 26, 26 if redecode else 28)):
        same, expected = decode(model, inputs, 6)
    assert_close(logits, expected)
    assert torch.equal(mine, same)


def test_layers_that_slide_are_rewound_after_a_draft():
    model = text_model(
        "gemma2", attention="eager", layer_types=["sliding_attention", "full_attention"], sliding_window=6
    )
    method = kvweave.SnapKV(budget=0.3, window=4, defer=2, redecode=True)
    with kvweave.compress(model, method) as session:
        mine, logits = decode(model, INPUTS, 6)
    with masked(model, cut_of(session.cache, 26)):
        same, expected = decode(model, INPUTS, 6)
    assert_close(logits, expected)
    assert torch.equal(mine, same)


def test_a_mask_of_ones_own_is_refused_by_a_draft_and_says_so():
    model, ids = text_model(), words(1, 20)
    mask = torch.zeros(1, 1, 1, 21)
    with torch.no_grad(), kvweave.compress(model, replace(WEAVE, redecode=True)) as session:
        model(input_ids=ids)
        with pytest.raises(ValueError, match="redecode=True"):
            model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=session.cache)


LONG = words(1, 1100, images=((40, 700),))  # over 1,024 tokens FlowMM estimates the ratio from some of the rows


@pytest.mark.parametrize("options", [{}, {"flow_rows": 100}], ids=["default", "100 rows"])
@pytest.mark.parametrize("how", ["deferred", "probed"])
def test_a_ratio_from_drawn_rows_is_known_when_the_cut_comes(how, options):
    model = text_model("llava")
    method = kvweave.FlowMM(budget=0.1, proxies=4, **options)
    with torch.no_grad(), kvweave.compress(model, method) as session:
        model(input_ids=LONG)
        at_once = session.report
    if how == "deferred":
        method, probes = replace(method, defer=2), None
    else:
        probes = [[7, 8, 9]]
    with kvweave.compress(model, method, probes=probes, probe_tokens=2) as session:
        model.generate(LONG, max_new_tokens=4)
    assert session.report["totals"]["kept"] == at_once["totals"]["kept"]
    for mine, theirs in zip(session.report["layers"], at_once["layers"], strict=True):
        assert mine["flow_rows"] == options.get("flow_rows", 256)
        assert mine["flow"] == pytest.approx(theirs["flow"])


def conversation(model, method, pieces):
    """Turns by hand, of as many tokens each, and three decoded tokens after the first and the last."""
    cache = kvweave.CompressedCache(model.config, method)
    for n, piece in enumerate(pieces):
        model(input_ids=words(1, piece, seed=n), past_key_values=cache)
        for step in range(3 if n in (0, len(pieces) - 1) else 0):
            model(input_ids=words(1, 1, seed=50 + step), past_key_values=cache)
    return cache


def test_a_layer_whose_own_budget_is_below_what_it_holds_is_observed():
    """On a later turn the upper layer holds less than the mean budget, and more than its own."""
    model = text_model("llava")
    method = kvweave.get_method("pyramidkv", budget=0.3, window=4, defer=2)
    handle = kvweave.attach(model)
    with torch.no_grad():
        cache = conversation(model, method, (30, 2))
    handle.detach()
    lower, upper = (int((layer.positions[0, 0] < 35).sum()) for layer in cache.layers)
    assert (lower, upper) == tuple(method.layer_budgets(int(0.3 * 35), 35, 2))


@pytest.mark.parametrize("defer", [0, 2])
def test_every_layer_is_weighed_on_a_later_turn(defer):
    """Also one that holds less than the mean budget already."""
    told = []

    class Told(Heavier):
        def allocate(self, weights, budget, length):
            told.append(weights)
            return super().allocate(weights, budget, length)

    model = text_model("llava")
    handle = kvweave.attach(model)
    with torch.no_grad():
        conversation(model, Told(budget=0.3, defer=defer), (30, 2))
    handle.detach()
    assert told == [[1.0, 2.0]] * 2
