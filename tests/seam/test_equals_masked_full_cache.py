"""Decoding from a compressed cache is decoding from the full one with all but the kept columns masked.

The oracle of `tiny.py` computes that on plain transformers, eagerly, head by head.
"""

import pytest
import torch
from methods_for_tests import Biased, Heavier
from tiny import (
    IMAGE,
    MROPE,
    assert_close,
    cut_of,
    decode,
    masked,
    picture_inputs,
    text_inputs,
    text_model,
    vision_model,
)

import kvweave

EVICTION = {
    "streaming_llm": kvweave.StreamingLLM(budget=0.3, sinks=2),
    "h2o": kvweave.H2O(budget=0.3),
    "snapkv": kvweave.SnapKV(budget=0.3, window=4),
    "random": kvweave.Random(budget=0.3),
    "one token": kvweave.SnapKV(budget=1),
    "layer-adaptive": Heavier(budget=0.3),
    "adakv": kvweave.get_method("adakv", budget=0.3, window=4),
}
MERGING = {
    "flowmm": kvweave.FlowMM(budget=0.3, proxies=4),
    "flowmm, average": kvweave.FlowMM(budget=0.3, proxies=4, merge_rule="average", flow="cross"),
    "flowmm, values alone": kvweave.FlowMM(budget=0.3, proxies=4, merge_keys=False),
}
LENGTHS = {"one prompt": (26,), "left-padded batch": (26, 19, 26, 5)}


def rows_of(lengths, attention):
    return pytest.param(lengths, attention, id=f"{attention}-{len(lengths)}")


CASES = [rows_of(lengths, attention) for lengths in LENGTHS.values() for attention in ("sdpa", "eager")]


def check(model, inputs, method, *, merged=False, mass_bias=False, steps=6):
    """Plain, compressed, oracle; the first token and its logits are those of the uncompressed model."""
    length = inputs["input_ids"].shape[1]
    tokens, plain = decode(model, inputs, steps)
    with kvweave.compress(model, method) as session:
        mine, logits = decode(model, inputs, steps)
    assert torch.equal(logits[:, 0], plain[:, 0])
    assert torch.equal(mine[:, 0], tokens[:, 0])
    assert (logits - plain)[:, 1:].abs().max() > 1e-2  # else the oracle would prove nothing
    with masked(model, cut_of(session.cache, length, merged=merged, mass_bias=mass_bias)):
        same, expected = decode(model, inputs, steps)
    assert torch.equal(mine, same)
    assert_close(logits, expected)
    return session


@pytest.mark.parametrize("method", EVICTION.values(), ids=EVICTION)
@pytest.mark.parametrize(("lengths", "attention"), CASES)
def test_eviction(method, lengths, attention):
    check(text_model(attention=attention), text_inputs(lengths), method)


@pytest.mark.parametrize("method", MERGING.values(), ids=MERGING)
@pytest.mark.parametrize(("lengths", "attention"), CASES)
def test_merging_with_the_merged_contents_in_place(method, lengths, attention):
    check(vision_model(attention=attention), picture_inputs(lengths, pictures=0), method, merged=True)


@pytest.mark.parametrize(("lengths", "attention"), CASES)
def test_mass_bias_adds_the_logarithm_of_the_mass(lengths, attention):
    model, inputs = text_model(attention=attention), text_inputs(lengths)
    method = kvweave.FlowMM(budget=0.3, proxies=4, mass_bias=True, flow="cross")
    session = check(model, inputs, method, merged=True, mass_bias=True)
    assert session.cache.layers[0].mass.max() > 2  # something did merge
    with masked(model, cut_of(session.cache, max(lengths), merged=True)):
        unbiased = decode(model, inputs, 6)[1]
    with kvweave.compress(model, method):
        assert (decode(model, inputs, 6)[1] - unbiased).abs().max() > 1e-2


@pytest.mark.parametrize(("lengths", "attention"), CASES)
def test_a_bias_of_the_methods_own_reaches_its_entries_whatever_their_mass(lengths, attention):
    """`Plan.bias` by column and head, as `mass_kind="attention"` has it."""
    model, inputs = text_model(attention=attention), text_inputs(lengths)
    with kvweave.compress(model, Biased(budget=0.3)) as session:
        mine, logits = decode(model, inputs, 6)
    cut = cut_of(session.cache, max(lengths))
    for seen in cut.bias.values():
        seen += Biased.bias(torch.arange(max(lengths)).expand(seen.shape)).double()
    with masked(model, cut):
        same, expected = decode(model, inputs, 6)
    assert torch.equal(mine, same)
    assert_close(logits, expected)


def test_mass_alone_does_not_enter_attention():
    model, inputs = text_model(), text_inputs((26, 19))
    method = kvweave.FlowMM(budget=0.3, proxies=4, flow="cross")
    session = check(model, inputs, method, merged=True)
    assert session.cache.layers[0].mass.max() > 2


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_any_number_of_kv_heads(heads):
    model = text_model(num_key_value_heads=heads)
    session = check(model, text_inputs((26, 19)), kvweave.SnapKV(budget=0.3, window=4))
    assert session.cache.layers[0].keys.shape[1] == heads


def test_kv_heads_keep_different_tokens_and_are_read_so():
    session = check(text_model(), text_inputs((26,)), kvweave.SnapKV(budget=0.3, window=4))
    positions = session.cache.layers[0].positions
    assert not torch.equal(positions[:, 0], positions[:, 1])


@pytest.mark.parametrize("method", [*EVICTION.values()][:4], ids=[*EVICTION][:4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [(26,), (26, 19)], ids=["one", "batch"])
def test_pictures_and_positions_of_many_axes(method, attention, lengths):
    check(vision_model(attention=attention), picture_inputs(lengths), method)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["snapkv", "h2o"])
def test_half_precision(method, attention, dtype, tolerance):
    model, inputs = text_model(attention=attention, dtype=dtype), text_inputs((26, 19))
    plain = decode(model, inputs, 1)[1]
    follow = torch.randint(10, 96, (2, 5), generator=torch.Generator().manual_seed(3))
    with kvweave.compress(model, EVICTION[method]) as session:
        assert torch.equal(decode(model, inputs, 1)[1], plain)
        cache = session.cache
        assert cache.layers[0].keys.dtype == dtype
        assert cache.layers[0].mass.dtype == torch.float32
        mine = teacher_forced(model, inputs, follow, cache)
    with masked(model, cut_of(cache, 26)):
        plain_cache = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True).past_key_values
        expected = teacher_forced(model, inputs, follow, plain_cache)
    assert_close(mine, expected, tolerance)


def teacher_forced(model, inputs, follow, cache):
    """Logits of the tokens `follow`, fed one by one by hand after the prompt that is in `cache`."""
    mask, logits = inputs["attention_mask"], []
    for n in range(follow.shape[1]):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        position = mask.sum(1, keepdim=True) - 1
        with torch.no_grad():
            out = model(
                input_ids=follow[:, n : n + 1], attention_mask=mask, position_ids=position, past_key_values=cache
            )
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", EVICTION.values(), ids=EVICTION)
def test_decoding_by_hand_without_generate(method, attention):
    model, inputs = text_model(attention=attention), text_inputs((26, 19))
    follow = torch.randint(10, 96, (2, 6), generator=torch.Generator().manual_seed(3))
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    prefill = {**inputs, "position_ids": positions, "use_cache": True}
    with torch.no_grad(), kvweave.compress(model, method):
        first = model(**prefill)
        mine = teacher_forced(model, inputs, follow, first.past_key_values)
    assert isinstance(first.past_key_values, kvweave.CompressedCache)
    with torch.no_grad(), masked(model, cut_of(first.past_key_values, 26)):
        plain = model(**prefill)
        expected = teacher_forced(model, inputs, follow, plain.past_key_values)
    real = inputs["attention_mask"].bool()
    assert_close(first.logits[real], plain.logits[real])
    assert_close(mine, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_several_decoded_tokens_in_one_forward_see_the_kept_slots_and_each_other_causally(attention):
    """As when a draft of several tokens is verified: inside `generate`, or before a declared prompt's next end."""
    model, inputs = text_model(attention=attention), text_inputs((26, 19))
    follow = torch.randint(10, 96, (2, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(follow)], 1)
    step = {"input_ids": follow, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1)[:, -6:]}
    with torch.no_grad(), kvweave.compress(model, EVICTION["snapkv"]) as session:
        decode(model, inputs, 1)
        cut = cut_of(session.cache, 26)
        session.cache.declare_prompt(1000)
        mine = model(**step, past_key_values=session.cache).logits
        assert cut_of(session.cache, 26).bias[0].equal(cut.bias[0])  # nothing was cut yet
    with torch.no_grad(), masked(model, cut):
        plain = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True).past_key_values
        expected = model(**step, past_key_values=plain).logits
    assert_close(mine, expected)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "gemma3_text", "cohere2", "qwen3"])
def test_soft_caps_attention_sinks_and_sliding_neighbours(kind):
    special = {} if kind == "qwen3" else {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
    model = text_model(kind, attention="eager", **special)
    if kind == "gpt_oss":
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.sinks.copy_(torch.randn(4, generator=torch.Generator().manual_seed(0)) + 1)
    for name in ("snapkv", "h2o", "streaming_llm"):
        check(model, text_inputs((26, 19)), EVICTION[name])


def test_a_mask_of_the_users_own_is_read_at_the_kept_columns():
    """A four-dimensional mask that hides columns 3 to 5 from everything after them."""
    model, ids = text_model(), text_inputs((26,))["input_ids"]
    follow = torch.randint(10, 96, (1, 4), generator=torch.Generator().manual_seed(3))

    def mask(rows, columns):
        row, column = torch.arange(columns - rows, columns)[:, None], torch.arange(columns)
        seen = (column <= row) & ~((column >= 3) & (column < 6) & (row >= 6))
        return torch.zeros(rows, columns).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]

    def run(cache):
        cache = model(
            input_ids=ids, attention_mask=mask(26, 26), past_key_values=cache, use_cache=True
        ).past_key_values
        steps = [
            model(input_ids=follow[:, n : n + 1], attention_mask=mask(1, 27 + n), past_key_values=cache).logits[:, -1]
            for n in range(4)
        ]
        return torch.stack(steps, 1), cache

    with torch.no_grad(), kvweave.compress(model, kvweave.StreamingLLM(budget=14, sinks=8)):
        mine, cache = run(None)
    assert 4 in cache.layers[0].positions  # hidden, and kept: the mask has to hide it still
    with torch.no_grad(), masked(model, cut_of(cache, 26)):
        expected, _ = run(None)
    assert_close(mine, expected)


def test_images_of_many_sizes_beside_text_in_one_batch():
    """Rows of 12, 30 and 21 tokens, with pictures in all of them."""
    model, inputs = vision_model(), picture_inputs((12, 30, 21), pictures=1)
    for method in EVICTION.values():
        check(model, inputs, method)


def test_mrope_of_qwen2_vl_too():
    assert MROPE["mrope_section"] == [2, 1, 1]
    session = check(vision_model(kind="qwen2_vl"), picture_inputs((26, 19)), EVICTION["h2o"])
    assert torch.equal(session.cache.prompt.visual[:, :26], picture_inputs((26, 19))["input_ids"] == IMAGE)
