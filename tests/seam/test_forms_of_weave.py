"""What `weave` leaves to the model it works on: its form, and the profile that is shipped for that model."""

import json

import pytest
import torch
from tiny import decode, text_inputs, text_model

import kvweave
from kvweave.methods import allocation
from kvweave.methods.allocation import Profile
from kvweave.seam.profiles import model_mark

INPUTS = text_inputs((40,))
LENT = "weave:form=lent,budget=0.25"


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder of shipped profiles with one for the tiny model: the second KV head of each layer wants most."""
    monkeypatch.setattr(allocation, "SHIPPED", tmp_path)
    monkeypatch.setattr("kvweave.seam.profiles.SHIPPED", tmp_path)
    Profile(model_mark(text_model()), (0.5, 0.1), ((((0.1, 0.9),) * 2), (((0.02, 0.18),) * 2))).write(
        str(tmp_path / "tiny.json")
    )
    return tmp_path


def kept(cache):
    return [layer.positions.tolist() for layer in cache.layers]


def filled(method):
    """The cache of a prompt and ten tokens behind it."""
    model = text_model()
    with kvweave.compress(model, method) as session:
        decode(model, INPUTS, steps=10)  # the last of them is not read
    return session


def test_a_budget_alone_is_lent_and_pooled_on_a_model():
    mine, spelled = filled(kvweave.Weave(budget=0.25)), filled(LENT)
    assert kept(mine.cache) == kept(spelled.cache)
    assert mine.cache.method == mine.method == kvweave.Weave(budget=0.25)
    report = json.loads(json.dumps(mine.report))
    assert report["method"] == kvweave.Weave(budget=0.25).to_dict()
    assert kvweave.parse_method(report["works_as"]) == kvweave.parse_method(LENT)
    assert report["deferred"] == 8
    assert "works_as" not in spelled.report


@pytest.mark.parametrize("spelled", ["weave:form=spelled", "weave:merge=true", "weave:defer=2", "weave:recent=16"])
def test_with_any_option_spelled_it_is_what_is_spelled(spelled):
    """SPEC 13.3, on a model as without one."""
    session = filled(kvweave.parse_method(spelled, budget=0.25))
    assert session.report["deferred"] == 2
    assert session.report["totals"]["merged"] > 0
    assert "works_as" not in session.report


def test_without_a_model_it_is_the_specifications():
    draw = torch.Generator().manual_seed(3)
    tensors = [torch.randn(1, heads, 30, 8, generator=draw) for heads in (4, 2, 2)]
    visual = torch.zeros(1, 30, dtype=torch.bool)
    (bare,) = kvweave.compress_tensors(kvweave.Weave(budget=0.3), *([x] for x in tensors), visual=visual)
    own = kvweave.parse_method("weave:form=spelled,budget=0.3")
    (spelled,) = kvweave.compress_tensors(own, *([x] for x in tensors), visual=visual)
    assert torch.equal(bare.positions, spelled.positions)
    assert torch.equal(bare.mass, spelled.mass)
    assert bare.mass.max() > 1


def test_the_profile_that_is_shipped_for_the_model_is_used(shipped):
    session = filled(kvweave.Weave(budget=0.25))
    works = kvweave.parse_method(session.report["works_as"])
    assert (works.allocation, works.profile) == ("profile", "tiny")
    assert kept(session.cache) == kept(filled(works).cache)
    assert kept(session.cache) != kept(filled(LENT).cache)


def test_another_models_profile_is_not_used(shipped):
    other = text_model("qwen2")
    with kvweave.compress(other, budget=0.25) as session:
        decode(other, INPUTS, steps=10)
    assert kvweave.parse_method(session.report["works_as"]).allocation == "global"


def test_caches_of_ones_own_and_wrappers_too(shipped, tmp_path):
    model, expected = text_model(), filled(kvweave.Weave(budget=0.25))
    cache = kvweave.CompressedCache(model.config, kvweave.Weave(budget=0.25))
    with kvweave.attach(model):
        decode(model, INPUTS, past_key_values=cache, steps=10)
        cache.save(tmp_path / "cache.safetensors")
        read = kvweave.CompressedCache.load(tmp_path / "cache.safetensors", model)
    assert kept(cache) == kept(read) == kept(expected.cache)
    assert read.report["works_as"] == cache.report["works_as"] == expected.report["works_as"]
    packed = filled("quantized:method=weave,budget=0.25,bits=8")
    assert packed.report["works_as"].startswith("quantized:")
    assert kept(packed.cache) == kept(expected.cache)


def test_every_head_keeps_as_many_in_the_even_form():
    layers = filled("weave:form=even,budget=0.25").cache.layers
    assert all((layer.positions >= 0).all() for layer in layers)
    assert {layer.positions.shape[-1] for layer in layers} == {10 + 9}  # and what was decoded and read
    assert all(layer.bias is None for layer in layers)


@pytest.mark.parametrize("probes", [None, "replay"])
def test_a_profile_alone_shares_out_what_a_deferred_cut_keeps(shipped, probes):
    """Of a prompt that is read again heads compete instead: the profile is of what decoded tokens look at."""
    model, method = text_model(), kvweave.parse_method("weave:form=lent,allocation=profile,profile=tiny,mix=0")
    with kvweave.compress(model, method, probes=probes) as session:
        decode(model, text_inputs((40, 25)), steps=10)
    with kvweave.compress(model, "weave:form=lent", probes=probes) as competing:
        decode(model, text_inputs((40, 25)), steps=10)
    for row, length in enumerate((40, 25)):
        budget = length // 5
        one, other = (
            [tuple(((layer.positions[row] >= 0).sum(-1) - 9).tolist()) for layer in each.cache.layers]
            for each in (session, competing)
        )
        wanted = allocation.profile_counts("tiny", 2, method.quota(budget, budget), length)
        assert one == (other if probes else wanted)
        assert other != wanted
        assert sum(map(sum, one)) == 4 * budget
