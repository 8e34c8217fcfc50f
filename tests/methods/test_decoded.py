"""13.1 and 13.2 against the plain reference: what decoded tokens and probes add to every method's scores."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvweave
import reference
from strategies import (
    OPTIONS,
    PATTERNS,
    WRAPPED,
    assert_matches,
    batch,
    cases,
    for_reference,
    heads_of,
    pad,
    random_case,
    reference_layers,
    rotary_tables,
)

WITH_REFERENCE = [name for name in kvweave.list_methods() if name != "random"]
# Methods that keep the best by attention alone: no quota by modality, no runs of keys, no diversity.
BY_ATTENTION = ["adakv", "cam", "d2o", "flowmm", "h2o", "peak", "pyramidkv", "snapkv", "vlcache", "weave"]


def decoded_of(case, tokens, seed=0):
    """Queries and keys of as many tokens behind the prompt, one of each a layer."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like):
        shape = (*like.shape[:2], tokens, like.shape[3])
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(like.dtype)

    return [2 * normal(q) for q in case.queries], [normal(k) for k in case.keys]


def compress(name, case, budget, decoded, *, probed=False, **options):
    return kvweave.compress_tensors(
        kvweave.get_method(name, budget=budget, **options),
        case.queries,
        case.keys,
        case.values,
        visual=case.visual,
        valid=case.valid,
        rotary=case.rotary,
        decoded=decoded,
        probed=probed,
    )


def expected(name, case, budget, decoded, weight, **options):
    layers = reference_layers(case)
    for layer, queries, keys in zip(layers, *decoded, strict=True):
        layer.decoded, layer.decoded_weight = (queries[0].tolist(), keys[0].tolist()), weight
    wanted = {name: option for name, option in options.items() if name != "defer_weight"}
    return reference.compress(name, layers, budget, **for_reference(name, wanted))


@pytest.mark.parametrize(("tokens", "weight"), [(1, None), (2, None), (3, 0.8), (2, 0.0)])
@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_every_method_with_decoded_tokens_equals_its_reference(name, tokens, weight):
    case = random_case(PATTERNS["interleaved"](27), seed=3, layers=2)
    case = replace(case, rotary=rotary_tables(27, 8))
    decoded = decoded_of(case, tokens, seed=tokens)
    lam = tokens / (tokens + 4) if weight is None else weight
    for options in (OPTIONS[name][0], OPTIONS[name][-1]):
        options = {key: value for key, value in options.items() if key != "defer"}
        mine = compress(name, case, 0.35, decoded, defer=tokens, defer_weight=weight, **options)
        assert_matches(mine, expected(name, case, 0.35, decoded, lam, **options))


@pytest.mark.parametrize("name", ["weave", "peak"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_probes_are_scored_by_their_own_rule(name, tokens):
    """13.2"""
    case = random_case(PATTERNS["interleaved"](27), seed=4, layers=2)
    decoded = decoded_of(case, tokens)
    mine = compress(name, case, 0.35, decoded, probed=True, recent=4)
    assert_matches(mine, expected(name, case, 0.35, decoded, 0.0, recent=4, probed=True))


@pytest.mark.parametrize("allocation", ["global", "layer", "head"])
def test_kvzip_goes_by_probes_alone(allocation):
    """16.9: the largest attention of any probed row and head; without probes decoded rows join the prompt's."""
    case = random_case(PATTERNS["interleaved"](27), seed=4, layers=2)
    decoded = decoded_of(case, 5)
    mine = compress("kvzip", case, 0.35, decoded, probed=True, allocation=allocation)
    assert_matches(mine, expected("kvzip", case, 0.35, decoded, 0.0, probed=True, allocation=allocation))


FITTED = [*WRAPPED, *((name, options) for name in ("match", "weave2") for options in OPTIONS[name])]


@pytest.mark.parametrize("probed", [False, True])
@pytest.mark.parametrize(("name", "options"), FITTED, ids=str)
def test_decoded_tokens_are_reference_rows(name, options, probed):
    """15.3: behind the prompt's, weighed by lambda, on the prompt's slots alone."""
    case = replace(random_case(PATTERNS["interleaved"](23), seed=3, layers=2), rotary=rotary_tables(23, 8))
    decoded, options = decoded_of(case, 5), {key: value for key, value in options.items() if key != "defer"}
    mine = compress(name, case, 0.35, decoded, probed=probed, defer=5, **options)
    by_probes = {"probed": True} if probed and options.get("method") == "kvzip" else {}
    assert_matches(mine, expected(name, case, 0.35, decoded, 5 / 9, **options, **by_probes))


@pytest.mark.parametrize("name", BY_ATTENTION)
def test_what_decoded_tokens_look_at_stays(name):
    """Keys that every decoded query points at are kept by methods that score by attention."""
    case = random_case(PATTERNS["alternating"](40), seed=5, layers=1, kv_heads=1, heads=1)
    queries, keys = decoded_of(case, 4)
    direction = torch.zeros(8, dtype=torch.float64)
    direction[0] = 9.0
    case.keys[0][0, 0, [6, 7]] += direction
    queries[0][:] = direction
    mine = compress(name, case, 10, (queries, keys), defer=4, defer_weight=0.99)
    assert {6, 7} <= set(mine[0].positions[0, 0].tolist())


@given(data=st.data(), case=cases(min_length=4), share=st.floats(0.1, 0.9), front=st.integers(0, 4))
def test_padding_does_not_matter_to_decoded_tokens(data, case, share, front):
    name = data.draw(st.sampled_from(["weave", "snapkv", "h2o", "flowmm", "meda", "adakv"]))
    decoded = decoded_of(case, 2)
    other = case.map_heads(*[lambda x: x.flip(-2)] * 2)
    twice = tuple([torch.cat([x, x]) for x in part] for part in decoded)
    alone = compress(name, case, share, decoded, defer=2)
    padded = compress(name, batch([pad(case, front, garbage=1e4), pad(other, front)]), share, twice, defer=2)
    for layer, want in zip(heads_of(padded, offset=front), heads_of(alone), strict=True):
        assert [head.positions for head in layer] == [head.positions for head in want]


@given(case=cases(min_length=4), share=st.floats(0.1, 0.9))
def test_a_weight_of_zero_is_the_method_as_published(case, share):
    for name in ("weave", "snapkv", "h2o"):
        with_them = compress(name, case, share, decoded_of(case, 3), defer=3, defer_weight=0.0)
        without = compress(name, case, share, None, defer=0)
        for layer, want in zip(heads_of(with_them), heads_of(without), strict=True):
            assert [head.positions for head in layer] == [head.positions for head in want]


def test_a_deferring_method_without_decoded_tokens_cuts_as_if_it_did_not():
    case = random_case(PATTERNS["interleaved"](27), seed=6)
    mine, plain = compress("weave", case, 0.3, None), compress("weave", case, 0.3, None, defer=0)
    for layer, want in zip(mine, plain, strict=True):
        assert torch.equal(layer.keys, want.keys)


def test_weave_says_what_it_did():
    """Heaviest entry, share of tokens merged, pivots that are protected."""
    case = random_case(PATTERNS["interleaved"](40), seed=7, layers=1)
    method = kvweave.Weave(budget=20, recent=4, proxies=4, defer=0, sensitivity_quantile=0.25)
    view = kvweave.LayerView(
        case.keys[0],
        case.values[0],
        case.queries[0],
        torch.arange(40).expand(1, 2, 40),
        torch.ones(1, 2, 40),
        case.visual[:, None].expand(1, 2, 40),
        kvweave.ops.statistics.AttentionRule(8**-0.5),
    )
    plan = method.plan(view, 20)
    assert float(plan.log["merged_share"]) == 0.5
    assert float(plan.log["protected_pivots"]) == 12  # of 16 pivots the four least important absorb
    assert float(plan.log["heaviest_mass"]) == float(plan.merge.mass.max()) > 1
    assert set((plan.merge.mass > 1).sum(-1).flatten().tolist()) <= set(range(1, 5))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"defer": -1}, "defer=-1"),
        ({"defer": 1.5}, "defer=1.5"),
        ({"defer": True}, "defer=True"),
        ({"defer_weight": 1}, "[0, 1)"),
        ({"defer_weight": -0.1}, "defer_weight=-0.1"),
        ({"redecode": True}, "redecode=True"),
        ({"redecode": 1, "defer": 2}, "redecode=1"),
    ],
)
@pytest.mark.parametrize("name", ["snapkv", "streaming_llm", "full"])
def test_options_out_of_range_are_refused(name, options, words):
    with pytest.raises(ValueError) as caught:
        kvweave.get_method(name, **options)
    assert words in str(caught.value)


def test_decoded_tokens_that_do_not_fit_are_refused():
    case = random_case(PATTERNS["interleaved"](12), layers=2)
    queries, keys = decoded_of(case, 2)
    for wrong, options in [
        ((queries, keys), {"defer": 3}),
        ((queries[:1], keys), {"defer": 2}),
        ((keys, queries), {"defer": 2}),
        ((queries, keys), {"defer": 0}),
    ]:
        with pytest.raises(ValueError, match="decoded"):
            compress("snapkv", case, 0.5, wrong, **options)


def test_the_wrapper_defers_as_what_it_wraps():
    assert kvweave.Quantized(kvweave.Weave(form="spelled")).defer == 2
    assert kvweave.Quantized(kvweave.Weave()).defer == kvweave.Weave().defer == 8
    assert kvweave.Quantized(kvweave.SnapKV(), defer=3).method.defer == 3
    assert replace(kvweave.Quantized(kvweave.Weave()), defer=0).method == kvweave.Weave(defer=0)
    spelled = kvweave.parse_method("quantized:method=snapkv,defer=4,defer_weight=0.5,bits=8")
    assert (spelled.defer, spelled.defer_weight, spelled.bits) == (4, 0.5, 8)
    assert kvweave.method_from_dict(spelled.to_dict()) == spelled
    assert kvweave.parse_method(spelled.spelling()) == spelled


def test_a_temperature_softens_what_decoded_tokens_attend_to():
    """13.3: their logits are divided by it, in tensors as in the cache; probes' are not."""
    case = random_case(PATTERNS["interleaved"](40), seed=6, layers=1)
    queries, keys = decoded_of(case, 2)
    cooler = [q / 4 for q in queries], keys
    hot = compress("weave", case, 0.3, (queries, keys), temperature=4.0, recent=2)
    same = compress("weave", case, 0.3, cooler, temperature=1.0, recent=2)
    sharp = compress("weave", case, 0.3, (queries, keys), temperature=1.0, recent=2)
    assert torch.equal(hot[0].positions, same[0].positions)
    assert not torch.equal(hot[0].positions, sharp[0].positions)
    probed = [
        compress("weave", case, 0.3, (queries, keys), probed=True, temperature=t, recent=2)[0].positions
        for t in (1.0, 4.0)
    ]
    assert torch.equal(*probed)
