"""A forward pass and `generate` are read alike, whichever of transformers' names they are called by."""

import re
from pathlib import Path

import pytest
import torch
from tiny import decode, text_inputs, text_model, words
from transformers import DynamicCache

import kvweave
from kvweave.seam import names

SNAP = kvweave.SnapKV(budget=0.25, window=4)
INPUTS = text_inputs((24,))
BOTH = pytest.mark.parametrize("name", ["cache", "past_key_values"])


@BOTH
def test_a_forward_pass_takes_its_cache_under_either_name(name):
    model = text_model()
    with torch.no_grad(), kvweave.attach(model):
        cache = kvweave.CompressedCache(model.config, SNAP)
        model(**INPUTS, **{name: cache})
        after = model(input_ids=words(1, 1), **{name: cache}).logits
        other = kvweave.CompressedCache(model.config, SNAP)
        model(INPUTS["input_ids"], INPUTS["attention_mask"], None, other)
        assert torch.equal(model(words(1, 1), None, None, other).logits, after)
    assert cache.report["totals"]["kept"] == 12
    assert cache.get_seq_length() == 25


@BOTH
def test_generate_takes_its_cache_under_either_name(name):
    model = text_model()
    with kvweave.compress(model, SNAP):
        expected = model.generate(**INPUTS, max_new_tokens=4)
    with kvweave.attach(model):
        cache = kvweave.CompressedCache(model.config, SNAP)
        assert torch.equal(model.generate(**INPUTS, max_new_tokens=4, **{name: cache}), expected)
    assert cache.report["totals"]["kept"] == 12


@BOTH
def test_a_plain_cache_under_either_name_passes_through_what_is_attached_without_a_method(name):
    model = text_model()
    plain = model(**INPUTS, use_cache=True).past_key_values
    with torch.no_grad(), kvweave.attach(model):
        cache = DynamicCache(config=model.config)
        model(**INPUTS, **{name: cache})
    assert torch.equal(cache.layers[1].keys, plain.layers[1].keys)


def test_two_caches_under_two_names_are_refused_and_one_is_not():
    model = text_model()
    with torch.no_grad(), kvweave.attach(model):
        one, two = (kvweave.CompressedCache(model.config, SNAP) for _ in range(2))
        with pytest.raises(ValueError, match="cache and past_key_values are two caches"):
            model(**INPUTS, cache=one, past_key_values=two)
        with pytest.raises(ValueError, match="two caches"):
            model.generate(**INPUTS, cache=one, past_key_values=two)
        model(**INPUTS, cache=one, past_key_values=one)
    assert one.report["totals"]["kept"] == 12


def test_two_files_spell_transformers_names():
    package = Path(kvweave.__file__).parent
    spelled = re.compile(
        r"""["'](past_key_values|cache_params|position_embeddings)["']|_attn_implementation|rotate_half"""
    )
    for path in [*package.glob("seam/*.py"), *package.glob("evals/**/*.py"), *package.glob("cut/*.py")]:
        if path.name in ("names.py", "lookup.py"):
            continue
        found = [line for line in path.read_text().splitlines() if spelled.search(line)]
        assert not found, f"{path.name} spells transformers' names: {found}"


def test_the_name_of_this_versions_cache_is_the_one_that_forward_takes():
    assert names.Signature.of(text_model()).cache == names.CACHE


def test_what_is_decoded_under_the_new_name_is_what_the_old_one_gives():
    model = text_model()
    with kvweave.compress(model, SNAP):
        _, logits = decode(model, INPUTS)
        for name in ("cache", "past_key_values"):
            assert torch.equal(decode(model, INPUTS, **{name: DynamicCache(config=model.config)})[1], logits)
