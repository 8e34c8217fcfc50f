"""SPEC section 19, invariants 20 to 30: scores, allocation, entries that stand for others, fits."""

import json
import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import kvweave
import reference
import reference_scores
from kvweave.methods.allocation import Profile
from kvweave.methods.entries import fitted
from kvweave.ops.fit import Settings
from kvweave.ops.select import lend
from kvweave.plan import Plan
from strategies import (
    OPTIONS,
    PATTERNS,
    WRAPPED,
    assert_same,
    batch,
    cases,
    compress,
    heads_of,
    pad,
    random_case,
    reference_layers,
    rotary_tables,
    shares,
)

SCORED = sorted({*reference_scores.RECIPES} - {"weave"})
wrapped = pytest.mark.parametrize(("name", "options"), WRAPPED, ids=lambda x: str(x))


def output(layer, query, kv=0, scale=None):
    """What a query [dim] reads from one KV head of a compacted layer."""
    keys, values = layer.keys[0, kv].double(), layer.values[0, kv].double()
    logits = keys @ query.double() * (len(query) ** -0.5 if scale is None else scale)
    if layer.bias is not None:
        logits = logits + layer.bias[0, kv].double()
    return logits.masked_fill(layer.positions[0, kv] < 0, -torch.inf).softmax(-1) @ values


def whole(case, query, kv=0, number=0):
    keys, values = case.keys[number][0, kv].double(), case.values[number][0, kv].double()
    return (keys @ query.double() * len(query) ** -0.5).softmax(-1) @ values


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def sets(layers):
    return [[head.positions for head in heads] for heads in heads_of(layers)]


def single(visual, **shape):
    return random_case(visual, layers=1, heads=1, kv_heads=1, **shape)


def doubled(case):
    """Every token twice, side by side."""
    two = case.map_heads(*[lambda x: x.repeat_interleave(2, 2)] * 2)
    return replace(two, visual=case.visual.repeat_interleave(2, 1), rotary=None)


# ---------------------------------------------------------------- 20


@wrapped
def test_wrappers_keep_everything_where_nothing_has_to_go(name, options):
    case = replace(random_case(PATTERNS["interleaved"](14), layers=2, seed=1), rotary=rotary_tables(14, 8))
    for budget in (1.0, 99):
        for layer, keys, values in zip(compress(name, case, budget, **options), case.keys, case.values, strict=True):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)
            assert layer.bias is None


@wrapped
@given(data=st.data(), case=cases(min_length=4), share=shares, front=st.integers(0, 4))
def test_padding_and_neighbours_do_not_matter_to_wrappers(name, options, data, case, share, front):
    other = case.map_heads(*[lambda x: x.flip(-2)] * 2)
    alone = compress(name, case, share, **options)
    padded = compress(name, batch([pad(case, front, garbage=1e4), pad(other, front)]), share, **options)
    assert_same(heads_of(padded, offset=front), heads_of(alone), tolerance=1e-5)
    for layer in padded:
        held = layer.positions >= 0
        assert not layer.mass[~held].any()
        assert layer.bias is None or (layer.bias.isfinite().all() and not layer.bias[~held].any())
        assert (layer.mass.sum(-1) <= case.length).all()


# ---------------------------------------------------------------- 21 to 26: scores


@given(case=cases(min_length=3), share=shares)
def test_tova_is_one_set_for_the_layer_and_the_best_with_the_last_token(case, share):
    one, apart = compress("tova", case, share), compress("tova", case, share, per_head=True)
    for heads in sets(one):
        assert all(head == heads[0] for head in heads)
    B = reference.budget_tokens(share, case.length)
    for number, layer in enumerate(reference_layers(case)):
        for kv, head in enumerate(sets(apart)[number]):
            last = reference.rows_sum(layer, kv, [case.length - 1])
            rest = sorted(last[:-1], reverse=True)[: B - 1] if B > 1 else []
            if B > 1:
                assert sum(last[j] for j in head) == pytest.approx(sum(rest) + last[-1], abs=1e-5)


@given(case=cases(min_length=3), share=shares, factor=st.sampled_from([0.5, 4.0]))
def test_keydiff_sees_directions_alone(case, share, factor):
    plain = sets(compress("keydiff", case, share))
    other = replace(case, keys=[k * factor for k in case.keys], values=[-v for v in case.values])
    assert sets(compress("keydiff", replace(other, queries=case.queries[::-1]), share)) == plain


def test_keydiff_keeps_what_points_away_from_the_mean():
    case = random_case([False] * 20, layers=1, seed=3)
    for keys in case.keys:
        keys += 3
        for kv in range(2):
            keys[0, kv, 7] = -torch.nn.functional.normalize(keys[0, kv], dim=-1).mean(0)
    assert all(head == [7] for heads in sets(compress("keydiff", case, 1)) for head in heads)


@given(data=st.data(), case=cases(min_length=6, max_layers=1), budget=st.integers(1, 5))
def test_knorm_may_be_done_in_two_steps(data, case, budget):
    """top_B(top_B(X) + Y) = top_B(X + Y)."""
    cut = data.draw(st.integers(budget, case.length - 1))
    for kv, expected in enumerate(sets(compress("knorm", case, budget))[0]):
        norms = case.keys[0][0, kv].norm(dim=-1).tolist()
        first = sorted(range(cut), key=lambda j: (norms[j], j))[:budget]
        both = sorted([*first, *range(cut, case.length)], key=lambda j: (norms[j], j))[:budget]
        assert expected == sorted(both)


def rotated(x, tables):
    cos, sin = tables
    half = x.shape[-1] // 2
    swapped = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + swapped * sin


@given(seed=st.integers(0, 200), start=st.integers(0, 50), budget=st.integers(1, 18))
def test_expected_attention_of_equal_queries_is_that_querys_attention(seed, start, budget):
    """A Gaussian without spread, one position ahead; a shift of all positions changes nothing."""
    L, D = 19, 8
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(D, generator=generator, dtype=torch.float64)
    raw = torch.randn(1, 1, L, D, generator=generator, dtype=torch.float64)
    values = torch.randn(1, 1, L, D, generator=generator, dtype=torch.float64)
    results = []
    for first in (0, start):
        tables = rotary_tables(L + 1, D, start=first)
        cos, sin = (x[:, None, :L] for x in tables)
        keys, queries = rotated(raw, (cos, sin)), rotated(query.expand(1, 2, L, D), (cos, sin))
        method = kvweave.get_method(
            "expected_attention", budget=budget, future=1, value_norm=False, sinks=0, covariance=bool(seed % 2)
        )
        results.append(
            kvweave.compress_tensors(
                method,
                [queries],
                [keys],
                [values],
                visual=torch.zeros(1, L, dtype=torch.bool),
                rotary=tuple(x[:, :L] for x in tables),
            )[0]
        )
    ahead = rotated(query, tuple(x[0, L] for x in tables))
    attention = (keys[0, 0] @ ahead * D**-0.5).softmax(-1)
    assert results[0].positions[0, 0].tolist() == attention.topk(budget).indices.sort().values.tolist()
    assert torch.equal(results[0].positions, results[1].positions)


def test_leave_one_out_is_the_change_without_the_token():
    case = random_case([False] * 15, layers=1, seed=4)
    layer = reference_layers(case)[0]
    asked = reference_scores.Asked(5, 0, 2, reference_scores.options_of("leave_one_out", {"window": 3}))
    for kv in range(2):
        score = reference_scores.leave_one_out(layer, kv, asked)
        for j in range(15):
            moved = []
            for i in range(12, 15):
                for h in layer.group(kv):
                    A = layer.attention[h][i]
                    left = [0.0 if x == j else a / (1 - A[j]) for x, a in enumerate(A)]
                    with_it, without = (reference.weighted_sum(w, layer.values[kv]) for w in (A, left))
                    moved.append(reference.squared_distance(with_it, without))
            assert score[j] == pytest.approx(reference.mean(moved), rel=1e-9, abs=1e-12)


@given(seed=st.integers(0, 99), tokens=st.integers(3, 30), shift=st.integers(0, 1))
def test_leverages_lie_between_0_and_1(seed, tokens, shift):
    """And add up to no more than the dimension; linear maps of the keys leave them."""
    case = replace(random_case([False] * tokens, layers=1, seed=seed), rotary=rotary_tables(tokens, 8))
    method = kvweave.Leverage(budget=2, sinks=0, recent=0)
    view = view_of(case)
    leverages = method.leverages(view, slice(0, tokens))
    assert (leverages >= 0).all()
    assert (leverages <= 1 + 1e-9).all()
    assert (leverages.sum(-1) <= 8 + 1e-9).all()
    flat = replace(case, rotary=tuple(torch.ones_like(x) * n for n, x in zip((1, 0), case.rotary, strict=True)))
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    mapped = replace(flat, keys=[3 * k @ turn for k in flat.keys])
    close(*(method.leverages(view_of(x), slice(0, tokens)) for x in (flat, mapped)), 1e-7)


def view_of(case):
    """The first layer of an unpadded case, as methods see it."""
    keys, values, queries = case.keys[0], case.values[0], case.queries[0]
    shape = keys.shape[:3]
    rotary = None if case.rotary is None else tuple(x[:, None].expand(-1, shape[1], -1, -1) for x in case.rotary)
    return kvweave.LayerView(
        keys,
        values,
        queries,
        torch.arange(shape[2]).expand(shape),
        torch.ones(shape),
        case.visual[:, None].expand(shape),
        kvweave.ops.statistics.AttentionRule(keys.shape[-1] ** -0.5),
        rotary=rotary,
    )


@given(case=cases(min_length=6, mixed=True), share=shares)
def test_tgv_keeps_text_whole_where_it_fits(case, share):
    visual = case.visual[0].tolist()
    text = [j for j, v in enumerate(visual) if not v]
    for heads in sets(compress("tgv", case, share)):
        for kept in heads:
            if len(kept) >= len(text):
                assert set(text) <= set(kept)
            else:
                assert not any(visual[j] for j in kept)


@given(case=cases(min_length=6), share=shares, allocation=st.sampled_from(["global", "layer"]))
def test_one_threshold_separates_what_kvzip_keeps(case, share, allocation):
    layers = compress("kvzip", case, share, allocation=allocation, sinks=1)
    B = reference.budget_tokens(share, case.length)
    assume(case.length > B)
    options = reference_scores.options_of("kvzip", {"sinks": 1})
    groups = [[n] for n in range(len(layers))] if allocation == "layer" else [list(range(len(layers)))]
    S, _ = reference_scores.forced_of(B, options)
    for group in groups:
        stay, go = [], []
        for n in group:
            layer = reference_layers(case)[n]
            for kv, kept in enumerate(sets(layers)[n]):
                score = reference_scores.kvzip(layer, kv, reference_scores.Asked(B, S, 0, options))
                free = range(S, case.length)
                best = max(free, key=lambda j: (score[j], -j))
                stay += [score[j] for j in free if j in kept and not (S == 0 and j == best)]
                go += [score[j] for j in free if j not in kept]
        assert sum(len(kept) for n in group for kept in sets(layers)[n]) == len(group) * case.kv_heads * B
        assert min(stay, default=math.inf) >= max(go, default=-math.inf) - 1e-6


@given(case=cases(min_length=4, max_layers=1), share=shares)
def test_one_head_of_one_layer_has_nobody_to_share_with(case, share):
    one = case.map_heads(lambda q: q[:, :1], lambda k: k[:, :1])
    kinds = [sets(compress("kvzip", one, share, allocation=kind)) for kind in ("head", "layer", "global")]
    assert kinds[0] == kinds[1] == kinds[2]


@pytest.mark.filterwarnings("ignore:critical of expected_attention")
@pytest.mark.parametrize("method", SCORED)
def test_critical_with_all_first_or_equal_norms_is_the_method(method):
    case = replace(random_case(PATTERNS["interleaved"](22), layers=2, seed=5), rotary=rotary_tables(22, 8))
    plain = sets(compress(method, case, 8))
    assert sets(compress("critical", case, 8, method=method, first=1.0)) == plain
    if method in ("expected_attention", "leave_one_out", "mixkv", "flashcache", "leverage"):
        return  # their scores are made of values too
    even = replace(case, values=[torch.sign(v) for v in case.values])
    assert sets(compress("critical", even, 8, method=method)) == sets(compress(method, even, 8))


def test_critical_keeps_the_methods_best():
    case = random_case([False] * 30, layers=1, seed=6)
    first = sets(compress("snapkv", case, 4 + 5, window=4))[0]  # 4 recent and the best 5
    mine = sets(compress("critical", case, 4 + 10, method="snapkv", window=4, first=0.5))[0]
    assert all(set(a) <= set(b) for a, b in zip(first, mine, strict=True))


# ---------------------------------------------------------------- 17.7


@pytest.mark.parametrize("name", SCORED)
def test_nothing_lent_changes_nothing(name):
    case = replace(random_case(PATTERNS["interleaved"](20), layers=2, seed=7), rotary=rotary_tables(20, 8))
    assert sets(compress(name, case, 7, ahead=0, behind=0)) == sets(compress(name, case, 7))


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.integers(0, 6), st.integers(0, 6))
def test_lending_twice_is_lending_twice_as_far(scores, ahead, behind):
    x = torch.tensor(scores, dtype=torch.float64)[None, None]
    assert torch.equal(lend(lend(x, ahead, behind), ahead, behind), lend(x, 2 * ahead, 2 * behind))
    if len(scores) > 1:
        spike = torch.full((1, 1, 9), -1.0).index_fill(2, torch.tensor([4]), 1.0)
        assert (lend(spike, 2, 1)[0, 0] == 1).nonzero().flatten().tolist() == [3, 4, 5, 6]


@given(
    st.lists(st.floats(0, 5), min_size=1, max_size=30),
    st.integers(0, 40),
    st.integers(0, 40),
    st.sampled_from([0.25, 0.5, 0.9, 1.0]),
)
def test_a_lent_score_fades_with_each_token_it_is_lent_across(scores, ahead, behind, fade):
    mine = lend(torch.tensor(scores, dtype=torch.float64)[None, None], ahead, behind, fade)[0, 0].tolist()
    plain = reference_scores.lent({j: (x,) for j, x in enumerate(scores)}, ahead, behind, fade)
    assert mine == pytest.approx([plain[j][0] for j in range(len(scores))])


def test_only_attention_fades():
    with pytest.raises(ValueError, match=r"fade=0.5.*method='knorm'.*allowed is 1"):
        kvweave.get_method("knorm", budget=0.2, ahead=3, fade=0.5)
    kvweave.get_method("snapkv", budget=0.2, ahead=3, fade=0.5)


def profile_file(path, table, budgets=(0.5, 0.2, 0.05)):
    Profile("a model", tuple(budgets), tuple(tuple(map(tuple, t)) for t in table)).write(str(path))
    return str(path)


@given(data=st.data(), case=cases(min_length=6), share=shares)
def test_a_profile_of_equal_shares_is_no_profile(tmp_path_factory, data, case, share):
    shape = len(case.keys), case.kv_heads
    budgets = (0.5, 0.2, 0.05)
    table = [[[b] * shape[1] for _ in range(shape[0])] for b in budgets]
    path = profile_file(tmp_path_factory.mktemp("profile") / "p.json", table, budgets)
    plain = sets(compress("snapkv", case, share, window=2))
    mine = compress("snapkv", case, share, window=2, allocation="profile", profile=path, mix=0.0)
    assert sets(mine) == plain


@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("share", [0.3, 0.1, 0.6, 5])
def test_a_profile_says_which_heads_get_what(tmp_path, mix, share):
    case = random_case(PATTERNS["interleaved"](40), layers=3, seed=8)
    generator = torch.Generator().manual_seed(9)
    budgets = (0.5, 0.2, 0.05)
    table = [(b * 2 * torch.rand(3, 2, generator=generator)).tolist() for b in budgets]
    path = profile_file(tmp_path / "p.json", table)
    options = {"window": 3, "allocation": "profile", "mix": mix}
    mine = compress("snapkv", case, share, profile=path, **options)
    data = json.loads((tmp_path / "p.json").read_text())
    expected = reference_scores.scored(
        "snapkv", reference_layers(case), reference.budget_tokens(share, 40), profile=data, **options
    )
    assert sets(mine) == [[head.positions for head in layer.heads] for layer in expected]
    B = reference.budget_tokens(share, 40)
    assert sum(len(kept) for heads in sets(mine) for kept in heads) == 6 * B


def test_a_profile_of_another_model_is_refused(tmp_path):
    case = random_case(PATTERNS["interleaved"](40), layers=3, seed=8)
    path = profile_file(tmp_path / "p.json", [[[0.2] * 2] * 4] * 3)
    with pytest.raises(ValueError, match="4 layers"):
        compress("snapkv", case, 0.3, allocation="profile", profile=path)
    path = profile_file(tmp_path / "q.json", [[[0.2] * 3] * 3] * 3)
    for mix in (0.0, 0.5):
        with pytest.raises(ValueError, match="3 KV heads"):
            compress("snapkv", case, 0.3, allocation="profile", profile=path, mix=mix)
    for text in ("{}", "no json", '{"fingerprint": "x", "budgets": [0.1, 0.5], "shares": [[[1]], [[1]]]}'):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(ValueError, match=r"r\.json"):
            compress("snapkv", case, 0.3, allocation="profile", profile=str(tmp_path / "r.json"))
    with pytest.raises(ValueError, match=r"none\.json"):
        compress("snapkv", case, 0.3, allocation="profile", profile=str(tmp_path / "none.json"))


# ---------------------------------------------------------------- 27, 28: fold and residual


def test_fold_loses_nothing_for_the_row_that_scored():
    """One row, one head a group, its own attention as score."""
    case = random_case([False] * 24, layers=1, heads=2, kv_heads=2, seed=10)
    layer = compress("fold", case, 7, method="tova", per_head=True, spare=0, recent=0)[0]
    for kv in range(2):
        query = case.queries[0][0, kv, -1]
        close(output(layer, query, kv), whole(case, query, kv), 1e-6)  # biases are float32
        assert layer.mass[0, kv].sum() == 24


@dataclass(frozen=True)
class Alternate(kvweave.ScoredMethod):
    """Every other token, from the first on."""

    name = "alternate"

    def score(self, view, quota):
        return (torch.arange(view.length) % 2 == 0).double().expand(view.positions.shape)


@given(seed=st.integers(0, 99), tokens=st.integers(2, 12))
def test_fold_of_twins_is_exact_for_every_query(seed, tokens):
    """One of each pair kept."""
    case = doubled(single([False] * tokens, seed=seed))
    method = kvweave.Fold(method=Alternate(budget=tokens), weights="uniform", spare=0)
    layer = kvweave.compress_tensors(method, case.queries, case.keys, case.values, visual=case.visual)[0]
    query = torch.randn(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    close(output(layer, query), whole(case, query), 1e-6)
    close(layer.bias, torch.full_like(layer.bias, math.log(2)), 1e-6)


@given(case=cases(min_length=8), budget=st.integers(2, 12), spare=st.integers(0, 6))
def test_nothing_folds_into_what_stays_by_force(case, budget, spare):
    assume(budget < case.length)
    layers = compress("fold", case, budget, method="snapkv", window=4, spare=spare)
    for number, heads in enumerate(heads_of(layers)):
        for kv, head in enumerate(heads):
            recent = min(4, budget // 2)
            values = case.values[number][0, kv]
            for slot, position in enumerate(head.positions):
                forced = position >= case.length - recent or position < spare
                assert not (forced and head.mass[slot] > 1)
                if head.mass[slot] == 1:
                    assert head.bias[slot] == 0
                    assert torch.equal(head.values[slot], values[position])
            assert (head.values <= values.amax(0) + 1e-5).all()
            assert (head.values >= values.amin(0) - 1e-5).all()


@given(case=cases(min_length=4), share=shares, method=st.sampled_from(["snapkv", "adakv", "kvzip", "tgv"]))
def test_residual_without_clusters_is_the_method(case, share, method):
    plain = compress(method, case, share)
    for gate in (True, False):
        mine = compress("residual", case, share, method=method, clusters=0.0, gate=gate)
        assert_same(heads_of(mine), heads_of(plain))


@given(seed=st.integers(0, 99))
def test_clusters_of_equal_keys_are_exact(seed):
    """Four keys, six times each, in order: a cluster each where seeds fall on each."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, 1, 4, 8, generator=generator, dtype=torch.float64).repeat_interleave(6, 2)
    case = replace(single([False] * 24, seed=seed), keys=[keys])
    layer = compress("residual", case, 4, method="keydiff", clusters=1.0, gate=False)[0]
    assert layer.mass[0, 0].tolist() == [6.0] * 4
    query = torch.randn(8, generator=generator, dtype=torch.float64)
    close(output(layer, query), whole(case, query), 1e-6)
    close(layer.bias.exp(), layer.mass, 1e-5)


@given(case=cases(min_length=8), share=shares, span=st.integers(1, 8))
def test_clusters_hold_all_that_is_left(case, share, span):
    layers = compress("residual", case, share, method="knorm", clusters=0.6, gate=False, span=span)
    B = reference.budget_tokens(share, case.length)
    if math.floor(0.6 * B + 1e-9) and case.length > B:
        for heads in heads_of(layers):
            for head in heads:
                assert sum(head.mass) == case.length
                assert len(head.positions) == B
                close(head.bias.exp(), torch.tensor(head.mass), 1e-5)


# ---------------------------------------------------------------- 29: fits


def test_one_row_and_no_ridge_are_exact():
    case = single([False] * 20, seed=11)
    query = case.queries[0][0, 0, -1]
    options = {"rows": 1, "recent": 0, "ridge": 0.0}
    for cut in (
        compress("match", case, 6, **options),
        compress("weave2", case, 6, defer=0, gate="none", cap=None, **options),
    ):
        close(output(cut[0], query), whole(case, query), 1e-7)
    layer = compress("match", case, 10, **options)[0]
    shares_of = (layer.keys[0, 0] @ query * 8**-0.5 + layer.bias[0, 0].double()).exp().sum()
    assert shares_of.item() == pytest.approx((case.keys[0][0, 0] @ query * 8**-0.5).exp().sum().item(), rel=1e-5)
    cut = compress("regress", case, 6, method="keydiff", rows=1, fixed=0, ridge=0.0, cap=None, gate=False)
    close(output(cut[0], query), whole(case, query), 1e-7)


def test_twins_are_matched_with_log_two():
    """More independent rows than entries, one of each pair kept: exact for every query."""
    case = doubled(single([False] * 12, seed=12))
    view = view_of(case)
    generator = torch.Generator().manual_seed(13)
    view.decoded_queries = torch.randn(1, 1, 40, 8, generator=generator, dtype=torch.float64) * 2
    view.decoded_counted, view.decoded_weight = torch.ones(1, 40, dtype=torch.bool), 0.999999
    plan = Plan(torch.arange(0, 24, 2)[None, None])
    settings = Settings(ridge=0.0, bound=3.0, steps=0)
    everything = torch.ones(24, dtype=torch.bool)
    fit = fitted(view, plan, view.reference_rows(1), everything, ("none", "values", "both"), settings, gate=False)
    layer = fit.apply(view)
    close(layer.bias, torch.full_like(layer.bias, math.log(2)), 1e-3)
    query = torch.randn(8, generator=generator, dtype=torch.float64)
    close(output(layer, query), whole(case, query), 1e-3)


def errors(case, layers, rows):
    """`err` of the layers on the last rows, each KV head."""
    out = []
    for number, layer in enumerate(layers):
        for kv in range(case.kv_heads):
            wrong = right = 0.0
            group = case.queries[0].shape[1] // case.kv_heads
            for h in range(kv * group, (kv + 1) * group):
                for i in range(case.length - rows, case.length):
                    query = case.queries[number][0, h, i]
                    logits = case.keys[number][0, kv, : i + 1].double() @ query.double() * len(query) ** -0.5
                    want = logits.softmax(-1) @ case.values[number][0, kv, : i + 1].double()
                    seen = layer.positions[0, kv] <= i
                    mine = layer.keys[0, kv].double() @ query.double() * len(query) ** -0.5
                    if layer.bias is not None:
                        mine = mine + layer.bias[0, kv].double()
                    got = mine.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num() @ layer.values[0, kv].double()
                    wrong += float((want - got).square().sum())
                    right += float(want.square().sum())
            out.append(wrong / max(right, 1e-12))
    return out


@given(
    case=cases(min_length=8, max_layers=2),
    ridge=st.sampled_from([0.01, 0.1, 1.0]),
    cap=st.sampled_from([None, 0.05, 0.3]),
)
def test_a_value_fit_never_hurts_the_rows_that_it_fits(case, ridge, cap):
    """The objective is convex along the step; recent entries stay, values move no further than the cap."""
    B, rows = case.length // 2, 4
    plain = compress("snapkv", case, B, window=2)
    after_fit = compress("regress", case, B, window=2, rows=rows, fixed=2, ridge=ridge, cap=cap, gate=False)
    for before, after in zip(errors(case, plain, rows), errors(case, after_fit, rows), strict=True):
        assert after <= before + 1e-6
    for a, b in zip(plain, after_fit, strict=True):
        assert torch.equal(a.positions, b.positions)
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.mass, b.mass)
        last = case.length - min(2, B // 2)
        fixed = a.positions >= last
        assert torch.equal(a.values[fixed], b.values[fixed])
        if cap is not None:
            moved = ((b.values - a.values) * ~fixed[..., None]).flatten(2).norm(dim=-1)
            assert (moved <= cap * (a.values * ~fixed[..., None]).flatten(2).norm(dim=-1) * (1 + 1e-5)).all()


@given(case=cases(min_length=8), share=shares, bound=st.sampled_from([0.2, 1.0, 3.0]))
def test_biases_stay_within_their_bound(case, share, bound):
    for layer in compress("match", case, share, rows=5, recent=2, bound=bound):
        if layer.bias is not None:
            assert (layer.bias.abs() <= bound + 1e-5).all()


# ---------------------------------------------------------------- 30: weave2


@given(case=cases(min_length=8), share=shares)
def test_weave2_without_tokens_to_hold_out_is_not_fitted(case, share):
    """Fewer than four reference tokens."""
    options = {"defer": 0, "rows": 3, "recent": 2}
    gated = compress("weave2", case, share, **options)
    exact = compress("weave2", case, share, **{**options, "gate": "all"})
    assert_same(heads_of(gated), heads_of(exact))
    for layer in gated:
        if layer.bias is not None:
            close(layer.bias.exp(), layer.mass, 1e-5)


@given(case=cases(min_length=10, max_layers=1), share=st.floats(0.2, 0.8))
def test_a_larger_cap_never_raises_the_error_of_a_fit(case, share):
    options = {"defer": 0, "rows": 5, "recent": 2, "gate": "none", "bound": 1e-9}
    caps = [errors(case, compress("weave2", case, share, cap=cap, **options), 5) for cap in (0.05, 0.3, None)]
    ridges = [
        errors(case, compress("weave2", case, share, cap=None, ridge=r, **options), 5) for r in (1.0, 0.1, 0.01)
    ]
    for few in (caps, ridges):
        for worse, better in pairwise(few):
            assert all(b <= a + 1e-5 for a, b in zip(worse, better, strict=True))


@given(data=st.data(), case=cases(min_length=8), share=shares)
def test_heads_of_a_group_may_change_places(data, case, share):
    g = case.queries[0].shape[1] // case.kv_heads
    inside = data.draw(st.permutations(range(g)))
    order = [kv * g + member for kv in range(case.kv_heads) for member in inside]
    options = data.draw(st.sampled_from(OPTIONS["weave2"]))
    plain = heads_of(compress("weave2", case, share, **options))
    mine = compress("weave2", case.map_heads(lambda q: q[:, order], lambda k: k), share, **options)
    assert_same(heads_of(mine), plain, tolerance=1e-4)
