"""Prompts in pieces, turn after turn, beams, drafts: what a cache goes through, against the oracle."""

import copy

import pytest
import torch
from methods_for_tests import Heavier
from tiny import (
    IMAGE,
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
from kvweave.seam.names import CACHE

SNAP = kvweave.SnapKV(budget=0.3, window=4)
METHODS = {
    "streaming_llm": kvweave.StreamingLLM(budget=0.3, sinks=2),
    "h2o": kvweave.H2O(budget=0.3),
    "snapkv": SNAP,
    "random": kvweave.Random(budget=0.3),
    "flowmm": kvweave.FlowMM(budget=0.3, proxies=4),
    "layer-adaptive": Heavier(budget=0.3),
    "adakv": kvweave.get_method("adakv", budget=0.3, window=4),
}
EVICTION = {name: method for name, method in METHODS.items() if name != "flowmm"}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_eviction = pytest.mark.parametrize("method", EVICTION.values(), ids=EVICTION)


@pytest.fixture
def attached():
    """A model of text and image placeholders with kvweave attached."""
    model = text_model("llava")
    handle = kvweave.attach(model)
    yield model
    handle.detach()


def say(model, cache, ids, mask=None, **options):
    """A turn through `generate`: the whole conversation so far goes in, as its template would print it."""
    mask = torch.ones_like(ids) if mask is None else mask
    return decode(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache, **options)


def kept(cache, end):
    """For each layer, row and head the set of columns below `end`."""
    return [
        [[{int(p) for p in head if 0 <= p < end} for head in row] for row in layer.positions]
        for layer in cache.layers
    ]


def sizes(sets):
    return [[[len(head) for head in row] for row in layer] for layer in sets]


def assert_same(mine, theirs, tolerance=1e-5):
    """Two compressed caches hold the same."""
    for one, other in zip(mine.layers, theirs.layers, strict=True):
        assert torch.equal(one.positions, other.positions)
        assert_close(one.mass, other.mass)
        assert_close(one.keys, other.keys, tolerance)
        assert_close(one.values, other.values, tolerance)


# -------------------------------------------------------------------- turns


def first_turn(model, cache, lengths=(30,)):
    inputs = text_inputs(lengths, images=((2, 8),))
    tokens, logits = say(model, cache, inputs["input_ids"], inputs["attention_mask"], steps=5)
    return inputs, tokens, logits


def second_turn(inputs, tokens, new=11):
    """The conversation with the reply and another question appended."""
    more = words(len(tokens), new, seed=9)
    ids = torch.cat([inputs["input_ids"], tokens, more], 1)
    return ids, torch.cat([inputs["attention_mask"], torch.ones_like(tokens), torch.ones_like(more)], 1)


@every_eviction
@pytest.mark.parametrize("lengths", [(30,), (30, 21, 4)], ids=["one", "batch"])
def test_a_second_turn_compresses_the_whole_again_to_the_budget_of_the_whole(attached, method, lengths):
    cache = kvweave.CompressedCache(attached.config, method)
    inputs, tokens, _ = first_turn(attached, cache, lengths)
    after_first = kept(cache, 34)  # decoded tokens included; the last one has not been fed yet
    one = cut_of(cache, 30)
    ids, mask = second_turn(inputs, tokens)
    total = ids.shape[1]
    mine, logits = say(attached, cache, ids, mask, steps=4)
    after_second = kept(cache, total)
    per_layer = [max(1, int(0.3 * (length + 16) + 1e-9)) for length in lengths]
    counts = sizes(after_second)
    for row, expected in enumerate(per_layer):
        assert sum(sum(layer[row]) for layer in counts) == 2 * 2 * expected  # layers, heads
    for layer, before in zip(after_second, after_first, strict=True):
        for row in range(len(lengths)):
            for head in range(2):  # what was evicted does not return; what stays was there or is new
                assert layer[row][head] <= before[row][head] | set(range(34, total))
    assert cache.get_seq_length() == total + 3
    with masked(plain(attached), one, cut_of(cache, total)) as model:
        same, expected = decode(model, {"input_ids": ids, "attention_mask": mask}, 4, past_key_values=None)
    assert torch.equal(mine, same)
    assert_close(logits, expected)


def plain(model):
    """A model with the same weights that kvweave is not attached to."""
    other = text_model("llava")
    other.load_state_dict(model.state_dict())
    return other


def test_merged_mass_adds_up_over_turns(attached):
    cache = kvweave.CompressedCache(attached.config, METHODS["flowmm"])
    inputs, tokens, _ = first_turn(attached, cache)
    ids, mask = second_turn(inputs, tokens)
    say(attached, cache, ids, mask, steps=1)
    for layer, described in zip(cache.layers, cache.report["layers"], strict=True):
        assert described["length"] == 46
        assert described["kept"] == int(0.3 * 46)
        assert described["kept"] + described["merged"] + described["evicted"] == 46
        assert torch.allclose(layer.mass.sum(-1).mean(), torch.tensor(46.0 - described["evicted"]), atol=0.51)


def test_many_turns_keep_positions_ascending_and_logical(attached):
    cache = kvweave.CompressedCache(attached.config, SNAP)
    ids = words(2, 20, images=((3, 9),))
    for turn in range(5):
        mask = torch.ones_like(ids)
        out = attached.generate(
            ids, attention_mask=mask, max_new_tokens=3, past_key_values=cache, suppress_tokens=[IMAGE]
        )
        for layer in cache.layers:
            real = layer.positions[layer.positions >= 0].view(2, 2, -1)
            assert (real.diff(dim=-1) > 0).all()
            assert real.max() == out.shape[1] - 2
            assert (real < ids.shape[1]).sum(-1).eq(int(0.3 * ids.shape[1])).all()
        assert cache.get_seq_length() == out.shape[1] - 1
        ids = torch.cat([out, words(2, 7 + turn, seed=turn)], 1)
    assert cache.prompt.visual[:, 3:9].all()
    assert cache.prompt.visual.sum() == 12


def test_a_turn_of_one_token_is_a_turn_inside_generate(attached):
    cache = kvweave.CompressedCache(attached.config, SNAP)
    inputs, tokens, _ = first_turn(attached, cache)
    ids, mask = second_turn(inputs, tokens, new=1)
    say(attached, cache, ids, mask, steps=1)
    assert {layer.positions.shape[-1] for layer in cache.layers} == {int(0.3 * 36)}


def test_turns_by_hand_where_a_forward_of_several_tokens_ends_a_prompt(attached):
    cache = kvweave.CompressedCache(attached.config, SNAP)
    ids = words(1, 50)
    with torch.no_grad():
        attached(input_ids=ids[:, :30], past_key_values=cache)
        assert {layer.positions.shape[-1] for layer in cache.layers} == {9}
        for n in range(30, 34):
            attached(input_ids=ids[:, n : n + 1], past_key_values=cache)
        assert {layer.positions.shape[-1] for layer in cache.layers} == {13}
        one = cut_of(cache, 30)
        out = attached(input_ids=ids[:, 34:], past_key_values=cache)
    assert {layer.positions.shape[-1] for layer in cache.layers} == {15}
    with torch.no_grad(), masked(plain(attached), one) as model:
        assert_close(out.logits, model(input_ids=ids).logits[:, 34:])


def test_a_turn_where_nothing_has_to_go_leaves_the_cache_alone(attached):
    cache = kvweave.CompressedCache(attached.config, kvweave.SnapKV(budget=100, window=4))
    inputs, tokens, _ = first_turn(attached, cache)
    ids, mask = second_turn(inputs, tokens)
    _, logits = say(attached, cache, ids, mask, steps=4)
    assert kept(cache, 46) == [[[set(range(46))] * 2]] * 2
    assert_close(logits, decode(plain(attached), {"input_ids": ids, "attention_mask": mask}, 4)[1])
    assert cache.report["totals"]["kept"] == 92


def test_a_budget_in_tokens_is_reached_only_when_the_conversation_has_outgrown_it(attached):
    cache = kvweave.CompressedCache(attached.config, kvweave.SnapKV(budget=40, window=4))
    inputs, tokens, _ = first_turn(attached, cache)
    assert cache.report["totals"]["kept"] == 60
    ids, mask = second_turn(inputs, tokens)
    say(attached, cache, ids, mask, steps=1)
    assert cache.report["totals"]["kept"] == 80


def test_mass_bias_over_two_turns(attached):
    method = kvweave.FlowMM(budget=0.3, proxies=4, mass_bias=True, flow="cross")
    cache = kvweave.CompressedCache(attached.config, method)
    inputs, tokens, _ = first_turn(attached, cache, (30, 21))
    one = cut_of(cache, 30, merged=True, mass_bias=True)
    ids, mask = second_turn(inputs, tokens)
    mine, logits = say(attached, cache, ids, mask, steps=4)
    two = cut_of(cache, 46, merged=True, mass_bias=True)
    with masked(plain(attached), one, two) as model:
        same, expected = decode(model, {"input_ids": ids, "attention_mask": mask}, 4)
    assert torch.equal(mine, same)
    assert_close(logits, expected)


def test_columns_that_a_later_mask_hides_are_padding_from_then_on(attached):
    """A user takes back the first tokens of a conversation by its mask."""
    cache = kvweave.CompressedCache(attached.config, kvweave.StreamingLLM(budget=12))
    ids, mask = words(1, 40), torch.ones(1, 40, dtype=torch.long)
    mask[:, :6] = 0
    with torch.no_grad():
        attached(input_ids=ids[:, :30], past_key_values=cache)
        assert cache.layers[0].positions[0, 0, :4].tolist() == [0, 1, 2, 3]
        attached(input_ids=ids[:, 30:], attention_mask=mask, past_key_values=cache)
    for layer in cache.layers:
        assert layer.positions[layer.positions >= 0].min() >= 6
        assert layer.positions.max() == 39
    assert torch.equal(cache.prompt.valid, mask.bool())


def test_sessions_compress_conversations_too():
    model = text_model()
    inputs = text_inputs((30,))
    with kvweave.compress(model, SNAP) as session:
        out = model.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, words(1, 11, seed=9)], 1)
        again = model.generate(
            ids, max_new_tokens=2, past_key_values=out.past_key_values, return_dict_in_generate=True
        )
    assert again.past_key_values is out.past_key_values is session.cache
    assert session.report["totals"] | {"bytes": 0, "bytes_before": 0, "peak_bytes": 0} == {
        "peak_bytes": 0,
        "length": 92,
        "kept": 26,
        "merged": 0,
        "evicted": 66,
        "bytes": 0,
        "bytes_before": 0,
        "layers": 2,
    }


def test_pictures_of_a_first_turn_count_as_visual_in_the_second():
    model = vision_model()
    inputs = picture_inputs((30,))
    with kvweave.compress(model, METHODS["flowmm"]) as session, torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
        more = words(1, 9, seed=9)
        ids = torch.cat([out.sequences, more], 1)
        delta = model.model.rope_deltas if hasattr(model.model, "rope_deltas") else model.rope_deltas
        new = ids[:, 32:]
        position = (torch.arange(32, ids.shape[1]) + delta).expand(3, 1, -1)
        model(input_ids=new, position_ids=position, past_key_values=out.past_key_values)
    prompt = session.cache.prompt
    assert torch.equal(prompt.visual, ids == IMAGE)
    assert session.report["layers"][0]["length"] == ids.shape[1]


# -------------------------------------------------------------------- prompts in pieces


@every_method
@pytest.mark.parametrize("chunk", [1, 5, 16, 29])
@pytest.mark.parametrize("lengths", [(30,), (30, 21)], ids=["one", "batch"])
def test_chunked_prefill_in_generate_equals_one_piece(method, chunk, lengths):
    model, inputs = text_model("llava"), text_inputs(lengths, images=((2, 6),))
    with kvweave.compress(model, method) as session:
        tokens, logits = decode(model, inputs)
        whole = session.cache
        mine, mine_logits = decode(model, inputs, prefill_chunk_size=chunk)
    assert session.cache is not whole
    assert_same(session.cache, whole)
    assert torch.equal(mine, tokens)
    assert_close(mine_logits, logits)
    assert torch.equal(session.cache.prompt.valid, whole.prompt.valid)
    assert torch.equal(session.cache.prompt.visual, whole.prompt.visual)


@every_method
@pytest.mark.parametrize("pieces", [(10, 10, 10), (29, 1), (1, 29), (7, 1, 1, 21)])
def test_a_declared_prompt_in_pieces_equals_one_piece(attached, method, pieces):
    ids = words(1, 34)
    caches = [kvweave.CompressedCache(attached.config, method) for _ in range(2)]
    with torch.no_grad():
        attached(input_ids=ids[:, :30], past_key_values=caches[0])
        caches[1].declare_prompt(30)
        start = 0
        for size in pieces:
            attached(input_ids=ids[:, start : start + size], past_key_values=caches[1])
            start += size
            whole = start < 30
            assert {layer.keys.shape[2] == start for layer in caches[1].layers} == {whole}
        outs = [
            torch.cat([attached(input_ids=ids[:, n : n + 1], past_key_values=c).logits for n in range(30, 34)], 1)
            for c in caches
        ]
    assert_same(caches[1], caches[0])
    assert_close(outs[1], outs[0])


def test_a_declaration_holds_for_one_prompt(attached):
    cache = kvweave.CompressedCache(attached.config, SNAP)
    ids = words(1, 60)
    cache.declare_prompt(30)
    with torch.no_grad():
        for start in (0, 10, 20):
            attached(input_ids=ids[:, start : start + 10], past_key_values=cache)
        assert cache.layers[0].keys.shape[2] == 9
        cache.declare_prompt(50)
        attached(input_ids=ids[:, 30:45], past_key_values=cache)
        assert cache.layers[0].keys.shape[2] == 24
        attached(input_ids=ids[:, 45:50], past_key_values=cache)
        assert cache.layers[0].keys.shape[2] == 15
        attached(input_ids=ids[:, 50:], past_key_values=cache)
        assert cache.layers[0].keys.shape[2] == 18


@pytest.mark.parametrize("length", [0, -1, 10, 9, 3.0, "30"])
def test_a_declaration_that_cannot_be_is_refused(attached, length):
    cache = kvweave.CompressedCache(attached.config, SNAP)
    with torch.no_grad():
        attached(input_ids=words(1, 10), past_key_values=cache)
    with pytest.raises(ValueError, match="length"):
        cache.declare_prompt(length)


def test_later_chunks_are_compressed_too(attached):
    """A peer's fault: only the first chunk is."""
    model, inputs = text_model(), text_inputs((300,))
    with kvweave.compress(model, kvweave.H2O(budget=0.1)) as session:
        decode(model, inputs, 1, prefill_chunk_size=64)
    assert {layer.keys.shape[2] for layer in session.cache.layers} == {30}


# -------------------------------------------------------------------- drafts, beams, samples


@every_method
@pytest.mark.parametrize("drafts", [1, 3, 10])
def test_prompt_lookup_decoding_gives_the_tokens_of_plain_decoding(method, drafts):
    """The first forward already holds candidates; they are no part of the prompt, and go when they are refused."""
    model = text_model()
    ids = words(1, 12, seed=1).repeat(1, 3)  # repeats itself, so that there is something to look up
    with kvweave.compress(model, method) as session:
        tokens = model.generate(ids, max_new_tokens=12)
        expected = session.cache
        mine = model.generate(ids, max_new_tokens=12, prompt_lookup_num_tokens=drafts)
    assert session.cache is not expected
    assert torch.equal(mine, tokens)
    for layer, other in zip(session.cache.layers, expected.layers, strict=True):
        prompt, others = (x.positions[x.positions < 36] for x in (layer, other))
        assert torch.equal(prompt, others)
        length = min(layer.positions.shape[-1], other.positions.shape[-1])
        assert torch.equal(layer.positions[..., :length], other.positions[..., :length])
        assert_close(layer.keys[:, :, :length], other.keys[:, :, :length])


def test_a_model_that_drafts_for_another():
    """The first pass verifies its drafts with the whole prompt; the tokens after it come from the cut one."""
    model, other, ids = text_model(), text_model(seed=1), words(1, 30)
    with kvweave.compress(model, SNAP) as session:
        tokens = model.generate(ids, max_new_tokens=8)
        mine = model.generate(ids, max_new_tokens=8, assistant_model=other)
    assert torch.equal(mine, tokens)
    assert session.report["totals"]["kept"] == 18


def test_guidance_by_a_negative_prompt_cuts_each_prompt_at_its_own_end():
    """`generate` runs a second conversation beside its own, with a cache and a length of its own."""
    model, caches = text_model(), []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: caches.append(kwargs[CACHE]), with_kwargs=True
    )
    with kvweave.compress(model, SNAP):
        model.generate(words(1, 30), max_new_tokens=40, guidance_scale=1.5, negative_prompt_ids=words(1, 11, seed=8))
    hook.remove()
    own, negative = {id(cache): cache for cache in caches}.values()
    for cache, end, kept_of_it in ((own, 30, 9), (negative, 11, 3)):
        decoded = torch.arange(end, cache.get_seq_length())
        assert len(decoded) == 39
        for layer in cache.layers:
            assert (layer.positions < end).sum(-1).eq(kept_of_it).all()
            assert torch.equal(layer.positions[..., kept_of_it:], decoded.expand(1, 2, -1))


def test_drafts_are_really_verified_several_at_a_time():
    model = text_model()
    ids = words(1, 12, seed=1).repeat(1, 3)
    widths = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(
            kwargs["inputs_embeds" if kwargs.get("input_ids") is None else "input_ids"].shape[1]
        ),
        with_kwargs=True,
    )
    with kvweave.compress(model, SNAP):
        model.generate(ids, max_new_tokens=12, prompt_lookup_num_tokens=4)
    hook.remove()
    assert widths[0] == 36  # drafts wait for the cut
    assert max(widths[1:]) > 1


@every_eviction
@pytest.mark.parametrize("lengths", [(30,), (30, 21)], ids=["one", "batch"])
def test_beam_search_equals_the_oracles(method, lengths):
    model, inputs = text_model(), text_inputs(lengths)
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 6, "return_dict_in_generate": True}
    with kvweave.compress(model, method) as session:
        out = model.generate(**inputs, **options, output_scores=True)
    cut = cut_of(session.cache, 30)  # rows of one prompt are cut alike, whichever beam they became
    rows = len(lengths)
    for seen in cut.bias.values():
        groups = seen.view(rows, 3, *seen.shape[1:])
        assert torch.equal(groups[:, 0], groups[:, 1])
    with masked(model, cut):
        expected = model.generate(**inputs, **options, output_scores=True)
    assert torch.equal(out.sequences, expected.sequences)
    assert_close(out.sequences_scores, expected.sequences_scores)


@every_eviction
def test_samples_of_several_sequences_equal_the_oracles(method):
    model, inputs = text_model(), text_inputs((30, 21))
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 6, "temperature": 2.0}
    with kvweave.compress(model, method) as session:
        torch.manual_seed(4)
        mine = model.generate(**inputs, **options)
    with masked(model, cut_of(session.cache, 30)):
        torch.manual_seed(4)
        expected = model.generate(**inputs, **options)
    assert torch.equal(mine, expected)
    assert len({tuple(row) for row in mine.tolist()}) > 3


def test_embeddings_and_a_visual_mask_in_beam_search_repeat_the_rows():
    model, inputs = vision_model(), text_inputs((24, 17))
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    visual = inputs["input_ids"] == IMAGE
    with kvweave.compress(model, METHODS["flowmm"], visual=visual) as session:
        model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], num_beams=2, max_new_tokens=3)
    assert torch.equal(session.cache.prompt.visual[:, :24], visual.repeat_interleave(2, 0))


# -------------------------------------------------------------------- operations on a cache


def filled(model, method, lengths=(30, 21), decoded=5):
    """A cache after a prompt and some decoded tokens, with the ids that it has seen."""
    cache = kvweave.CompressedCache(model.config, method)
    inputs = text_inputs(lengths)
    follow = words(len(lengths), 5, seed=7)[:, :decoded]
    with torch.no_grad():
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        model(**inputs, position_ids=positions, past_key_values=cache)
    feed(model, cache, follow, inputs["attention_mask"])
    return cache, inputs, follow


def feed(model, cache, follow, mask):
    """Decode these tokens by hand; `mask` covers what came before them."""
    logits = []
    for n in range(follow.shape[1]):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        with torch.no_grad():
            out = model(
                input_ids=follow[:, n : n + 1],
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=cache,
            )
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1) if logits else None


def snapshot(cache):
    return [(x.keys.clone(), x.values.clone(), x.positions.clone(), x.mass.clone()) for x in cache.layers]


@every_method
@pytest.mark.parametrize("count", [1, 3, 5])
def test_crop_forgets_decoded_tokens_as_if_they_had_never_been(attached, method, count):
    cache, inputs, follow = filled(attached, method)
    shorter, _, _ = filled(attached, method, decoded=5 - count)
    cache.crop(-count)
    assert cache.get_seq_length() == 35 - count
    for (keys, values, positions, mass), layer in zip(snapshot(cache), shorter.layers, strict=True):
        assert torch.equal(keys, layer.keys)
        assert torch.equal(values, layer.values)
        assert torch.equal(positions, layer.positions)
        assert torch.equal(mass, layer.mass)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(follow[:, : 5 - count])], 1)
    again = words(2, 3, seed=8)
    assert torch.equal(feed(attached, cache, again, mask), feed(attached, shorter, again, mask))


@pytest.mark.parametrize("lengths", [(30,), (30, 21)], ids=["one", "batch"])
@pytest.mark.parametrize("mass_bias", [False, True])
def test_crop_into_the_prompt_leaves_what_was_kept_before_it(attached, mass_bias, lengths):
    method = kvweave.FlowMM(budget=0.4, proxies=4, mass_bias=mass_bias, flow="cross")
    cache, inputs, _ = filled(attached, method, lengths)
    before = cut_of(cache, 24, merged=True, mass_bias=mass_bias)
    cache.crop(-11)  # six prompt tokens and five decoded ones
    assert cache.get_seq_length() == 24
    for layer in cache.layers:
        assert layer.positions.max() < 24
    again = words(len(lengths), 4, seed=8)
    mine = feed(attached, cache, again, inputs["attention_mask"][:, :24])
    ids = torch.cat([inputs["input_ids"][:, :24], again], 1)
    mask = torch.cat([inputs["attention_mask"][:, :24], torch.ones_like(again)], 1)
    with torch.no_grad(), masked(plain(attached), before) as model:
        expected = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    assert_close(mine, expected[:, 24:])


@pytest.mark.parametrize("frozen", [False, True], ids=["open", "frozen"])
@pytest.mark.parametrize("pieces", [(1,) * 12, (12,)], ids=["token by token", "at once"])
def test_what_a_crop_leaves_of_a_prompt_is_not_cut_again(attached, frozen, pieces):
    ids, more = words(1, 30), words(1, 12, seed=5)
    cache = kvweave.CompressedCache(attached.config, SNAP)
    with torch.no_grad():
        attached(input_ids=ids, past_key_values=cache)
        if frozen:
            cache.freeze()
        cache.crop(-6)
        cut, left = cut_of(cache, 24), cache.layers[0].positions.shape[-1]
        logits = [attached(input_ids=x, past_key_values=cache).logits for x in more.split(pieces, 1)]
    cuts = [cut] if frozen or len(pieces) > 1 else [cut, cut_of(cache, 36)]  # another prompt: the whole is cut again
    assert cache.layers[0].positions.shape[-1] == (left + 12 if len(cuts) == 1 else int(0.3 * 36))
    with torch.no_grad(), masked(plain(attached), *cuts) as model:
        assert_close(torch.cat(logits, 1), model(input_ids=torch.cat([ids[:, :24], more], 1)).logits[:, 24:])


@every_method
@pytest.mark.parametrize("tokens", [-35, -100])
def test_a_crop_of_all_there_is_and_more_leaves_an_empty_cache(attached, method, tokens):
    cache, _inputs, _ = filled(attached, method)
    cache.crop(tokens)
    assert cache.get_seq_length() == 0
    assert cache.prompt is None
    fresh = kvweave.CompressedCache(attached.config, method)
    other = text_inputs((26, 20), seed=3)
    for each in (cache, fresh):
        say(attached, each, other["input_ids"], other["attention_mask"])
    assert_same(cache, fresh)


def test_a_crop_of_more_than_there_is_from_layers_that_slide():
    model = text_model(
        "gemma2", attention="eager", layer_types=["sliding_attention", "full_attention"], sliding_window=6
    )
    handle, cache = kvweave.attach(model), kvweave.CompressedCache(model.config, SNAP)
    cache.activate_past_recording()
    with torch.no_grad():
        model(input_ids=words(1, 20), past_key_values=cache)
        cache.crop(-100)
        lengths = [layer.get_seq_length() for layer in cache.layers]
        again = model(input_ids=words(1, 20), past_key_values=cache).logits
    handle.detach()
    assert lengths == [0, 0]
    with torch.no_grad():
        assert_close(again, model(input_ids=words(1, 20)).logits)


def test_a_held_prompt_that_was_cropped_is_no_whole_one(attached):
    cache = kvweave.CompressedCache(attached.config, SNAP, hold=True)
    with torch.no_grad():
        attached(input_ids=words(1, 30), past_key_values=cache)
    cache.crop(-6)
    with pytest.raises(ValueError, match="no whole prompt"):
        cache.compress()


def test_crop_of_nothing_is_nothing(attached):
    cache, _, _ = filled(attached, SNAP)
    before = snapshot(cache)
    cache.crop(0)
    assert all(
        torch.equal(a, b) for x, y in zip(before, snapshot(cache), strict=True) for a, b in zip(x, y, strict=True)
    )
    kvweave.CompressedCache(attached.config, SNAP).crop(-3)


def test_after_a_crop_the_next_turn_counts_what_is_left(attached):
    cache, _inputs, _ = filled(attached, SNAP, (30,))
    cache.crop(-5)
    with torch.no_grad():
        attached(input_ids=words(1, 10, seed=8), past_key_values=cache)
    assert cache.prompt.valid.shape == (1, 40)
    assert {layer.keys.shape[2] for layer in cache.layers} == {12}
    assert cache.layers[0].positions.max() == 39


@every_method
def test_rows_can_be_reordered_repeated_and_selected(attached, method):
    """Each against a cache that was filled with the rows in that order."""
    cache, inputs, follow = filled(attached, method)
    again = words(2, 3, seed=8)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(follow)], 1)
    expected = feed(attached, filled(attached, method)[0], again, mask)

    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.prompt.valid[:, :30], inputs["attention_mask"].bool()[[1, 0]])
    assert_close(feed(attached, cache, again[[1, 0]], mask[[1, 0]]), expected[[1, 0]])

    cache = filled(attached, method)[0]
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].positions.shape[0] == cache.prompt.valid.shape[0] == 4
    rows = [0, 0, 1, 1]
    assert_close(feed(attached, cache, again[rows], mask[rows]), expected[rows])

    cache = filled(attached, method)[0]
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.layers[0].positions.shape[0] == cache.prompt.valid.shape[0] == 1
    assert_close(feed(attached, cache, again[1:], mask[1:]), expected[1:])


def test_rows_that_were_reordered_are_cut_by_their_own_tokens_in_the_next_turn(attached):
    ids, more = words(2, 30, images=((3, 9),)), words(2, 8, seed=3)
    ids[1, 3:9] = words(1, 6, seed=4)  # a row with a picture, a row without
    swapped = torch.tensor([1, 0])
    caches = [kvweave.CompressedCache(attached.config, METHODS["flowmm"]) for _ in range(2)]
    with torch.no_grad():
        attached(input_ids=ids, past_key_values=caches[0])
        caches[0].reorder_cache(swapped)
        attached(input_ids=ids[swapped], past_key_values=caches[1])
        for cache in caches:
            attached(input_ids=more, past_key_values=cache)
    assert torch.equal(caches[0].prompt.visual, caches[1].prompt.visual)
    assert caches[0].prompt.visual.sum(1).tolist() == [0, 6]
    assert_same(*caches)


def test_a_prompt_half_given_can_be_repeated_and_continued(attached):
    """One context, two questions, compressed together: pieces, then rows repeated, then the rest."""
    context, questions = words(1, 20), words(2, 10, seed=5)
    caches = [kvweave.CompressedCache(attached.config, kvweave.H2O(budget=0.3)) for _ in range(2)]
    with torch.no_grad():
        caches[0].declare_prompt(30)
        attached(input_ids=context, past_key_values=caches[0])
        caches[0].batch_repeat_interleave(2)
        attached(input_ids=questions, past_key_values=caches[0])
        attached(input_ids=torch.cat([context.expand(2, -1), questions], 1), past_key_values=caches[1])
    assert_same(*caches)


@every_method
def test_reset_forgets_everything(attached, method):
    cache, _inputs, _ = filled(attached, method)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.prompt is None
    assert cache.report["totals"]["layers"] == 0
    fresh = kvweave.CompressedCache(attached.config, method)
    other = text_inputs((26,), seed=3)
    mine, logits = say(attached, cache, other["input_ids"])
    same, expected = say(attached, fresh, other["input_ids"])
    assert torch.equal(mine, same)
    assert torch.equal(logits, expected)
    assert_same(cache, fresh)


@pytest.mark.parametrize("method", [SNAP, kvweave.Weave(budget=0.4, proxies=4, recent=4)], ids=["snapkv", "weave"])
@pytest.mark.parametrize("hold", [False, True], ids=["open", "held"])
def test_a_reset_cache_is_a_new_one(attached, method, hold):
    """Whatever it went through: probes, a freeze, room, rotary tables."""
    cache, fresh = (kvweave.CompressedCache(attached.config, method, hold=hold) for _ in range(2))
    with torch.no_grad():
        attached(input_ids=words(2, 30), past_key_values=cache)
        if hold:
            cache.compress(probes=[[7, 8, 9]], probe_tokens=2)
        cache.freeze()
        cache.reserve(4)
        cache.reset()
    assert vars(cache.shared) == vars(fresh.shared)
    for each in (cache, fresh):
        with torch.no_grad():
            attached(input_ids=words(1, 26), past_key_values=each)
            for n in range(3):
                attached(input_ids=words(1, 1, seed=n), past_key_values=each)
            if hold:
                each.compress()
    assert cache.report == fresh.report
    assert_same(cache, fresh)


def test_a_session_that_asked_probes_cuts_after_a_reset():
    model = text_model()
    with torch.no_grad(), kvweave.compress(model, SNAP, probes=[[7, 8, 9]], probe_tokens=2) as session:
        cache = model(input_ids=words(1, 30)).past_key_values
        cache.reset()
        model(input_ids=words(1, 40), past_key_values=cache)
        assert session.report["totals"]["kept"] == 2 * 12
        assert session.report["probes"]["count"] == 1


def test_reset_in_the_middle_of_a_declared_prompt(attached):
    cache = kvweave.CompressedCache(attached.config, kvweave.H2O(budget=0.3))
    cache.declare_prompt(30)
    with torch.no_grad():
        attached(input_ids=words(1, 10), past_key_values=cache)
        cache.reset()
        attached(input_ids=words(1, 20), past_key_values=cache)
    assert cache.layers[0].keys.shape[2] == 6


def test_a_deep_copy_of_a_cache_is_a_conversation_of_its_own(attached):
    """As transformers documents for a prefix that many questions share."""
    context = words(1, 30, images=((3, 9),))
    cache = kvweave.CompressedCache(attached.config, METHODS["flowmm"])
    with torch.no_grad():
        attached(input_ids=context, past_key_values=cache)
    before = snapshot(cache)
    outs = []
    for seed in (1, 2, 1):
        ids = torch.cat([context, words(1, 5, seed=seed)], 1)
        branch = copy.deepcopy(cache)
        outs.append(say(attached, branch, ids)[1])
        assert branch.prompt.valid.shape[1] == 38
    assert torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], outs[1])
    after = snapshot(cache)
    assert all(torch.equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))
    assert cache.prompt.valid.shape[1] == 30


def test_the_next_position_is_the_logical_one_whatever_the_budget():
    """Queries of decoded tokens are turned as they would be without compression."""
    model, inputs = text_model(), text_inputs((30, 21))
    seen = {}
    for budget in (1.0, 0.5, 0.1):
        cosines = seen.setdefault(budget, [])
        hook = model.model.rotary_emb.register_forward_hook(
            lambda module, args, out, into=cosines: into.append(out[0])
        )
        with kvweave.compress(model, kvweave.SnapKV(budget=budget, window=4)):
            decode(model, inputs, 4)
        hook.remove()
    for budget in (0.5, 0.1):
        assert all(torch.equal(a, b) for a, b in zip(seen[budget], seen[1.0], strict=True))


def test_the_oracle_can_tell_two_caches_apart():
    """A sanity check of the tests themselves: another set of kept columns is another answer."""
    model, inputs = text_model(), text_inputs((30,))
    with kvweave.compress(model, SNAP) as session:
        logits = decode(model, inputs)[1]
    cut = cut_of(session.cache, 30)
    wrong = Cut(30, {number: seen.flip(1) for number, seen in cut.bias.items()})
    with masked(model, wrong):
        assert (decode(model, inputs)[1] - logits).abs().max() > 1e-2
