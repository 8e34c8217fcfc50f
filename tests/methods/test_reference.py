"""The reference itself: worked examples by hand, and the facts that METHODS.md states about its formulas."""

import math
import random
from fractions import Fraction

import pytest

import reference
from reference import Layer
from strategies import PATTERNS, random_case, reference_layers


def layer(pattern="interleaved", length=16, **shape) -> Layer:
    return reference_layers(random_case(PATTERNS[pattern](length), layers=1, **shape))[0]


def attend(query, keys, values, bias, scale) -> list[float]:
    p = reference.softmax([scale * reference.dot(query, k) + b for k, b in zip(keys, bias, strict=True)])
    return reference.weighted_sum(p, values)


@pytest.mark.parametrize(
    ("budget", "length", "tokens"),
    [(0.29, 100, 29), (0.2, 4, 1), (0.5, 7, 3), (1.0, 7, 7), (1, 7, 1), (9, 7, 7)],
)
def test_budget(budget, length, tokens):
    assert reference.budget_tokens(budget, length) == tokens


def test_attention_rows_are_causal_and_sum_to_one():
    for head in layer().attention:
        for i, row in enumerate(head):
            assert sum(row) == pytest.approx(1)
            assert not any(row[i + 1 :])


def test_pooling_by_hand():
    """Two keys of a uniform row: what lies outside, and in the recent window, counts as zero."""
    uniform = Layer([[[0.0]] * 4], [[[0.0]] * 4], [[[0.0]] * 4], [False] * 4)
    assert reference.pooled_window_score(uniform, 0, 1, 5, 1) == pytest.approx([0.75 / 5] * 3)
    assert reference.pooled_window_score(uniform, 0, 1, 3, 1) == pytest.approx([0.5 / 3, 0.75 / 3, 0.5 / 3])


@pytest.mark.parametrize(
    ("weights", "total", "lo", "hi", "budgets"),
    [
        ([1, 1, 1], 7, 1, 9, [3, 2, 2]),  # the tie goes to the lower layer
        ([1, 3], 8, 1, 9, [2, 6]),
        ([1, 100], 10, 1, 6, [4, 6]),  # full at hi, the rest flows on
        ([0, 0], 5, 1, 9, [3, 2]),
        ([0, 1], 5, 2, 9, [2, 3]),  # lo is kept
        ([1, 1], 99, 1, 9, [9, 9]),
        ([1, 1], 0, 1, 9, [1, 1]),
        ([0.5, 1], 4, 0, 9, [1, 3]),  # 1.33, 2.67
    ],
)
def test_allocate_by_hand(weights, total, lo, hi, budgets):
    assert reference.allocate(weights, total, lo, hi) == budgets


@pytest.mark.parametrize("rule", ["similarity", "average", "pivotal", "importance"])
def test_convex_rules_have_weights_that_sum_to_one(rule):
    target, members = reference.merge_weights(rule, [0.3, -0.9, 1.0], 0.2, [0.1, 0.0, 0.4])
    assert target + sum(members) == pytest.approx(1)
    assert min(target, *members) >= 0


def test_merge_weights_by_hand():
    assert reference.merge_weights("pivotal", [0.1, 0.2], 1, [1, 1]) == (2 / 3, [1 / 6, 1 / 6])
    assert reference.merge_weights("weighted", [0.5, -1.0], 1, [1, 1]) == (1 / 3, [0.5 / 3, -1 / 3])
    assert reference.merge_weights("average", [0.5], 1, [1]) == (0.5, [0.5])
    assert reference.merge_weights("importance", [0.5], 3.0, [1.0]) == (0.75, [0.25])
    assert reference.merge_weights("importance", [0.5], 0.0, [0.0]) == (0.5, [0.5])
    w_c, w_e = reference.merge_weights("similarity", [1.0, 0.0], 1, [1, 1])
    assert (w_c, w_e[0]) == pytest.approx((math.e / (2 * math.e + 1), math.e / (2 * math.e + 1)))
    assert w_e[1] == pytest.approx(1 / (2 * math.e + 1))


def test_flow_ratio_by_hand():
    """Uniform attention over text, image, text: row shares of the other modality are 0, 1/2, 1/3."""
    uniform = Layer([[[0.0]] * 3], [[[0.0]] * 3], [[[0.0]] * 3], [False, True, False])
    flows = reference.flow_ratios(uniform)
    assert flows["literal"] == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    assert flows["balanced"] == pytest.approx((1 / 2 + (0 + 1 / 3) / 2) / 2)
    assert flows["nosink"] == 0  # nothing is left without the first four columns


@pytest.mark.parametrize("pattern", ["interleaved", "image first", "alternating", "one visual token"])
def test_flow_identity(pattern):
    """3: rho = (|V| x_v + |T| x_t) / L; and the column-sum form of 11."""
    one = layer(pattern, heads=2, kv_heads=1, sharpness=2.0)
    shares = [reference.cross_means(A, one.visual) for A in one.attention]
    V = sum(one.visual)
    expected = reference.mean([(V * x_v + (one.length - V) * x_t) / one.length for x_v, x_t in shares])
    flows = reference.flow_ratios(one)
    assert flows["literal"] == pytest.approx(expected)
    text = [i for i in range(one.length) if not one.visual[i]]
    image = [i for i in range(one.length) if one.visual[i]]
    from_text, from_image = reference.rows_sum(one, 0, text), reference.rows_sum(one, 0, image)
    fast = (sum(from_text[j] for j in image) + sum(from_image[j] for j in text)) / one.length
    assert flows["literal"] == pytest.approx(fast)


def test_flowmm_by_hand():
    """Six tokens T V V T V T, B=3, one proxy: one recent, two pivots, and each other token's way."""
    keys = [[1.0, 0.0], [0.0, 3.0], [0.1, 1.0], [2.0, 0.0], [1.0, 0.1], [0.0, 0.0]]
    values = [[float(i)] for i in range(6)]
    queries = [[0.0, 0.0]] * 5 + [[1.0, 1.0]]
    visual = [False, True, True, False, True, False]
    one = Layer([queries], [keys], [values], visual)
    # The last row's logits grow with x + y: 1, 3, 1.1, 2, 1.1, 0, so 1 and 3 are pivots, 3 the lesser one.
    (cross,) = reference.compress("flowmm", [one], 3, proxies=1, flow="cross", merge_rule="average")
    assert cross.heads[0].positions == [1, 3, 5]
    assert cross.heads[0].mass == [1, 4, 1]  # at quantile 0.2 only the lesser pivot takes members
    assert cross.heads[0].values[1] == pytest.approx([(3 + 0 + 2 + 4) / 4])
    (intra,) = reference.compress("flowmm", [one], 3, proxies=1, flow="intra", merge_rule="average")
    assert intra.heads[0].mass == [1, 2, 1]
    assert intra.evicted == [2]
    both = {"proxies": 1, "merge_rule": "average", "sensitivity_quantile": None}
    (cross,) = reference.compress("flowmm", [one], 3, flow="cross", **both)
    assert cross.heads[0].mass == [2, 3, 1]  # 2 is nearest to 1, 0 and 4 to 3
    (intra,) = reference.compress("flowmm", [one], 3, flow="intra", **both)
    assert intra.heads[0].mass == [3, 2, 1]
    other = {"flow": "cross", "cross_scope": "other_only", "proxies": 1, "merge_rule": "average"}
    (kept,) = reference.compress("flowmm", [one], 3, **other)
    assert (kept.heads[0].mass, kept.evicted) == ([1, 3, 1], [1])
    (kept,) = reference.compress("flowmm", [one], 3, **other, no_target="any")
    assert (kept.heads[0].mass, kept.evicted) == ([1, 4, 1], [0])


def test_modality_floor_by_hand():
    """Candidates by score: text 0..3 first, images 4..7 last; a floor of two lets the two best images in."""
    score = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    visual = [False] * 4 + [True] * 4
    assert sorted(reference.with_floor([0, 1, 2, 3], range(8), visual, score, 2)) == [0, 1, 4, 5]
    assert sorted(reference.with_floor([0, 1, 2, 3], range(8), visual, score, 9)) == [0, 1, 4, 5]
    assert sorted(reference.with_floor([0, 1, 2, 3], range(8), visual, score, 0)) == [0, 1, 2, 3]
    assert sorted(reference.with_floor([0, 1, 2], range(8), visual, [1.0] * 8, 9)) == [0, 1, 4]


def test_mass_bias_is_exact_for_equal_keys():
    """4.1 (i): equal keys, average: the biased output is the full cache's, for every query."""
    draw = random.Random(0)
    key = [draw.gauss(0, 1) for _ in range(4)]
    keys = [[draw.gauss(0, 1) for _ in range(4)] if t in (2, 5) else key for t in range(8)]
    values = [[draw.gauss(0, 1) for _ in range(3)] for _ in range(8)]
    one = Layer([keys], [keys], [values], [False] * 8)
    target_of = {1: 0, 3: 0, 4: 7, 6: 7}
    head = reference.merge(one, 0, [0, 2, 5, 7], target_of, [1.0] * 8, merge_rule="average", mass_bias=True)
    query = [draw.gauss(0, 1) for _ in range(4)]
    exact = attend(query, keys, values, [0.0] * 8, 0.5)
    assert attend(query, head.keys, head.values, head.bias, 0.5) == pytest.approx(exact)
    assert attend(query, head.keys, head.values, [0.0] * 4, 0.5) != pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_mass_bias_never_over_counts_an_average(seed):
    """4.1 (ii), Jensen: log m + the mean logit is at most the log of the sum."""
    one = layer(seed=seed)
    head = reference.merge(one, 0, [3], {0: 3, 1: 3, 2: 3}, [1.0] * 16, merge_rule="average", mass_bias=True)
    for q in one.queries[0]:
        logits = [reference.dot(q, k) for k in one.keys[0][:4]]
        merged = reference.dot(q, head.keys[0]) + head.bias[0]
        assert merged <= math.log(sum(math.exp(s) for s in logits)) + 1e-12


def test_attention_kind_is_lossless_for_its_proxy_query():
    """4.1, mass_kind="attention": one proxy, one query head, nothing evicted."""
    one = layer(heads=1, kv_heads=1, sharpness=2.0)
    options = {"proxies": 1, "flow": "cross", "sensitivity_quantile": None}
    attention = {"merge_rule": "importance", "merge_keys": False, "mass_bias": True, "mass_kind": "attention"}
    (done,) = reference.compress("flowmm", [one], 5, **options, **attention)
    head, scale, query = done.heads[0], 1 / math.sqrt(8), one.queries[0][-1]
    exact = attend(query, one.keys[0], one.values[0], [0.0] * 16, scale)
    assert done.evicted == [0]
    assert attend(query, head.keys, head.values, head.bias, scale) == pytest.approx(exact)


def test_rephasing_undoes_the_rotation():
    """4.2: equal un-rotated keys merge to the target's key; the plain average of two loses |cos(d w / 2)|."""
    kappa = [0.3, -1.2]
    angle = [0.7 * t for t in range(6)]
    cos, sin = [[math.cos(a)] * 2 for a in angle], [[math.sin(a)] * 2 for a in angle]
    x, y = kappa
    keys = [[x * c[0] - y * s[0], y * c[0] + x * s[0]] for c, s in zip(cos, sin, strict=True)]
    one = Layer([keys], [keys], [keys], [False] * 6, rotary=(cos, sin))
    turned = reference.merge(one, 0, [5], {2: 5, 4: 5}, [1.0] * 6, merge_rule="average", rope_aware=True)
    assert turned.keys[0] == pytest.approx(keys[5])
    plain = reference.merge(one, 0, [5], {2: 5}, [1.0] * 6, merge_rule="average")
    loss = math.hypot(*plain.keys[0]) / math.hypot(*kappa)
    assert loss == pytest.approx(abs(math.cos(3 * 0.7 / 2)))


@pytest.mark.parametrize("N", [1, 2, 5, 8])
def test_dct_is_orthonormal(N):
    """12.13"""
    for m in range(N):
        for n in range(N):
            inner = sum(reference.cosine_basis(N, m, t) * reference.cosine_basis(N, n, t) for t in range(N))
            assert inner == pytest.approx(float(m == n), abs=1e-12)


def test_low_pass_keeps_what_it_should():
    """omega = floor(gamma N) keeps omega + 1 coefficients: a constant survives gamma=0, all survive gamma=1."""
    assert reference.low_pass([2.0, 2.0, 2.0, 2.0], 0.0) == pytest.approx([2.0] * 4)
    assert reference.low_pass([1.0, 5.0], 0.0) == pytest.approx([3.0, 3.0])
    assert reference.low_pass([1.0, 5.0, 2.0], 1.0) == [1.0, 5.0, 2.0]
    wave = [reference.cosine_basis(10, 2, t) for t in range(10)]
    assert reference.low_pass(wave, 0.2) == pytest.approx(wave)
    assert reference.low_pass(wave, 0.1) == pytest.approx([0.0] * 10, abs=1e-12)


def test_chelsea_by_hand():
    """Four equal pairs in one chunk: one round merges each, at the lower place of the two."""
    corners = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]
    keys = [corners[t // 2] for t in range(8)]
    values = [[float(t)] for t in range(8)]
    one = Layer([keys], [keys], [values], [False] * 8)
    (done,) = reference.compress("chelsea", [one], 4, recent=0)
    assert done.heads[0].positions == [0, 2, 4, 6]
    assert done.heads[0].values == [[0.5], [2.5], [4.5], [6.5]]
    (done,) = reference.compress("chelsea", [one], 6, recent=0)
    assert done.heads[0].mass == [2, 2, 1, 1, 1, 1]  # all as similar: the first two pairs
    (done,) = reference.compress("chelsea", [one], 1, recent=0, chunk=2)
    assert (done.heads[0].mass, done.heads[0].positions) == ([8], [0])  # heaviest, tie: lower, each time


def test_kvmerger_by_hand():
    """Neighbours join; a run of two joined pairs is one cluster, at its member with the largest column sum."""
    keys = [[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0], [-1.0, 0.0]]
    values = [[float(t)] for t in range(5)]
    one = Layer([[[0.0, 0.0]] * 5], [keys], [values], [False] * 5)
    (done,) = reference.compress("kvmerger", [one], 3, recent=0, sigma=1e9)
    assert (done.heads[0].positions, done.heads[0].mass) == ([0, 3, 4], [3, 1, 1])
    assert done.heads[0].values[0] == pytest.approx([1.0])
    (done,) = reference.compress("kvmerger", [one], 3, recent=0, sigma=1e9, value_scale=True)
    assert done.heads[0].values[0] == pytest.approx([3.0])


def test_pyramid_budgets_by_hand():
    """10.4: B=20, R=0, beta=20: 39 down to 1; capped where a layer has no more to give."""
    assert reference.pyramid_budgets(20, 100, 3, 0, 20) == [39, 20, 1]
    assert reference.pyramid_budgets(20, 30, 3, 0, 20) == [30, 20, 10]
    assert reference.pyramid_budgets(20, 30, 1, 0, 20) == [20]
    assert sum(reference.pyramid_budgets(7, 30, 5, 3, 20)) == 35


def test_largest_remainder_by_hand():
    half = Fraction(1, 2)
    assert reference.largest_remainder([half, half, Fraction(1)], 2) == [1, 0, 1]


def test_meda_entropy_of_uniform_logits():
    """7.1: the softmax is restricted to the other modality: log of its size; causal rows see fewer."""
    uniform = Layer([[[0.0]] * 4], [[[0.0]] * 4], [[[0.0]] * 4], [False, True, False, True])
    assert reference.cross_modal_entropy(uniform, False) == pytest.approx(2 * math.log(2))
    assert reference.cross_modal_entropy(uniform, True) == pytest.approx(math.log(2) / 2)


@pytest.mark.parametrize("name", reference.METHODS)
@pytest.mark.parametrize("budget", [0.05, 0.3, 0.9, 1, 2, 1.0])
@pytest.mark.parametrize("pattern", ["interleaved", "all text", "all visual"])
def test_results_add_up(name, budget, pattern):
    layers = reference_layers(random_case(PATTERNS[pattern](18), layers=3, seed=4))
    options = {"window": 2} if name == "cam" else {}
    results = reference.compress(name, layers, budget, **options)
    B = reference.budget_tokens(budget, 18)
    for done in results:
        for head, evicted in zip(done.heads, done.evicted, strict=True):
            assert head.positions == sorted(set(head.positions))
            assert sum(head.mass) + evicted == 18
            assert all(mass >= 1 for mass in head.mass)
    if name != "full":
        assert sum(len(head.positions) for done in results for head in done.heads) == 3 * 2 * B
