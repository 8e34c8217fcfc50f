"""Every method against its plain reference: the same positions, the same entries, the same mass and flow."""

from dataclasses import replace
from functools import cache

import pytest
import torch

import kvweave
import reference
from strategies import (
    PATTERNS,
    SYMMETRIC,
    WRAPPED,
    assert_matches,
    batch,
    compress,
    for_reference,
    kept,
    names_and_options,
    pad,
    random_case,
    reference_layers,
    registered,
    rotary_tables,
    spelled,
)

# name: (pattern, length, budget, shape and numbers)
SCENARIOS = {
    "share": ("interleaved", 24, 0.5, {"seed": 1}),
    "float32": ("interleaved", 29, 0.3, {"seed": 2, "dtype": torch.float32, "sharpness": 2.0}),
    "one head": ("image first", 21, 0.4, {"seed": 3, "layers": 1, "heads": 1, "kv_heads": 1, "dim": 4}),
    "wide groups": (
        "image last",
        19,
        9,
        {"seed": 4, "layers": 2, "heads": 6, "kv_heads": 2, "sharpness": 3.0},
    ),
    "no groups": ("alternating", 17, 0.7, {"seed": 5, "layers": 2, "heads": 3, "kv_heads": 3}),
    "longer than a window": ("interleaved", 50, 0.25, {"seed": 6, "layers": 2}),
    "tiny": ("interleaved", 24, 0.01, {"seed": 7}),
    "two": ("image first", 24, 2, {"seed": 8, "layers": 4}),
    "three": ("alternating", 24, 3, {"seed": 9}),
    "all but one": ("interleaved", 20, 19, {"seed": 10}),
    "everything": ("interleaved", 20, 1.0, {"seed": 11}),
    "more than everything": ("interleaved", 20, 99, {"seed": 12, "dtype": torch.float32}),
    "all text": ("all text", 20, 0.4, {"seed": 13}),
    "all visual": ("all visual", 20, 0.4, {"seed": 14}),
    "one visual token": ("one visual token", 20, 0.4, {"seed": 15, "sharpness": 0.3}),
    "one token": ("all text", 1, 0.5, {"seed": 16}),
    "two tokens": ("alternating", 2, 0.5, {"seed": 17}),
    "sharp": ("interleaved", 27, 0.35, {"seed": 18, "sharpness": 8.0}),
}


@cache
def tensors_of(scenario, rotary):
    """A scenario, and its layers as lists: they compute attention once, however many methods read it."""
    pattern, length, _, shape = SCENARIOS[scenario]
    case = random_case(PATTERNS[pattern](length), **shape)
    if rotary:
        case = replace(case, rotary=rotary_tables(length, case.keys[0].shape[-1]))
    return case, reference_layers(case)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, id=f"{name}:{spelled(options)}")
        for name, options in names_and_options()
        if name != "random"
    ],
)
def test_method_equals_its_reference(name, options, scenario):
    budget = SCENARIOS[scenario][2]
    case, plain = tensors_of(scenario, True)
    if name in SYMMETRIC and scenario == "two tokens":
        budget = 1.0  # both are as far from their mean: which one stays is rounding
    layers = compress(name, case, budget, **options)
    expected = reference.compress(name, plain, budget, **for_reference(name, options))
    assert_matches(layers, expected)
    for layer, want in zip(layers, expected, strict=True):
        assert layer.keys.dtype == case.keys[0].dtype
        assert layer.mass.dtype == torch.float32
        assert layer.positions.dtype == torch.int64
        assert layer.positions.shape[-1] == max(len(head.positions) for head in want.heads)
        if want.flow is not None:
            assert layer.flow == pytest.approx(want.flow, abs=1e-5)


# Few, for they are slow: what is wrapped is tested above.
FEW = ["share", "float32", "wide groups", "three", "all but one", "everything", "all visual", "one token", "sharp"]


@pytest.mark.parametrize("scenario", FEW)
@pytest.mark.parametrize(("name", "options"), [pytest.param(*of, id=f"{of[0]}:{spelled(of[1])}") for of in WRAPPED])
def test_wrapper_equals_its_reference(name, options, scenario):
    test_method_equals_its_reference(name, options, scenario)


def test_every_method_has_a_reference():
    assert set(kvweave.list_methods()) - {"random"} <= set(reference.METHODS)


def test_the_registry_is_sorted_and_each_name_leads_to_its_method():
    assert kvweave.list_methods() == sorted(kvweave.list_methods())
    assert [kvweave.get_method(name).name for name in kvweave.list_methods()] == kvweave.list_methods()


# One set of options a method is enough for what follows: the last one, which is never the plain default.
LAST = {name: options for name, options in names_and_options() if name != "random"}


@pytest.mark.parametrize("sizes", [[(13, 0), (0, 0), (6, 0)], [(4, 3), (0, 9), (0, 0)]], ids=["left", "right"])
@pytest.mark.parametrize("name", LAST)
def test_rows_of_different_length_in_one_padded_batch(name, sizes):
    """12.19: each row as its own reference, whatever lies in the padding."""
    options = LAST[name]
    rows = []
    for number, (front, back) in enumerate(sizes):
        length = 26 - front - back
        case = random_case(PATTERNS["interleaved"](length), layers=2, seed=100 + number, dtype=torch.float32)
        rows.append(replace(case, rotary=rotary_tables(length, 8)))
    padded = batch([pad(row, *size, garbage=1e4) for row, size in zip(rows, sizes, strict=True)])
    layers = compress(name, padded, 0.4, **options)
    for number, (case, (front, _)) in enumerate(zip(rows, sizes, strict=True)):
        expected = reference.compress(name, reference_layers(case), 0.4, **for_reference(name, options))
        assert_matches(layers, expected, row=number, offset=front)


@pytest.mark.parametrize("name", registered("d2o", "vlcache"))
def test_the_least_layer_budget_binds(name):
    """2.3: floor(L / 100), here two: one layer's statistic is far from the others', the budget is small."""
    options = {"d2o": {"var_norm": "none"}, "vlcache": {"p": 0.9}}[name]
    sharp = random_case([i % 9 < 4 for i in range(207)], layers=1, heads=1, kv_heads=1, dim=4, seed=1, sharpness=9.0)
    flat = random_case([i % 9 < 4 for i in range(207)], layers=1, heads=1, kv_heads=1, dim=4, seed=2, sharpness=0.0)
    case = replace(sharp, queries=sharp.queries + flat.queries, keys=sharp.keys * 2, values=sharp.values * 2)
    expected = reference.compress(name, reference_layers(case), 5, **options)
    assert [len(layer.heads[0].positions) for layer in expected] == [2, 8]
    assert_matches(compress(name, case, 5, **options), expected)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("name", registered("mixkv"))
def test_redundancy_of_few_similar_keys(name, seed):
    """10.7: on short prompts with keys that lean one way, r decides, and so does its divisor L - 1."""
    case = random_case([False] * (5 + seed % 4), layers=2, seed=seed, sharpness=0.1)
    case = replace(case, keys=[k + 0.8 for k in case.keys])
    assert_matches(compress(name, case, 2, window=1), reference.compress(name, reference_layers(case), 2, window=1))


# One row of uniform attention is the same number in every column, whatever the order of summation.
ONE_ROW = {
    "snapkv": {"window": 1, "kernel": 1},
    "pyramidkv": {"window": 1, "kernel": 1},
    "adakv": {"window": 1, "kernel": 1},
    "mixkv": {"window": 1, "kernel": 1},
    "madakv": {"proxies": 1},
    "flowmm": {"proxies": 1, "flow": "cross", "merge_rule": "average", "modality_floor": 9},
    "weave": {"proxies": 1, "recent": 3, "defer": 0},
}


@pytest.mark.parametrize("name", LAST)
def test_equal_scores_keep_the_lower_positions(name):
    """1, Ties: with zero keys attention is uniform and every cosine is zero."""
    options = ONE_ROW.get(name, LAST[name])
    case = random_case(PATTERNS["interleaved"](23), layers=2, seed=31)
    case = replace(case, keys=[torch.zeros_like(k) for k in case.keys], rotary=rotary_tables(23, 8))
    layers = compress(name, case, 0.4, **options)
    assert_matches(layers, reference.compress(name, reference_layers(case), 0.4, **for_reference(name, options)))


@pytest.mark.parametrize("name", LAST)
def test_scaling_replaces_the_default(name):
    options = LAST[name]
    case = random_case(PATTERNS["interleaved"](25), layers=2, seed=41)
    case = replace(case, scaling=1.3, rotary=rotary_tables(25, 8))
    layers = compress(name, case, 0.3, **options)
    assert_matches(layers, reference.compress(name, reference_layers(case), 0.3, **for_reference(name, options)))


@pytest.mark.parametrize("name", LAST)
def test_half_precision_is_decided_in_full_and_cast_once(name):
    """1: statistics in fp32 or wider; 2.2: accumulate wide, cast once (bfloat16 keeps 8 bits)."""
    options = LAST[name]
    case = random_case(PATTERNS["interleaved"](25), layers=2, seed=51, dtype=torch.bfloat16)
    case = replace(case, rotary=rotary_tables(25, 8))
    layers = compress(name, case, 0.4, **options)
    expected = reference.compress(name, reference_layers(case), 0.4, **for_reference(name, options))
    assert_matches(layers, expected, tolerance=2**-8)
    assert layers[0].keys.dtype == torch.bfloat16


@pytest.mark.parametrize("tables", ["partial", "scaled", "several axes"])
@pytest.mark.parametrize("name", registered("flowmm", "weave", "lookm", "meda", "d2o", "kvmerger"))
def test_rope_aware_merge_with_other_tables(name, tables):
    """4.2: partial rotary, tables with a factor folded in (YaRN), angles that follow no position."""
    options = {"rope_aware": True}
    case = random_case(PATTERNS["interleaved"](24), layers=2, seed=61)
    turned = {
        "partial": rotary_tables(24, 4),
        "scaled": rotary_tables(24, 8, scale=1.4),
        "several axes": rotary_tables(24, 8, seed=5),
    }
    case = replace(case, rotary=turned[tables])
    layers = compress(name, case, 0.4, **options)
    assert_matches(layers, reference.compress(name, reference_layers(case), 0.4, **options))
    plain = compress(name, case, 0.4)
    assert any(not torch.equal(a.keys, b.keys) for a, b in zip(layers, plain, strict=True))


def test_a_float_and_an_int_budget_mean_different_things():
    """A share of one is everything, one token is one token."""
    case = random_case(PATTERNS["interleaved"](12), layers=1, seed=71)
    assert len(kept(compress("h2o", case, 1.0)[0], 0, 0).positions) == 12
    assert len(kept(compress("h2o", case, 1)[0], 0, 0).positions) == 1


@pytest.mark.parametrize(("share", "length", "tokens"), [(0.29, 100, 29), (0.3, 10, 3), (0.1, 7, 1), (0.999, 10, 9)])
def test_shares_are_floored_with_a_guard(share, length, tokens):
    case = random_case([False] * length, layers=1, heads=1, kv_heads=1, seed=81)
    assert len(kept(compress("streaming_llm", case, share)[0], 0, 0).positions) == tokens


@pytest.mark.parametrize(("budget", "tokens"), [("1KiB", 4), ("1500B", 5), ("1GiB", 20)])
def test_bytes_count_keys_and_values_over_layers_and_heads(budget, tokens):
    """2 layers x 2 KV heads x 8 channels x 4 bytes x 2 (keys, values) = 256 bytes a token."""
    case = random_case(PATTERNS["interleaved"](20), layers=2, seed=91, dtype=torch.float32)
    for layer in compress("h2o", case, budget):
        assert layer.positions.shape[-1] == tokens


# ---------------------------------------------------------------- CaM's drawn mode, by its properties


@pytest.mark.parametrize("cam", registered("cam"))
def test_sampled_cam_adds_a_whole_share_or_nothing(cam):
    """10.8: z is 0 or 1, seeded; keys and positions are H2O's; the expected mode is its mean."""
    case = random_case(PATTERNS["interleaved"](20), layers=1, seed=5)
    h2o, expected = compress("h2o", case, 0.5), compress(cam, case, 0.5, mode="expected", window=1)
    drawn = [compress(cam, case, 0.5, mode="sample", window=1, seed=seed) for seed in range(200)]
    again = compress(cam, case, 0.5, mode="sample", window=1, seed=7)
    assert torch.equal(again[0].values, drawn[7][0].values)
    assert any(not torch.equal(drawn[0][0].values, other[0].values) for other in drawn)
    for sample in drawn:
        assert torch.equal(sample[0].positions, h2o[0].positions)
        assert torch.equal(sample[0].keys, h2o[0].keys)
        assert torch.equal(sample[0].mass, h2o[0].mass)
    for kv in range(2):
        original = kept(h2o[0], 0, kv)
        evicted = [t for t in range(20) if t not in original.positions]
        for slot, position in enumerate(original.positions):
            before = max([p for p in original.positions if p < position], default=-1)
            sources = [t for t in evicted if before < t < position]  # window=1: the next kept token takes all
            sums = [torch.zeros(8, dtype=torch.float64)]
            for t in sources:
                sums += [s + case.values[0][0, kv, t] for s in sums]
            for sample in drawn[:20]:
                added = kept(sample[0], 0, kv).values[slot] - original.values[slot]
                assert any(torch.allclose(added, s, atol=1e-9) for s in sums)
        mean = torch.stack([kept(sample[0], 0, kv).values for sample in drawn]).mean(0)
        assert (mean - kept(expected[0], 0, kv).values).abs().max() < 0.6  # five standard errors
