"""The caller's own empty DynamicCache is filled in place, and goes on where it was left."""

import pytest
import torch
from tiny import assert_close, cut_of, decode, masked, text_inputs, text_model, words
from transformers import DynamicCache

import kvweave

SNAP = kvweave.SnapKV(budget=0.3, window=4)
IDS = words(1, 30)
HALF = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}


def loop(model, cache, steps=6):
    """Greedy decoding by hand as transformers' documentation has it: the cache is the caller's variable."""
    step, logits = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, []
    for _ in range(steps):
        with torch.no_grad():
            out = model(**step, past_key_values=cache, use_cache=True)
        logits.append(out.logits[:, -1:])
        token = logits[-1].argmax(-1)
        step = {"input_ids": token, "attention_mask": torch.ones(1, step["attention_mask"].shape[1] + 1)}
    return torch.cat(logits, 1)


@pytest.mark.parametrize("made", ["of the config", "of nothing"])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_loop_of_transformers_documentation(kind, made):
    model = text_model(kind, attention="eager", **(HALF if kind == "gemma2" else {}))

    def empty():
        return DynamicCache(config=model.config) if made == "of the config" else DynamicCache()

    plain = loop(model, empty())
    for method in (kvweave.Full(), kvweave.SnapKV(budget=1.0)):
        cache = empty()
        with kvweave.compress(model, method) as session:
            assert_close(loop(model, cache), plain)
        assert session.cache is cache
        assert cache.get_seq_length() == 35
    cache = empty()
    with kvweave.compress(model, SNAP):
        mine = loop(model, cache)
    with masked(model, cut_of(cache, 30)):
        assert_close(mine, loop(model, DynamicCache(config=model.config)))


def test_generate_leaves_the_callers_cache_filled_and_a_second_turn_goes_on():
    model, cache = text_model(), DynamicCache(config=text_model().config)
    mine = kvweave.CompressedCache(model.config, SNAP)
    with kvweave.compress(model, SNAP):
        out = model.generate(IDS, past_key_values=cache, max_new_tokens=4)
        assert cache.get_seq_length() == 33
        assert cache.layers[0].positions.shape[-1] == 9 + 3
        more = torch.cat([out, words(1, 7, seed=2)], 1)
        again = model.generate(more, past_key_values=cache, max_new_tokens=4)
        model.generate(IDS, past_key_values=mine, max_new_tokens=4)
        assert torch.equal(model.generate(more, past_key_values=mine, max_new_tokens=4), again)
    assert isinstance(cache, kvweave.CompressedCache)
    assert torch.equal(cache.layers[1].positions, mine.layers[1].positions)


def test_used_outside_of_its_session_it_raises_and_attached_again_it_goes_on():
    model, cache, question = text_model(), DynamicCache(config=text_model().config), words(1, 3, seed=2)
    with torch.no_grad():
        with kvweave.compress(model, SNAP):
            model(input_ids=IDS, past_key_values=cache)
        with pytest.raises(RuntimeError, match="attach"):
            model(input_ids=question, past_key_values=cache)
        assert cache.get_seq_length() == 30
        with kvweave.attach(model):
            model(input_ids=question, past_key_values=cache)
    assert cache.get_seq_length() == 33


def test_attached_without_a_method_a_dynamic_cache_stays_what_it_is():
    model, cache = text_model(), DynamicCache(config=text_model().config)
    plain = loop(model, DynamicCache(config=model.config))
    with kvweave.attach(model):
        assert torch.equal(loop(model, cache), plain)
    assert type(cache) is DynamicCache


def test_what_generate_told_its_cache_before_the_first_forward_pass_is_kept():
    """Look-up asks sliding layers to record what a crop brings back (`activate_past_recording`)."""
    model = text_model("gemma2", attention="eager", **HALF)
    plain = decode(model, text_inputs((30,)), 12)[1]
    for method in (kvweave.Full(), SNAP):
        with kvweave.compress(model, method):
            greedy = decode(model, text_inputs((30,)), 12)[1]
            drafted = decode(model, text_inputs((30,)), 12, prompt_lookup_num_tokens=4)[1]
        assert_close(drafted, greedy)
        assert torch.equal(greedy, plain) == (method == kvweave.Full())


def test_a_cache_of_anothers_class_is_still_refused():
    class Mine(DynamicCache):
        pass

    model = text_model()
    with kvweave.compress(model, SNAP), pytest.raises(ValueError, match="Mine cannot be compressed"):
        model(input_ids=IDS, past_key_values=Mine(config=model.config))


def test_a_cache_is_made_for_a_configuration():
    with pytest.raises(TypeError, match=r"config=LlamaForCausalLM is no configuration .*: allowed is model\.config"):
        kvweave.CompressedCache(text_model(), SNAP)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_cache_of_a_model_of_another_depth_is_refused(layers):
    model = text_model()
    other = kvweave.CompressedCache(text_model(num_hidden_layers=layers).config, SNAP)
    with kvweave.attach(model), pytest.raises(ValueError, match=f"has {layers} layers, the model 2: allowed is"):
        model.generate(**text_inputs(images=()), past_key_values=other, max_new_tokens=2)


def test_a_conversation_goes_on_with_its_rows():
    model = text_model()
    cache = kvweave.CompressedCache(model.config, SNAP)
    with kvweave.attach(model):
        model(input_ids=words(1, 24), past_key_values=cache)
        with pytest.raises(ValueError, match="2 rows follow a cache of 1: allowed is as many, row for row"):
            model.generate(input_ids=words(2, 30), past_key_values=cache, max_new_tokens=2)
