"""What memory holds: room for decoded tokens, slots in few bits, a cache that is frozen."""

import dataclasses

import pytest
import torch
from tiny import assert_close, decode, picture_inputs, storages, text_inputs, text_model, vision_model, words

import kvweave
from kvweave.memory.packed import PackedSlots, packed
from kvweave.memory.slots import Slots
from kvweave.ops.quantize import Quantization


def random_slots(count=20, *, batch=2, kv_heads=2, dim=8, written=True):
    keys, values = torch.randn(2, batch, kv_heads, count, dim)
    if not written:
        return Slots(keys, values)
    positions = torch.arange(0, 3 * count, 3).expand(batch, kv_heads, -1)
    return Slots(keys, values, positions, torch.full(positions.shape, 2.0), torch.rand(positions.shape))


def new_tokens(count, *, batch=2, kv_heads=2, dim=8):
    return torch.randn(2, batch, kv_heads, count, dim)


@pytest.mark.parametrize("written", [True, False], ids=["cut", "whole"])
@pytest.mark.parametrize("steps", [[1] * 40, [3, 1, 7], [1, 30, 1]], ids=["one by one", "drafts", "a long one"])
def test_appending_is_concatenating(written, steps):
    slots, first = random_slots(written=written), random_slots(written=written).count
    keys, values, column = slots.keys.clone(), slots.values.clone(), 100 if written else first
    start = column
    for new in steps:
        more = new_tokens(new)
        slots = slots.append(*more, column)
        keys, values = torch.cat([keys, more[0]], 2), torch.cat([values, more[1]], 2)
        column += new
    assert torch.equal(slots.keys, keys)
    assert torch.equal(slots.values, values)
    whole = slots.as_slots(torch.ones(2, column, dtype=torch.bool))
    assert torch.equal(whole.positions[..., first:], torch.arange(start, column).expand(2, 2, -1))
    assert torch.equal(whole.mass[..., first:], torch.ones(2, 2, column - start))
    if written:
        assert torch.equal(whole.bias[..., first:], torch.zeros(2, 2, column - start))


def test_most_tokens_are_decoded_without_moving_the_cache():
    slots, moves = random_slots(200), 0
    for column in range(700, 900):
        before = slots.keys.data_ptr()
        slots = slots.append(*new_tokens(1), column)
        moves += slots.keys.data_ptr() != before
    assert moves <= 5
    room = slots.keys.untyped_storage().nbytes() / slots.keys.nbytes
    assert room < 1.3


def test_a_longer_branch_does_not_write_into_what_a_shorter_one_reads():
    """`crop` and go on: what was handed out before keeps its slots up to the crop."""
    slots = random_slots()
    for column in range(100, 106):
        slots = slots.append(*new_tokens(1), column)
    read = slots.before(103, 106)
    expected = read.keys.clone()
    other = read.append(*new_tokens(1), 103)
    assert torch.equal(read.keys, expected)
    assert torch.equal(other.keys[:, :, :-1], expected)
    assert other.all_positions()[0, 0, -4:].tolist() == [100, 101, 102, 103]


@pytest.mark.parametrize("gone", [0, 1, 5, 6, 9])
def test_cropping_packed_slots_forgets_the_last_columns(gone):
    slots = packed(random_slots(40), Quantization(bits=8, group=8, residual=4))
    assert isinstance(slots, PackedSlots)
    for column in range(200, 206):
        slots = slots.append(*new_tokens(1), column)
    whole = slots.as_slots()
    left = slots.before(206 - gone if gone <= 6 else 110, 206).as_slots()
    if gone <= 6:
        assert left.count == 46 - gone
        assert torch.equal(left.all_positions(), whole.all_positions()[..., : 46 - gone])
    else:
        assert left.all_positions().max() < 110
    assert_close(left.keys, whole.keys[:, :, : left.count], 0.05)


def test_packing_goes_on_in_whole_groups_while_decoding():
    setting = Quantization(bits=4, group=8, residual=4)
    slots = packed(random_slots(12), setting)
    counts = []
    for column in range(100, 120):
        slots = slots.append(*new_tokens(1), column)
        counts.append((slots.packed, slots.rest.keys.shape[2]))
    assert [young for _, young in counts] == [5, 6, 7, 8, 9, 10, 11, 4] * 2 + [5, 6, 7, 8]
    assert counts[-1][0] == 24
    assert slots.as_slots().count == 32


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.1), (4, 1.5)], ids=["8 bits", "4 bits"])
@pytest.mark.parametrize("inner", ["full", "snapkv", "adakv", "flowmm", "flashcache"])
@pytest.mark.parametrize("lengths", [(70,), (70, 44)], ids=["one", "batch"])
def test_a_quantised_cache_stays_near_the_inner_methods(bits, tolerance, inner, lengths):
    model, inputs = text_model(), text_inputs(lengths)
    method = kvweave.get_method(inner, budget=0.6)
    with kvweave.compress(model, method) as session:
        _, logits = decode(model, inputs, 2)
        plain = session.report["totals"]
    with kvweave.compress(model, kvweave.Quantized(method, bits=bits, group=8, residual=8)) as session:
        _, mine = decode(model, inputs, 2)
        few = session.report["totals"]
    assert few["bytes"] < plain["bytes"] * 0.75
    assert few["kept"] == plain["kept"]
    assert torch.equal(mine[:, 0], logits[:, 0])  # the first token reads the full cache
    assert 0 < (mine[:, 1] - logits[:, 1]).abs().max() < tolerance * logits.abs().max()


def test_quantised_beams_and_crops_and_turns_run():
    model = text_model()
    method = kvweave.Quantized(kvweave.SnapKV(budget=0.5, window=4), bits=8, group=4, residual=4)
    with kvweave.compress(model, method) as session:
        model.generate(words(1, 40), num_beams=3, max_new_tokens=8)
        assert session.cache.layers[0].keys.shape[0] == 3
        model.generate(words(1, 12, seed=1).repeat(1, 3), max_new_tokens=8, prompt_lookup_num_tokens=4)
        cache = kvweave.CompressedCache(model.config, method)
        first = model.generate(words(1, 40), past_key_values=cache, max_new_tokens=4)
        model.generate(torch.cat([first, words(1, 10, seed=4)], 1), past_key_values=cache, max_new_tokens=2)
        assert cache.report["totals"]["length"] == 2 * (40 + 4 + 10)
        assert cache.report["totals"]["kept"] == 2 * 27


@pytest.mark.parametrize("bad", [{"bits": 3}, {"bits": True}, {"group": 0}, {"residual": -1}, {"method": "snapcv"}])
def test_bad_quantisation_is_named(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}=.*allowed"):
        kvweave.Quantized(**{"method": kvweave.SnapKV(), **bad})


def test_the_budget_of_a_quantised_cache_is_the_inner_methods():
    method = kvweave.Quantized(kvweave.SnapKV(budget=0.3), bits=8)
    assert method.budget == 0.3
    other = dataclasses.replace(method, budget=0.5)
    assert other == kvweave.Quantized(kvweave.SnapKV(budget=0.5), bits=8)
    with pytest.raises(ValueError, match="budget=0"):
        kvweave.Quantized(kvweave.SnapKV(), budget=0)


def test_quantised_spellings_round_trip():
    for text in ("quantized:method=flowmm,bits=2,budget=0.3,theta=0.4", "quantized:bits=8", "quantized:method=adakv"):
        method = kvweave.parse_method(text)
        assert kvweave.parse_method(method.spelling()) == method
        assert kvweave.method_from_dict(method.to_dict()) == method
    assert "quantized" not in kvweave.list_methods()
    with pytest.raises(ValueError, match=r"theta='0\.3' is no option"):
        kvweave.parse_method("quantized:method=snapkv,theta=0.3")


def test_a_frozen_cache_serves_many_questions_from_one_compressed_context():
    model = text_model()
    context, questions = words(1, 40), [words(1, 6, seed=n) for n in (1, 2)]
    with kvweave.compress(model, kvweave.SnapKV(budget=0.25, window=4)) as session, torch.no_grad():
        cache = model(input_ids=context).past_key_values
        assert session.report["totals"]["kept"] == 20
        cache.freeze()
        positions = cache.layers[0].positions
        answers = []
        for question in [*questions, questions[0]]:
            logits = model(input_ids=question, past_key_values=cache).logits
            assert cache.layers[0].positions.shape[-1] == 10 + 6
            cache.crop(-6)
            assert torch.equal(cache.layers[0].positions, positions)
            answers.append(logits)
    assert torch.equal(answers[0], answers[2])
    assert not torch.equal(answers[0], answers[1])


def test_a_frozen_cache_reads_like_decoding_token_by_token():
    model = text_model()
    context, question = words(2, 40), words(2, 5, seed=3)
    with kvweave.compress(model, kvweave.AdaKV(budget=0.3, window=4)), torch.no_grad():
        cache = model(input_ids=context).past_key_values
        cache.freeze()
        together = model(input_ids=question, past_key_values=cache).logits
        cache.crop(-5)
        apart = [model(input_ids=question[:, n : n + 1], past_key_values=cache).logits for n in range(5)]
    assert_close(together, torch.cat(apart, 1))


def test_uneven_heads_are_stored_apart_and_free_memory():
    model, inputs = text_model(), text_inputs((60,))
    with kvweave.compress(model, kvweave.AdaKV(budget=0.3, window=4)) as session:
        decode(model, inputs, 1)
    uneven = [layer for layer in session.cache.layers if len(layer.block.parts) > 1]
    assert uneven
    for layer in uneven:
        counts = [block.count for block in layer.block.parts]
        assert sum(counts) == 2 * 18
        assert sum(storages(layer)) == sum(counts) * 2 * 8 * 4  # keys and values of 8 float32 each


def test_the_peak_is_one_whole_layer_beside_the_cut_ones_or_the_whole_cache():
    model, inputs = text_model(num_hidden_layers=4), text_inputs((60,))
    peaks = {}
    for name in ("snapkv", "flashcache"):
        with kvweave.compress(model, kvweave.get_method(name, budget=0.2)) as session:
            decode(model, inputs, 1)
        peaks[name] = session.report["totals"]["peak_bytes"]
    layer = 60 * 2 * 2 * 8 * 4
    assert peaks["snapkv"] == layer + 3 * layer // 5
    assert peaks["flashcache"] == 4 * layer


LIVE: dict[str, dict[str, bool]] = (
    {name: {} for name in kvweave.list_methods()}
    | {
        "kvzip": {"replay": False},  # what it asks by itself, `compress_tensors` is not told
    }
    | {
        name: {"rope_aware": True, "mass_bias": True}
        for name in kvweave.list_methods()
        if isinstance(kvweave.get_method(name), kvweave.MergingMethod)
    }
)


@pytest.mark.parametrize("name", LIVE)
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "cohere2"], ids=["several axes", "interleaved"])
def test_the_cache_holds_what_compress_tensors_gives(name, kind, monkeypatch):
    """Every method on the live path, keys turned to their target's phase included."""
    method = kvweave.get_method(name, budget=0.25, defer=0, **LIVE[name])
    if kind == "cohere2":
        model, inputs = text_model(kind, layer_types=["full_attention"] * 2), text_inputs((40, 28))
    else:
        model, inputs = vision_model(), picture_inputs((40, 28))
    taken = {}
    after = kvweave.CompressedLayer.after_attention

    def spy(layer, queries, rule, mask):
        taken[layer.index] = queries.clone(), layer.keys.clone(), layer.values.clone(), rule.scaling
        after(layer, queries, rule, mask)

    monkeypatch.setattr(kvweave.CompressedLayer, "after_attention", spy)
    with kvweave.compress(model, method) as session, torch.no_grad():
        cache = model(**inputs).past_key_values
    queries, keys, values, scaling = zip(*taken.values(), strict=True)
    talk = session.cache.shared.turn
    if kind == "cohere2":  # compress_tensors speaks of half-split pairs: bring keys and tables into that layout
        order = torch.cat([torch.arange(0, 8, 2), torch.arange(1, 8, 2)])
        queries, keys = [x[..., order] for x in queries], [x[..., order] for x in keys]
        rotary = None if talk.rotary is None else tuple(table[..., order] for table in talk.rotary)
    else:
        order, rotary = slice(None), talk.rotary
    expected = kvweave.compress_tensors(
        method,
        queries,
        keys,
        values,
        visual=cache.prompt.visual,
        valid=cache.prompt.valid,
        rotary=rotary,
        scaling=scaling[0],
    )
    assert (rotary is not None) == method.needs.rotary
    for mine, want in zip(cache.layers, expected, strict=True):
        assert torch.equal(mine.positions, want.positions)
        held = (want.positions >= 0)[..., None]
        assert_close(mine.keys[..., order] * held, want.keys * held)
        assert_close(mine.values * held, want.values * held)
        assert_close(mine.mass, want.mass)
