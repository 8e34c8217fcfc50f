"""METHODS.md section 12, the part that concerns compress_tensors: what holds for every prompt."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import kvweave
import reference
from strategies import (
    FITTED,
    LAYER_ADAPTIVE,
    MERGING,
    NARROW,
    SYMMETRIC,
    assert_close,
    assert_matches,
    assert_same,
    batch,
    budgets,
    cases,
    compress,
    for_reference,
    heads_of,
    is_ragged,
    options_of,
    pad,
    pools,
    reference_layers,
    registered,
    rotary_tables,
    shares,
    uses_budget,
)

every_method = pytest.mark.parametrize("name", kvweave.list_methods())
every_adaptive = pytest.mark.parametrize("name", registered(*sorted(LAYER_ADAPTIVE)))
every_merging = pytest.mark.parametrize("name", registered(*sorted(MERGING)))

# Where a reordered sum may turn a comparison, a property of exact arithmetic holds for these only up to ties.
EVICTS_NOTHING = {"lookm", "meda", "weave", "kvmerger", "chelsea"}
CONVEX = {"similarity", "average", "pivotal", "importance"}


def not_tied(name: str, case) -> bool:
    """Two tokens are as far from their mean, which one stays is rounding."""
    return name not in SYMMETRIC or case.length != 2


def is_convex(options: dict) -> bool:
    """12.5: weighted, value_scale and re-phased keys leave the hull."""
    return not (options.get("merge_rule") == "weighted" or options.get("value_scale") or options.get("rope_aware"))


# ---------------------------------------------------------------- every method


@pytest.mark.parametrize("name", [name for name in kvweave.list_methods() if name != "random"])
@given(data=st.data(), case=cases(), budget=budgets)
def test_any_prompt_equals_its_reference(name, data, case, budget):
    assume(not_tied(name, case))
    options = data.draw(options_of(name))
    expected = reference.compress(name, reference_layers(case), budget, **for_reference(name, options))
    assert_matches(compress(name, case, budget, **options), expected)


@every_method
@given(data=st.data(), case=cases())
def test_the_whole_budget_returns_the_input(name, data, case):
    """12.1"""
    layers = compress(name, case, 1.0, **data.draw(options_of(name)))
    for layer, keys, values in zip(layers, case.keys, case.values, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
        assert torch.equal(layer.positions, torch.arange(case.length).expand(layer.positions.shape))
        assert torch.equal(layer.mass, torch.ones_like(layer.mass))


@every_method
@given(data=st.data(), case=cases(), budget=budgets)
def test_counts_are_exact(name, data, case, budget):
    """12.2"""
    options = data.draw(options_of(name))
    counts = [[len(head.positions) for head in heads] for heads in heads_of(compress(name, case, budget, **options))]
    assert all(1 <= count <= case.length for heads in counts for count in heads) or is_ragged(name, options)
    if not uses_budget(name, options):
        return
    B = reference.budget_tokens(budget, case.length)
    assert sum(map(sum, counts)) == len(counts) * case.kv_heads * B
    if pools(name, options):
        return
    if is_ragged(name, options):
        assert all(sum(heads) == case.kv_heads * B for heads in counts) or name in LAYER_ADAPTIVE
    elif name in LAYER_ADAPTIVE:
        assert all(len(set(heads)) == 1 for heads in counts)
    else:
        assert all(count == B for heads in counts for count in heads)


@every_method
@given(data=st.data(), case=cases(), budget=budgets)
def test_positions_ascend_and_mass_adds_up(name, data, case, budget):
    """12.3; empty slots come first."""
    options = data.draw(options_of(name))
    layers = compress(name, case, budget, **options)
    for layer in layers:
        for kv in range(case.kv_heads):
            positions = layer.positions[0, kv].tolist()
            filled = [p for p in positions if p >= 0]
            assert positions == [-1] * (len(positions) - len(filled)) + sorted(set(filled))
            assert max(filled, default=0) < case.length
            mass = layer.mass[0, kv][layer.positions[0, kv] >= 0]
            assert not layer.mass[0, kv][layer.positions[0, kv] < 0].any()
            assert bool((mass >= 1).all())
            assert torch.equal(mass, mass.round())
            assert mass.sum() <= case.length
            if name in EVICTS_NOTHING and options.get("merge", True):
                assert mass.sum() == case.length
            if name not in MERGING | {"weave2"}:
                assert torch.equal(mass, torch.ones_like(mass))
        assert not layer.keys.isnan().any()
        assert not layer.values.isnan().any()


@every_method
@given(data=st.data(), case=cases(), budget=budgets)
def test_entries_without_members_are_copies(name, data, case, budget):
    """12.4"""
    options = data.draw(options_of(name))
    for number, heads in enumerate(heads_of(compress(name, case, budget, **options))):
        for kv, head in enumerate(heads):
            for slot, position in enumerate(head.positions):
                if head.mass[slot] == 1:
                    assert torch.equal(head.keys[slot], case.keys[number][0, kv, position])
                    if name != "cam" and name not in FITTED:
                        assert torch.equal(head.values[slot], case.values[number][0, kv, position])


@every_merging
@given(data=st.data(), case=cases(), budget=budgets)
def test_merged_entries_stay_inside(name, data, case, budget):
    """12.5, with the bounds of all tokens an entry could have taken."""
    options = data.draw(options_of(name).filter(is_convex))
    for number, heads in enumerate(heads_of(compress(name, case, budget, **options))):
        for kv, head in enumerate(heads):
            for entries, original in ((head.keys, case.keys), (head.values, case.values)):
                tokens = original[number][0, kv]
                assert bool((entries <= tokens.amax(0) + 1e-5).all())
                assert bool((entries >= tokens.amin(0) - 1e-5).all())


@every_method
@given(data=st.data(), case=cases(), budget=budgets)
def test_same_input_same_output_and_the_input_is_untouched(name, data, case, budget):
    assume(not_tied(name, case))
    options = data.draw(options_of(name))
    before = case.map_heads(torch.clone, torch.clone)
    first = heads_of(compress(name, case, budget, **options))
    assert all(map(torch.equal, case.queries + case.keys + case.values, before.queries + before.keys + before.values))
    strided = case.map_heads(*[lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)] * 2)
    assert_same(heads_of(compress(name, case, budget, **options)), first)
    assert_same(heads_of(compress(name, strided, budget, **options)), first, tolerance=1e-5)


@every_method
@given(data=st.data(), case=cases(), budget=budgets, front=st.integers(0, 5), back=st.integers(0, 3))
def test_padding_does_not_matter(name, data, case, budget, front, back):
    """12.19, whatever the padded slots hold, on either side."""
    assume(not_tied(name, case))
    options = data.draw(options_of(name))
    garbage = data.draw(st.sampled_from([0.0, 3.0, -1e4, 1e18, 1e30]))
    alone = heads_of(compress(name, case, budget, **options))
    padded = compress(name, pad(case, front, back, garbage), budget, **options)
    assert_same(heads_of(padded, offset=front), alone, tolerance=1e-5)
    for layer in padded:
        assert not layer.keys.isnan().any()


@every_method
@given(data=st.data(), case=cases(min_length=4), share=shares)
def test_rows_of_a_batch_do_not_meet(name, data, case, share):
    """12.19: the row beside a longer one and beside itself, and in any order."""
    options = data.draw(options_of(name))
    L = case.length
    other = case.map_heads(*[lambda x: x.flip(-2).roll(1, 1)] * 2)
    long = replace(
        case.map_heads(*[lambda x: torch.cat([x, x.roll(1, -1)], -2)] * 2),
        visual=case.visual.repeat(1, 2),
        rotary=rotary_tables(2 * L, case.keys[0].shape[-1]),
    )
    rows = [pad(case, L), pad(long, 0), pad(other, L)]
    layers = compress(name, batch(rows), share, **options)
    for row, (alone, offset) in enumerate([(case, L), (long, 0), (other, L)]):
        wanted = heads_of(compress(name, alone, share, **options))
        assert_same(heads_of(layers, row, offset), wanted, tolerance=1e-5)


@pytest.mark.parametrize("name", [name for name in kvweave.list_methods() if name not in LAYER_ADAPTIVE | {"random"}])
@given(data=st.data(), case=cases(), budget=budgets)
def test_layers_of_uniform_methods_do_not_meet(name, data, case, budget):
    options = data.draw(options_of(name).filter(lambda options: not pools(name, options)))
    together = heads_of(compress(name, case, budget, **options))
    for number, wanted in enumerate(together):
        alone = replace(
            case,
            queries=case.queries[number : number + 1],
            keys=case.keys[number : number + 1],
            values=case.values[number : number + 1],
        )
        assert_same(heads_of(compress(name, alone, budget, **options)), [wanted])


# ---------------------------------------------------------------- heads


@pytest.mark.parametrize("name", [name for name in kvweave.list_methods() if name != "random"])
@given(data=st.data(), case=cases(), budget=budgets)
def test_permuted_heads_give_a_permuted_result(name, data, case, budget):
    """12.10, for KV heads with their groups, and for query heads inside a group."""
    assume(not_tied(name, case))
    options = data.draw(options_of(name))
    order = data.draw(st.permutations(range(case.kv_heads)))
    g = case.queries[0].shape[1] // case.kv_heads
    inside = data.draw(st.permutations(range(g)))
    of_queries = [kv * g + member for kv in order for member in inside]
    plain = heads_of(compress(name, case, budget, **options))
    permuted = case.map_heads(lambda q: q[:, of_queries], lambda k: k[:, list(order)])
    if is_ragged(name, options):  # the rounding of head budgets breaks ties by head
        assume(order == sorted(order))
    wanted = [[heads[kv] for kv in order] for heads in plain]
    assert_same(heads_of(compress(name, permuted, budget, **options)), wanted, tolerance=1e-5)


@pytest.mark.parametrize("name", [name for name in kvweave.list_methods() if name != "random"])
@given(data=st.data(), case=cases(), budget=budgets)
def test_identical_queries_in_a_group_equal_one(name, data, case, budget):
    """12.11, first half. (D2O's head_minmax divides by the number of query heads: the mean is the same.)"""
    assume(not_tied(name, case))
    options = data.draw(options_of(name))
    g = case.queries[0].shape[1] // case.kv_heads
    one = case.map_heads(lambda q: q[:, ::g], lambda k: k)
    group = one.map_heads(lambda q: q.repeat_interleave(3, 1), lambda k: k)
    wanted = heads_of(compress(name, one, budget, **options))
    assert_same(heads_of(compress(name, group, budget, **options)), wanted, tolerance=1e-5)


@pytest.mark.parametrize("name", [name for name in kvweave.list_methods() if name not in ("random", "adakv")])
@given(data=st.data(), case=cases(), budget=budgets)
def test_duplicated_heads_give_duplicated_results(name, data, case, budget):
    """12.11, second half."""
    assume(not_tied(name, case))
    options = data.draw(options_of(name).filter(lambda options: not is_ragged(name, options)))
    g = case.queries[0].shape[1] // case.kv_heads
    one = case.map_heads(lambda q: q[:, ::g], lambda k: k)
    double = one.map_heads(*[lambda x: x.repeat_interleave(2, 1)] * 2)
    wanted = heads_of(compress(name, one, budget, **options))
    wanted = [[head for head in heads for _ in range(2)] for heads in wanted]
    assert_same(heads_of(compress(name, double, budget, **options)), wanted, tolerance=1e-5)


# ---------------------------------------------------------------- the flow ratio


def flow(case, ratio="literal", **options) -> list[float]:
    return [layer.flow for layer in compress("flowmm", case, 0.5, flow_ratio=ratio, **options)]


@pytest.mark.parametrize("ratio", ["literal", "balanced", "nosink"])
@given(case=cases(min_length=4, mixed=True))
def test_flow_is_a_share_and_labels_may_swap(ratio, case):
    """12.9"""
    rho = flow(case, ratio)
    assert all(-1e-6 <= x <= 1 + 1e-6 for x in rho)
    assert flow(replace(case, visual=~case.visual), ratio) == pytest.approx(rho, abs=1e-5)
    assert rho == pytest.approx([reference.flow_ratios(x)[ratio] for x in reference_layers(case)], abs=1e-5)


@given(case=cases(min_length=4, mixed=True))
def test_flow_is_the_weighted_mean_of_both_directions(case):
    """12.9: rho = (|V| x_v + |T| x_t) / L, and balanced is their plain mean."""
    for literal, balanced, layer in zip(flow(case), flow(case, "balanced"), reference_layers(case), strict=True):
        shares_of_heads = [reference.cross_means(A, layer.visual) for A in layer.attention]
        x_v = reference.mean([x for x, _ in shares_of_heads])
        x_t = reference.mean([x for _, x in shares_of_heads])
        V = sum(layer.visual)
        assert literal == pytest.approx((V * x_v + (layer.length - V) * x_t) / layer.length, abs=1e-5)
        assert balanced == pytest.approx((x_v + x_t) / 2, abs=1e-5)


@pytest.mark.parametrize("ratio", ["literal", "balanced", "nosink"])
@given(case=cases(min_length=4, mixed=True))
def test_flow_does_not_see_grouping(ratio, case):
    """12.9: GQA and MHA on duplicated keys."""
    g = case.queries[0].shape[1] // case.kv_heads
    duplicated = case.map_heads(lambda q: q, lambda k: k.repeat_interleave(g, 1))
    assert flow(duplicated, ratio) == pytest.approx(flow(case, ratio), abs=1e-5)


@pytest.mark.parametrize("ratio", ["literal", "balanced", "nosink"])
@given(case=cases(min_length=2), image=st.booleans(), share=shares)
def test_one_modality_has_no_flow(ratio, case, image, share):
    """12.8"""
    assume(reference.budget_tokens(share, case.length) < case.length)
    case = replace(case, visual=torch.full_like(case.visual, image))
    aligned = compress("flowmm", case, share, flow_ratio=ratio, **NARROW)
    assert [layer.flow for layer in aligned] == [0.0] * len(aligned)
    for mode in ("cross", "intra"):
        forced = compress("flowmm", case, share, flow=mode, flow_ratio=ratio, **NARROW)
        assert_same(heads_of(forced), heads_of(aligned))


# ---------------------------------------------------------------- FlowMM


@given(case=cases(min_length=4, mixed=True), share=shares)
def test_theta_at_its_extremes_forces_the_mode(case, share):
    """12.7"""
    results = {mode: heads_of(compress("flowmm", case, share, flow=mode, **NARROW)) for mode in ("cross", "intra")}
    for theta, mode in ((math.inf, "intra"), (-math.inf, "cross")):
        assert_same(heads_of(compress("flowmm", case, share, theta=theta, **NARROW)), results[mode])


@given(case=cases(min_length=4, mixed=True), share=shares, theta=st.floats(0.0, 1.0))
def test_aligned_and_misaligned_never_share_a_mode(case, share, theta):
    """12.7: layer by layer, one is the cross result and the other the intra result."""
    flowmm = {
        mode: heads_of(compress("flowmm", case, share, theta=theta, flow=mode, **NARROW))
        for mode in ("aligned", "misaligned", "cross", "intra")
    }
    for number, rho in enumerate(flow(case)):
        assume(abs(rho - theta) > 1e-6)
        chosen, other = ("cross", "intra") if rho > theta else ("intra", "cross")
        assert_same([flowmm["aligned"][number]], [flowmm[chosen][number]])
        assert_same([flowmm["misaligned"][number]], [flowmm[other][number]])


@given(case=cases(min_length=4), share=shares)
def test_the_top_quantile_restricts_nothing(case, share):
    """12.7"""
    highest = compress("flowmm", case, share, sensitivity_quantile=1.0, **NARROW)
    assert_same(heads_of(highest), heads_of(compress("flowmm", case, share, sensitivity_quantile=None, **NARROW)))


@given(
    case=cases(min_length=4, mixed=True),
    share=shares,
    proxies=st.integers(1, 8),
    quantile=st.sampled_from([0.0, 0.2, 0.5, 0.8]),
    floor=st.integers(0, 3),
)
def test_recents_stay_whole_and_targets_are_insensitive(case, share, proxies, quantile, floor):
    """12.7: the forced pivots are there with mass 1, and no target's importance exceeds tau."""
    B = reference.budget_tokens(share, case.length)
    assume(case.length > B)
    R = min(proxies, B // 2)
    result = compress("flowmm", case, share, proxies=proxies, sensitivity_quantile=quantile, modality_floor=floor)
    for heads, layer in zip(heads_of(result), reference_layers(case), strict=True):
        for kv, head in enumerate(heads):
            recent = list(range(case.length - R, case.length))
            assert head.positions[B - R :] == recent
            assert head.mass[B - R :] == [1.0] * R
            importance = reference.proxy_importance(layer, kv, proxies)
            pivots = head.positions[: B - R]
            ascending = sorted(importance[p] for p in pivots)
            tau = ascending[math.floor(quantile * (len(pivots) - 1) + 1e-9)]
            for position, mass in zip(head.positions, head.mass, strict=True):
                assert mass == 1 or importance[position] <= tau + 1e-6
            assert len(pivots) == B - R


@given(case=cases(min_length=4, mixed=True), share=shares)
def test_intra_layers_never_mix_modalities(case, share):
    """12.7: values that are 0 for text and 1 for images stay so under a convex rule."""
    is_visual = case.visual[:, None, :, None]
    marked = replace(case, values=[is_visual.expand(v.shape).to(v.dtype) for v in case.values])
    for heads in heads_of(compress("flowmm", marked, share, flow="intra", sensitivity_quantile=None, **NARROW)):
        for head in heads:
            own = case.visual[0, head.positions].to(head.values.dtype)[:, None].expand(head.values.shape)
            assert_close(head.values, own, 1e-5, "modality")


@given(case=cases(min_length=4, mixed=True), share=shares, floor=st.integers(1, 20))
def test_the_modality_floor_holds(case, share, floor):
    """3: each modality has its floor among the non-recent pivots; the count does not change."""
    B = reference.budget_tokens(share, case.length)
    assume(case.length > B)
    R = min(4, B // 2)
    for heads in heads_of(compress("flowmm", case, share, modality_floor=floor, **NARROW)):
        for head in heads:
            assert len(head.positions) == B
            for wanted in (True, False):
                is_wanted = [v is wanted for v in case.visual[0].tolist()]
                least = min(floor, sum(is_wanted[: case.length - R]), (B - R) // 2)
                assert sum(is_wanted[p] for p in head.positions[: B - R]) >= least


# ---------------------------------------------------------------- merging


@every_merging
@given(data=st.data(), case=cases(), budget=budgets)
def test_the_mass_bias_changes_no_entry(name, data, case, budget):
    """4.1 acts in decoding only: log(mass) beside the entries, nothing without the option."""
    options = {**data.draw(options_of(name)), "mass_kind": "count"}
    assume(not options.get("value_scale"))
    with_bias = heads_of(compress(name, case, budget, **{**options, "mass_bias": True}))
    without = heads_of(compress(name, case, budget, **{**options, "mass_bias": False}))
    assert_same(with_bias, without, bias=False)
    for heads, plain in zip(with_bias, without, strict=True):
        for head, other in zip(heads, plain, strict=True):
            assert_close(head.bias, torch.tensor(head.mass).log(), 1e-6, "bias")
            assert not other.bias.any()


ROPE_AWARE = registered("flowmm", "weave", "lookm", "meda", "d2o", "kvmerger")


@pytest.mark.parametrize("name", ROPE_AWARE)
@given(case=cases(min_length=4), budget=budgets)
def test_zero_angles_give_the_plain_rule(name, case, budget):
    """12.17"""
    cos, sin = case.rotary
    still = replace(case, rotary=(torch.ones_like(cos), torch.zeros_like(sin)))
    turned = heads_of(compress(name, still, budget, rope_aware=True))
    assert_same(turned, heads_of(compress(name, case, budget)), tolerance=1e-5)


def rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos[:, None].to(x.dtype) + torch.cat([-second, first], -1) * sin[:, None].to(x.dtype)


@pytest.mark.parametrize("name", ROPE_AWARE)
@given(case=cases(min_length=4), budget=budgets)
def test_equal_unrotated_keys_merge_to_the_targets_key(name, case, budget):
    """12.17: without any loss of norm, whichever tokens merge."""
    one_kappa = [rotate(k[:, :, :1].expand(k.shape), *case.rotary) for k in case.keys]
    turned = replace(case, keys=one_kappa)
    options = {"rope_aware": True, "merge_rule": "average"} if name != "kvmerger" else {"rope_aware": True}
    for number, heads in enumerate(heads_of(compress(name, turned, budget, **options))):
        for kv, head in enumerate(heads):
            wanted = one_kappa[number][0, kv, head.positions]
            assert_close(head.keys, wanted, 1e-4, "keys")


@pytest.mark.parametrize("name", ROPE_AWARE)
@given(case=cases(min_length=4), budget=budgets, start=st.integers(1, 50))
def test_a_shift_of_all_positions_rotates_the_result_alike(name, case, budget, start):
    """12.17: the same prompt further on in the sequence."""
    dim = case.keys[0].shape[-1]
    case = case.map_heads(torch.Tensor.double, torch.Tensor.double)
    by = tuple(table[:, start:] for table in rotary_tables(start + 1, dim))
    there = replace(
        case,
        queries=[rotate(q, *by) for q in case.queries],
        keys=[rotate(k, *by) for k in case.keys],
        rotary=rotary_tables(case.length, dim, start=start),
    )
    here_heads = heads_of(compress(name, case, budget, rope_aware=True))
    there_heads = heads_of(compress(name, there, budget, rope_aware=True))
    turned = [[replace(h, keys=rotate(h.keys[None, None], *by)[0, 0]) for h in heads] for heads in here_heads]
    assert_same(there_heads, turned, tolerance=1e-5)


@pytest.mark.parametrize("name", registered("lookm"))
@given(case=cases(min_length=2), share=shares)
def test_lookm_keeps_text(name, case, share):
    """12.15: union always, exact where all of it before the recent window fits."""
    L = case.length
    B = reference.budget_tokens(share, L)
    assume(B < L)
    text = {j for j in range(L) if not case.visual[0, j]}
    M = B // 2
    for prior in ("union", "exact"):
        for heads in heads_of(compress(name, case, share, text_prior=prior)):
            for head in heads:
                if prior == "union":
                    before = [j for j in text if j < L - M]
                    assert len(head.positions) == M + max(B - M, len(before))
                if prior == "union" or len([j for j in text if j < L - M]) <= B - M:
                    assert text <= set(head.positions)


# ---------------------------------------------------------------- FlashCache


@pytest.mark.parametrize("name", registered("flashcache"))
@given(case=cases(min_length=3), budget=budgets, factor=st.sampled_from([0.25, 2.0, 64.0]))
def test_flashcache_does_not_see_a_joint_scale(name, case, budget, factor):
    """12.13 (powers of two, so that nothing rounds)"""
    scaled = replace(case, keys=[k * factor for k in case.keys], values=[v * factor for v in case.values])
    plain = compress(name, case, budget)
    for a, b in zip(compress(name, scaled, budget), plain, strict=True):
        assert torch.equal(a.positions, b.positions)


@pytest.mark.parametrize("name", registered("flashcache"))
@given(case=cases(min_length=3), share=shares)
def test_flashcache_without_a_cut_keeps_the_lowest_positions(name, case, share):
    """5: gamma=1 deviates nowhere, so every layer gets B and ties go down."""
    B = reference.budget_tokens(share, case.length)
    for heads in heads_of(compress(name, case, share, gamma=1.0)):
        assert all(head.positions == list(range(B)) for head in heads)


# ---------------------------------------------------------------- random


@given(case=cases(min_length=2), share=shares, seed=st.integers(0, 99), recent=st.integers(0, 40))
def test_random_keeps_recents_and_is_seeded(case, share, seed, recent):
    """10.10"""
    B = reference.budget_tokens(share, case.length)
    R = min(recent, B // 2)
    first = heads_of(compress("random", case, share, seed=seed, recent=recent))
    assert_same(heads_of(compress("random", case, share, seed=seed, recent=recent)), first)
    for heads in first:
        for head in heads:
            assert head.positions[B - R :] == list(range(case.length - R, case.length))


def test_random_reaches_every_token_and_differs_by_seed_layer_and_head():
    from strategies import random_case

    case = random_case([False] * 24, layers=2, heads=2, kv_heads=2)
    drawn = [heads_of(compress("random", case, 12, seed=seed, recent=0)) for seed in range(200)]
    for number in range(2):
        for kv in range(2):
            times = [sum(p in run[number][kv].positions for run in drawn) for p in range(24)]
            assert all(60 <= t <= 140 for t in times)  # half of 200, over five standard errors wide
    sets = [tuple(drawn[seed][layer][kv].positions) for seed in range(3) for layer in range(2) for kv in range(2)]
    assert len(set(sets)) == len(sets)


# ---------------------------------------------------------------- allocate


weights = st.lists(st.one_of(st.floats(0, 10), st.sampled_from([0.0, 1.0, 1e-9, 1e6])), min_size=1, max_size=12)


@given(w=weights, total=st.integers(0, 300), lo=st.integers(0, 6), room=st.integers(0, 40))
def test_allocate_is_exact_bounded_and_monotone(w, total, lo, room):
    """12.12"""
    from kvweave.ops.budget import allocate

    hi = max(lo + room, 1)
    n = len(w)
    got = allocate(w, total, lo, hi)
    assert all(isinstance(x, int) for x in got)
    assert sum(got) == min(max(total, n * lo), n * hi)
    assert all(lo <= x <= hi for x in got)
    for a in range(n):
        for b in range(n):
            if w[a] >= w[b]:
                assert got[a] >= got[b] - 1


@given(n=st.integers(1, 30), B=st.integers(1, 50), w=st.sampled_from([0.0, 1e-3, 0.1, 1.0, 1 / 3, 7e5]))
def test_uniform_weights_give_uniform_budgets(n, B, w):
    """12.12"""
    from kvweave.ops.budget import allocate

    assert allocate([w] * n, n * B, 1, 50) == [B] * n


@given(
    w=st.lists(st.floats(0.01, 10), min_size=1, max_size=8),
    total=st.integers(1, 100),
    lo=st.integers(0, 3),
    room=st.integers(1, 30),
)
def test_allocate_equals_its_reference(w, total, lo, room):
    """Within one unit where fractions nearly tie, exactly elsewhere."""
    from kvweave.ops.budget import allocate

    got, want = allocate(w, total, lo, lo + room), reference.allocate(w, total, lo, lo + room)
    nudged = [reference.allocate([x * (1 + s) for x in w], total, lo, lo + room) for s in (0,)]
    nudged += [
        reference.allocate([x * (1 + (1e-7 if i == j else 0)) for i, x in enumerate(w)], total, lo, lo + room)
        for j in range(len(w))
    ]
    stable = all(other == want for other in nudged)
    assert got == want if stable else all(abs(a - b) <= 1 for a, b in zip(got, want, strict=True))
