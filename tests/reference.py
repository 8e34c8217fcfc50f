"""The specification's executable twin: every method in plain loops over lists of floats.

Written from METHODS.md alone; section numbers are its own. One sequence at a time, float64, no tensors,
no kvweave: slow on purpose, so that each line can be held against a sentence of the specification.

A layer is `Layer(queries[head][token][channel], keys[kv_head]..., values[kv_head]..., visual[token])`.
`compress(name, layers, budget, **options)` returns one `LayerResult` per layer. A method of uniform budgets
is a function of one layer and B, a layer-adaptive one of all layers and B; both are only called for B < L.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

Vector = list[float]
Score = list[float] | dict[int, float]  # by position
GUARD = 1e-9  # 1, Budget: repairs binary rounding in every floor


# ---------------------------------------------------------------- what goes in, what comes out


@dataclass
class Layer:
    """One layer of one unpadded sequence."""

    queries: list[list[Vector]]
    keys: list[list[Vector]]
    values: list[list[Vector]]
    visual: list[bool]
    scale: float | None = None
    rotary: tuple[list[Vector], list[Vector]] | None = None  # cos, sin: [token][channel]
    decoded: tuple[list[list[Vector]], list[list[Vector]]] | None = None  # queries[head][token], keys[kv_head][token]
    decoded_weight: float = 0.0  # 13.1, lam

    @property
    def length(self) -> int:
        return len(self.visual)

    @property
    def heads(self) -> int:
        return len(self.queries)

    @property
    def kv_heads(self) -> int:
        return len(self.keys)

    def group(self, kv: int) -> range:
        """1, GQA: query head h reads KV head h // g."""
        g = self.heads // self.kv_heads
        return range(kv * g, (kv + 1) * g)

    @cached_property
    def logits(self) -> list[list[Vector]]:
        """scale * q_i . k_j for all i, j, unmasked: [head][i][j]."""
        g = self.heads // self.kv_heads
        scale = 1 / math.sqrt(len(self.queries[0][0])) if self.scale is None else self.scale
        return [[[scale * dot(q, k) for k in self.keys[h // g]] for q in self.queries[h]] for h in range(self.heads)]

    @cached_property
    def decoded_attention(self) -> list[Vector]:
        """13.1, D[kv][j]: mean over decoded tokens and the group's heads of their probabilities on the prompt."""
        assert self.decoded is not None
        queries, keys = self.decoded
        scale = 1 / math.sqrt(len(queries[0][0])) if self.scale is None else self.scale
        out = []
        for kv in range(self.kv_heads):
            rows = []
            for h in self.group(kv):
                for t, q in enumerate(queries[h]):
                    seen = self.keys[kv] + keys[kv][: t + 1]
                    rows.append(softmax([scale * dot(q, k) for k in seen])[: self.length])
            out.append([mean([row[j] for row in rows]) for j in range(self.length)])
        return out

    @cached_property
    def attention(self) -> list[list[Vector]]:
        """1, Attention: A[h][i][j] = softmax over j <= i, zero above the diagonal."""
        return [
            [softmax(row[: i + 1]) + [0.0] * (self.length - i - 1) for i, row in enumerate(head)]
            for head in self.logits
        ]


@dataclass
class Head:
    positions: list[int]
    keys: list[Vector]
    values: list[Vector]
    mass: list[int]
    bias: Vector  # what 4.1 adds to the logits; zeros without mass_bias


@dataclass
class LayerResult:
    heads: list[Head]
    evicted: list[int]  # per KV head
    flow: float | None = None  # the ratio that was compared with theta
    flows: dict[str, float] = field(default_factory=dict)  # all three
    scope: str | None = None  # "cross" or "intra"


# ---------------------------------------------------------------- small arithmetic


def dot(x: Vector, y: Vector) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def softmax(row: Vector) -> Vector:
    top = max(row)
    powers = [math.exp(x - top) for x in row]
    total = sum(powers)
    return [p / total for p in powers]


def cosine(x: Vector, y: Vector) -> float:
    """2.2: norms clamped at 1e-12."""
    norm_x = max(math.sqrt(dot(x, x)), 1e-12)
    norm_y = max(math.sqrt(dot(y, y)), 1e-12)
    return dot(x, y) / (norm_x * norm_y)


def floor(x: float) -> int:
    return math.floor(x + GUARD)


def top(candidates: list[int] | range, count: int, score: Score) -> list[int]:
    """The `count` best candidates; 1, Ties: the lower position wins."""
    return sorted(candidates, key=lambda j: (-score[j], j))[:count]


# ---------------------------------------------------------------- 1, Budget


def budget_tokens(budget: float | int, length: int) -> int:
    """A float is a share of the length, an int is a number of tokens."""
    if isinstance(budget, int):
        return min(length, budget)
    return min(length, max(1, floor(budget * length)))


# ---------------------------------------------------------------- 2.1 Scores


def column_sum(layer: Layer, kv: int) -> Vector:
    """C[j]: group mean of what every causal row gives to j; 13.1 adds lam/(1-lam) * 32 * D."""
    sums = rows_sum(layer, kv, list(range(layer.length)))
    if layer.decoded is None:
        return sums
    odds = layer.decoded_weight / (1 - layer.decoded_weight)
    return [c + odds * 32 * d for c, d in zip(sums, layer.decoded_attention[kv], strict=True)]


def proxy_importance(layer: Layer, kv: int, proxies: int) -> Vector:
    """I[j]: group mean of what the last P rows give to j, decoded tokens mixed in; 13.1 times P."""
    P = min(proxies, layer.length)
    return mixed(layer, kv, P, rows_sum(layer, kv, list(range(layer.length - P, layer.length))))


def mixed(layer: Layer, kv: int, P: int, own: Vector) -> Vector:
    """13.1: P * ((1 - lam) W + lam D), where P * W is `own`, which may be of the first tokens only."""
    if layer.decoded is None:
        return own
    lam = layer.decoded_weight
    return [(1 - lam) * x + lam * P * layer.decoded_attention[kv][j] for j, x in enumerate(own)]


def rows_sum(layer: Layer, kv: int, rows: list[int]) -> Vector:
    heads = layer.group(kv)
    return [mean([sum(layer.attention[h][i][j] for i in rows) for h in heads]) for j in range(layer.length)]


def pooled_window_score(layer: Layer, kv: int, window: int, kernel: int, recent: int) -> Vector:
    """10.3: the window's attention on j < L-R, averaged over a width with zeros outside, divisor fixed."""
    P = min(window, layer.length)
    raw = rows_sum(layer, kv, list(range(layer.length - P, layer.length)))[: layer.length - recent]
    half = kernel // 2
    pooled = []
    for j in range(len(raw)):
        inside = [raw[i] for i in range(j - half, j - half + kernel) if 0 <= i < len(raw)]
        pooled.append(sum(inside) / kernel)
    return mixed(layer, kv, P, pooled)


# ---------------------------------------------------------------- 2.3 Integer allocation


def allocate(weights: list[float], total: int, lo: int, hi: int) -> list[int]:
    """Solved exactly in rationals where the specification bisects."""
    n = len(weights)
    largest = max(weights)
    w = [Fraction(max(x / largest, 1e-12)) if largest > 0 else Fraction(1) for x in weights]
    total = min(max(total, n * lo), n * hi)

    def clipped(lam: Fraction) -> list[Fraction]:
        return [min(max(lam * x, Fraction(lo)), Fraction(hi)) for x in w]

    # sum(clipped(lam)) is piecewise linear: find the piece that reaches the total, then the point on it
    corners = sorted({Fraction(0)} | {Fraction(lo) / x for x in w} | {Fraction(hi) / x for x in w})
    lam = corners[-1]
    for left, right in itertools.pairwise(corners):
        low, high = sum(clipped(left)), sum(clipped(right))
        if low <= total <= high:
            lam = left if high == low else left + (right - left) * (total - low) / (high - low)
            break
    return largest_remainder(clipped(lam), total, hi)


def largest_remainder(shares: list[Fraction], total: int, hi: int | None = None) -> list[int]:
    """Floor, then one unit each to the largest fractional parts (ties: lower index; full ones skipped)."""
    whole = [math.floor(x) for x in shares]
    missing = total - sum(whole)
    open_to_more = [i for i in range(len(shares)) if hi is None or whole[i] < hi]
    for i in sorted(open_to_more, key=lambda i: (-(shares[i] - whole[i]), i))[:missing]:
        whole[i] += 1
    return whole


def least(budget: int, length: int) -> int:
    """2.3: the smallest layer budget of MEDA, D2O and VL-Cache."""
    return min(budget, max(1, floor(0.01 * length)))


# ---------------------------------------------------------------- 2.2 Simultaneous merge


def merge_weights(
    rule: str, cosines: list[float], target_importance: float, importances: list[float]
) -> tuple[float, list[float]]:
    """w_c and w_e of one cluster with at least one member."""
    n = len(cosines)
    if rule == "similarity":
        Z = math.e + sum(math.exp(u) for u in cosines)
        return math.e / Z, [math.exp(u) / Z for u in cosines]
    if rule == "pivotal":
        return (1 + n / 2) / (n + 1), [1 / (2 * (n + 1))] * n
    if rule == "weighted":
        return 1 / (n + 1), [u / (n + 1) for u in cosines]
    if rule == "importance":
        Z = target_importance + sum(importances)
        if Z > 0:
            return target_importance / Z, [x / Z for x in importances]
    elif rule != "average":
        raise ValueError(rule)
    return 1 / (n + 1), [1 / (n + 1)] * n


def rephase(key: Vector, cos: list[Vector], sin: list[Vector], source: int, target: int) -> Vector:
    """4.2: Rot(phi_target - phi_source) key, pairs (m, m + d/2), channels beyond the tables untouched."""
    out = list(key)
    half = len(cos[0]) // 2
    for m in range(half):
        norm_t = math.hypot(cos[target][m], sin[target][m])
        norm_s = math.hypot(cos[source][m], sin[source][m])
        ct, st = cos[target][m] / norm_t, sin[target][m] / norm_t
        cs, ss = cos[source][m] / norm_s, sin[source][m] / norm_s
        c = ct * cs + st * ss
        s = st * cs - ct * ss
        out[m] = key[m] * c - key[m + half] * s
        out[m + half] = key[m + half] * c + key[m] * s
    return out


def weighted_sum(weights: list[float], vectors: list[Vector]) -> Vector:
    return [sum(w * x[d] for w, x in zip(weights, vectors, strict=True)) for d in range(len(vectors[0]))]


def merge(
    layer: Layer,
    kv: int,
    kept: list[int],
    target_of: dict[int, int],
    importance: Vector,
    *,
    merge_rule: str,
    merge_keys: bool = True,
    mass_bias: bool = False,
    mass_kind: str = "count",
    rope_aware: bool = False,
) -> Head:
    """2.2: every cluster from the original tensors, the same weights for keys and values."""
    K, V = layer.keys[kv], layer.values[kv]
    head = Head([], [], [], [], [])
    for c in sorted(kept):
        members = sorted(t for t, target in target_of.items() if target == c)
        key, value = K[c], V[c]
        if members:
            cosines = [cosine(K[e], K[c]) for e in members]
            w_c, w_e = merge_weights(merge_rule, cosines, importance[c], [importance[e] for e in members])
            if merge_keys:
                sources = [K[e] for e in members]
                if rope_aware and layer.rotary is not None:
                    sources = [rephase(K[e], *layer.rotary, source=e, target=c) for e in members]
                key = weighted_sum([w_c, *w_e], [K[c], *sources])
            value = weighted_sum([w_c, *w_e], [V[c], *(V[e] for e in members)])
        head.positions.append(c)
        head.keys.append(key)
        head.values.append(value)
        head.mass.append(1 + len(members))
        head.bias.append(0.0)
        if mass_bias and members:  # 4.1
            if mass_kind == "count":
                bias = math.log(1 + len(members))
            elif mass_kind == "entropy":
                bias = -sum(w * math.log(w) for w in [w_c, *w_e] if w > 0)
            else:
                bias = math.log((importance[c] + sum(importance[e] for e in members)) / importance[c])
                bias = min(max(bias, 0.0), math.log(layer.length))
            head.bias[-1] = bias
    return head


def nearest(K: list[Vector], t: int, allowed: list[int]) -> int | None:
    """2.2: the allowed target with the largest key cosine, ties to the lower position."""
    best = top(allowed, 1, {c: cosine(K[t], K[c]) for c in allowed})
    return best[0] if best else None


def evict(layer: Layer, kv: int, kept: list[int]) -> Head:
    """Keep these, copy them, drop the rest."""
    return merge(layer, kv, kept, {}, [], merge_rule="average")


def each_head(layer: Layer, keep: Callable[[int], Head]) -> LayerResult:
    heads = [keep(kv) for kv in range(layer.kv_heads)]
    return LayerResult(heads, [layer.length - sum(h.mass) for h in heads])


def identity(layer: Layer) -> LayerResult:
    """1, Budget: B >= L returns the layer unchanged."""
    return each_head(layer, lambda kv: evict(layer, kv, list(range(layer.length))))


def recent_and_top(layer: Layer, kv: int, recent: int, budget: int, score: Score) -> Head:
    """Keep the last `recent` and the best of the others, evict the rest."""
    L = layer.length
    return evict(layer, kv, top(range(L - recent), budget - recent, score) + list(range(L - recent, L)))


# ---------------------------------------------------------------- 3 FlowMM


def flow_ratios(layer: Layer) -> dict[str, float]:
    """3, step 1: the three ratios, each the mean over query heads."""
    L, visual = layer.length, layer.visual
    if all(visual) or not any(visual):
        return {"literal": 0.0, "balanced": 0.0, "nosink": 0.0}
    literal, balanced, nosink = [], [], []
    for A in layer.attention:
        literal.append(cross_share(A, visual, range(L)))
        balanced.append(mean(cross_means(A, visual)))
        nosink.append(cross_share(A, visual, range(4, L)))
    return {"literal": mean(literal), "balanced": mean(balanced), "nosink": mean(nosink)}


def cross_share(A: list[Vector], visual: list[bool], columns: range) -> float:
    """The share of these columns' mass that crosses modalities; nothing there counts as none."""
    rows = range(len(visual))
    cross = sum(A[i][j] for i in rows for j in columns if visual[i] != visual[j])
    whole = sum(A[i][j] for i in rows for j in columns)
    return cross / whole if whole > 0 else 0.0


def cross_means(A: list[Vector], visual: list[bool]) -> list[float]:
    """x_v: mean over visual rows of their mass on text; x_t: the other way round."""
    L = range(len(visual))
    x_v = mean([sum(A[i][j] for j in L if not visual[j]) for i in L if visual[i]])
    x_t = mean([sum(A[i][j] for j in L if visual[j]) for i in L if not visual[i]])
    return [x_v, x_t]


def lower_quantile(values: list[float], quantile: float | None) -> float:
    """3, step 4: the lower order statistic; None means no restriction."""
    if quantile is None:
        return math.inf
    ascending = sorted(values)
    return ascending[floor(quantile * (len(ascending) - 1))]


def with_floor(pivots: list[int], candidates: range, visual: list[bool], score: Score, f: int) -> list[int]:
    """3, modality_floor: first visual, then text, gets its best candidates in."""
    room = len(pivots)
    for wanted in (True, False):
        own = [j for j in candidates if visual[j] is wanted]
        have = [j for j in pivots if visual[j] is wanted]
        short = min(f, len(own), room // 2) - len(have)
        if short > 0:
            enter = top([j for j in own if j not in have], short, score)
            other = [j for j in pivots if visual[j] is not wanted]
            leave = sorted(other, key=lambda j: (score[j], -j))[:short]  # ties: the higher position goes
            pivots = [j for j in pivots if j not in leave] + enter
    return pivots


def match_and_merge(
    layer: Layer,
    kv: int,
    B: int,
    score: Vector,
    *,
    recent: int,
    scope: str,
    sensitivity_quantile: float | None,
    cross_scope: str,
    no_target: str = "evict",
    modality_floor: int = 0,
    **merging,
) -> Head:
    """3, steps 3-6, on any score."""
    L, visual, K = layer.length, layer.visual, layer.keys[kv]
    R = min(recent, B // 2)
    pivots = top(range(L - R), B - R, score)
    pivots = with_floor(pivots, range(L - R), visual, score, modality_floor)
    tau = lower_quantile([score[j] for j in pivots], sensitivity_quantile)
    eligible = [j for j in pivots if score[j] <= tau]
    target_of = {}
    for t in range(L - R):
        if t in pivots:
            continue
        if scope == "intra":
            allowed = [c for c in eligible if visual[c] == visual[t]]
        elif cross_scope == "other_only":
            allowed = [c for c in eligible if visual[c] != visual[t]]
        else:
            allowed = eligible
        if not allowed and no_target == "any":
            allowed = eligible
        target = nearest(K, t, allowed)
        if target is not None:
            target_of[t] = target
    return merge(layer, kv, pivots + list(range(L - R, L)), target_of, score, **merging)


def flowmm(
    layer: Layer,
    B: int,
    *,
    theta: float = 0.25,
    proxies: int = 32,
    sensitivity_quantile: float | None = 0.2,
    flow: str = "aligned",
    flow_ratio: str = "literal",
    cross_scope: str = "any",
    merge_rule: str = "similarity",
    **rest,
) -> LayerResult:
    flows = flow_ratios(layer)
    rho = flows[flow_ratio]
    scope = {
        "aligned": "cross" if rho > theta else "intra",
        "misaligned": "intra" if rho > theta else "cross",
        "cross": "cross",
        "intra": "intra",
    }[flow]

    def keep(kv: int) -> Head:
        return match_and_merge(
            layer,
            kv,
            B,
            proxy_importance(layer, kv, proxies),
            recent=proxies,
            scope=scope,
            sensitivity_quantile=sensitivity_quantile,
            cross_scope=cross_scope,
            merge_rule=merge_rule,
            **rest,
        )

    done = each_head(layer, keep)
    done.flow, done.flows, done.scope = rho, flows, scope
    return done


# ---------------------------------------------------------------- 5 FlashCache


def cosine_basis(N: int, m: int, t: int) -> float:
    """5.1: c_m cos(pi (t + 1/2) m / N)."""
    c = math.sqrt(1 / N) if m == 0 else math.sqrt(2 / N)
    return c * math.cos(math.pi * (t + 0.5) * m / N)


def low_pass(x: Vector, gamma: float) -> Vector:
    """Keep the coefficients m <= omega; with none to remove, the signal itself (gamma=1 gives Dev=0)."""
    N = len(x)
    omega = floor(gamma * N)
    if omega >= N - 1:
        return list(x)
    X = [sum(x[t] * cosine_basis(N, m, t) for t in range(N)) for m in range(omega + 1)]
    return [sum(X[m] * cosine_basis(N, m, t) for m in range(omega + 1)) for t in range(N)]


def squared_deviation(X: list[list[Vector]], gamma: float) -> list[list[Vector]]:
    """(X - X_base)^2 as [kv_head][token][channel]."""
    out = []
    for head in X:
        squares = [[0.0] * len(row) for row in head]
        for d in range(len(head[0])):
            signal = [row[d] for row in head]
            for t, base in enumerate(low_pass(signal, gamma)):
                squares[t][d] = (signal[t] - base) ** 2
        out.append(squares)
    return out


def energy(X: list[list[Vector]]) -> float:
    return sum(x for head in X for row in head for x in row)


def flashcache(
    layers: list[Layer], B: int, *, gamma: float = 0.2, per_head: bool = False, recent: int = 0
) -> list[LayerResult]:
    budgets = allocate([energy_above(layer, gamma) for layer in layers], len(layers) * B, 1, layers[0].length)
    R = min(recent, B // 2)
    deviation = [[deviations(layer, kv, gamma, per_head) for kv in range(layer.kv_heads)] for layer in layers]
    return [flashcache_layer(*args, R) for args in zip(layers, budgets, deviation, strict=True)]


def deviations(layer: Layer, kv: int, gamma: float, per_head: bool) -> Vector:
    """5.2: by token, of one KV head or the mean over all."""
    per_token = [[0.0] * layer.length for _ in range(layer.kv_heads)]
    for X in (layer.keys, layer.values):
        squares = squared_deviation(X, gamma)
        for head in range(layer.kv_heads):
            for t in range(layer.length):
                per_token[head][t] += mean(squares[head][t])
    if per_head:
        return per_token[kv]
    return [mean([head[t] for head in per_token]) for t in range(layer.length)]


def energy_above(layer: Layer, gamma: float) -> float:
    """5.3: R^l."""
    ratio = 0.0
    for X in (layer.keys, layer.values):
        squares = squared_deviation(X, gamma)
        whole = sum(x * x for head in X for row in head for x in row)
        ratio += sum(x for head in squares for row in head for x in row) / whole if whole > 0 else 0.0
    return ratio


def flashcache_layer(layer: Layer, n: int, deviation: list[Vector], R: int) -> LayerResult:
    return each_head(layer, lambda kv: recent_and_top(layer, kv, min(R, n), n, deviation[kv]))


# ---------------------------------------------------------------- 6 LOOK-M, 7 MEDA


def lookm(
    layer: Layer,
    B: int,
    *,
    text_prior: str = "exact",
    merge_rule: str = "pivotal",
    recent_frac: float = 0.5,
    **merging,
) -> LayerResult:
    L = layer.length
    M = min(floor(recent_frac * B), B - 1)

    def keep(kv: int) -> Head:
        C = column_sum(layer, kv)
        prior = 0.0 if text_prior == "off" else max(C)
        A_s = [c if v else c + prior for c, v in zip(C, layer.visual, strict=True)]
        kept = set(range(L - M, L)) | set(top(range(L - M), B - M, A_s))
        if text_prior == "union":
            kept |= {j for j in range(L) if not layer.visual[j]}
        target_of = {t: nearest(layer.keys[kv], t, sorted(kept)) for t in range(L) if t not in kept}
        return merge(layer, kv, sorted(kept), target_of, C, merge_rule=merge_rule, **merging)

    return each_head(layer, keep)


def cross_modal_entropy(layer: Layer, causal: bool) -> float:
    """7.1: mean over query heads of E_TV + E_VT, in nats."""
    visual = layer.visual
    if all(visual) or not any(visual):
        return 0.0
    per_head = []
    for logits in layer.logits:
        E = 0.0
        for from_visual in (False, True):
            rows = [i for i in range(layer.length) if visual[i] is from_visual]
            columns = [j for j in range(layer.length) if visual[j] is not from_visual]
            for i in rows:
                seen = [j for j in columns if j <= i or not causal]
                if seen:
                    p = softmax([logits[i][j] for j in seen])
                    E -= sum(x * math.log(x) for x in p if x > 0) / len(rows)
        per_head.append(E)
    return mean(per_head)


def meda(
    layers: list[Layer],
    B: int,
    *,
    causal: bool = False,
    recent_frac: float = 0.75,
    merge_rule: str = "average",
    **rest,
) -> list[LayerResult]:
    L = layers[0].length
    weights = softmax([cross_modal_entropy(layer, causal) for layer in layers])
    budgets = allocate(weights, len(layers) * B, least(B, L), L)
    return [
        lookm(layer, B_l, recent_frac=recent_frac, merge_rule=merge_rule, **rest) if B_l < L else identity(layer)
        for layer, B_l in zip(layers, budgets, strict=True)
    ]


# ---------------------------------------------------------------- 8 D2O


def variance_statistic(layer: Layer, var_norm: str) -> float:
    """8.1: from per-query-head column sums."""
    L = layer.length
    variances = []
    for A in layer.attention:
        c = [sum(A[i][j] for i in range(L)) for j in range(L)]
        variances.append(sum((x - mean(c)) ** 2 for x in c) / (L - 1))
    if var_norm == "none":
        return mean(variances)
    low, high = min(variances), max(variances)
    return mean([(x - low) / (high - low + 1e-6) for x in variances])


def d2o(layers: list[Layer], B: int, *, var_norm: str = "head_minmax", **rest) -> list[LayerResult]:
    L = layers[0].length
    weights = softmax([-variance_statistic(layer, var_norm) for layer in layers])
    budgets = allocate(weights, len(layers) * B, least(B, L), L)
    return [
        d2o_layer(layer, B_l, **rest) if B_l < L else identity(layer)
        for layer, B_l in zip(layers, budgets, strict=True)
    ]


def d2o_layer(
    layer: Layer, B: int, *, recent_frac: float = 0.25, merge_rule: str = "similarity", **merging
) -> LayerResult:
    L = layer.length
    M = floor(recent_frac * B)

    def keep(kv: int) -> Head:
        K, C = layer.keys[kv], column_sum(layer, kv)
        kept = sorted(top(range(L - M), B - M, C) + list(range(L - M, L)))
        target = {t: nearest(K, t, kept) for t in range(L) if t not in kept}
        u = {t: cosine(K[t], K[c]) for t, c in target.items()}
        tau_0 = mean(list(u.values()))
        target_of = {t: c for t, c in target.items() if u[t] >= tau_0}
        return merge(layer, kv, kept, target_of, C, merge_rule=merge_rule, **merging)

    return each_head(layer, keep)


# ---------------------------------------------------------------- 9 KVMerger, 9.1 Chelsea


def kvmerger(
    layer: Layer,
    B: int,
    *,
    variant: str = "budgeted",
    threshold: float = 0.75,
    sigma: float = 5.0,
    value_scale: bool = False,
    recent: int = 32,
    merge_keys: bool = True,
    mass_bias: bool = False,
    rope_aware: bool = False,
) -> LayerResult:
    L = layer.length
    R = min(recent, (B if variant == "budgeted" else L) // 2)

    def keep(kv: int) -> Head:
        K, V, C = layer.keys[kv], layer.values[kv], column_sum(layer, kv)
        pairs = range(L - R - 1)  # pair i joins i and i+1, both before the recent window
        u = [cosine(K[i], K[i + 1]) for i in pairs]
        joined = top(pairs, L - B, u) if variant == "budgeted" else [i for i in pairs if u[i] > threshold]
        clusters = [[0]]
        for t in range(1, L):
            if t - 1 in joined:
                clusters[-1].append(t)
            else:
                clusters.append([t])
        head = Head([], [], [], [], [])
        for cluster in clusters:
            p = top(cluster, 1, C)[0]
            key, value = K[p], V[p]
            if len(cluster) > 1:
                g = [math.exp(-squared_distance(K[i], K[p]) / (2 * sigma**2)) for i in cluster]
                w = [x / sum(g) for x in g]
                sources = [K[i] for i in cluster]
                if rope_aware and layer.rotary is not None:
                    sources = [rephase(K[i], *layer.rotary, source=i, target=p) for i in cluster]
                if merge_keys:
                    key = weighted_sum(w, sources)
                value = weighted_sum(w, [V[i] for i in cluster])
                if value_scale:
                    value = [len(cluster) * x for x in value]
            head.positions.append(p)
            head.keys.append(key)
            head.values.append(value)
            head.mass.append(len(cluster))
            head.bias.append(math.log(len(cluster)) if mass_bias else 0.0)
        return head

    return each_head(layer, keep)


def squared_distance(x: Vector, y: Vector) -> float:
    return sum((a - b) ** 2 for a, b in zip(x, y, strict=True))


@dataclass
class Entry:
    """9.1: an entry of the shortened sequence."""

    position: int
    mass: int
    key: Vector
    value: Vector


def chelsea(layer: Layer, B: int, *, chunk: int = 64, recent: int = 32, mass_bias: bool = False) -> LayerResult:
    L = layer.length
    R = min(recent, B // 2)

    def keep(kv: int) -> Head:
        K, V = layer.keys[kv], layer.values[kv]
        entries = [Entry(j, 1, K[j], V[j]) for j in range(L - R)]
        size = chunk
        while len(entries) > B - R:
            # Chunks are those of the first cut: they shrink as their entries merge.
            chunks = [[e for e in entries if start <= e.position < start + size] for start in range(0, L - R, size)]
            pairs = [pair for inside in chunks for pair in best_pairs(inside)]
            if not pairs:
                size *= 2
                continue
            pairs.sort(key=lambda pair: (-pair[0], pair[1].position))
            entries = join_pairs(entries, pairs[: len(entries) - (B - R)])
        entries += [Entry(j, 1, K[j], V[j]) for j in range(L - R, L)]
        return Head(
            [e.position for e in entries],
            [e.key for e in entries],
            [e.value for e in entries],
            [e.mass for e in entries],
            [math.log(e.mass) if mass_bias else 0.0 for e in entries],
        )

    return each_head(layer, keep)


def best_pairs(inside: list[Entry]) -> list[tuple[float, Entry, Entry]]:
    """Each entry of A (even places) with its most similar one of B (odd places): (cosine, a, b)."""
    A, B = inside[0::2], inside[1::2]
    pairs = []
    for a in A:
        scored = [(cosine(a.key, b.key), a, b) for b in B]
        if scored:
            pairs.append(min(scored, key=lambda pair: (-pair[0], pair[2].position)))
    return pairs


def join_pairs(entries: list[Entry], pairs: list[tuple[float, Entry, Entry]]) -> list[Entry]:
    """Each b takes all its a at once: the mass-weighted mean, at the heaviest (tie: lower) position."""
    joined = []
    for entry in entries:
        if any(a is entry for _, a, _ in pairs):
            continue
        cluster = [a for _, a, b in pairs if b is entry] + [entry]
        if len(cluster) > 1:
            mass = sum(e.mass for e in cluster)
            weights = [e.mass / mass for e in cluster]
            heaviest = min(cluster, key=lambda e: (-e.mass, e.position))
            entry = Entry(
                heaviest.position,
                mass,
                weighted_sum(weights, [e.key for e in cluster]),
                weighted_sum(weights, [e.value for e in cluster]),
            )
        joined.append(entry)
    return sorted(joined, key=lambda e: e.position)


# ---------------------------------------------------------------- 10 Eviction baselines


def streaming_llm(layer: Layer, B: int, *, sinks: int = 4) -> LayerResult:
    """10.1"""
    L = layer.length
    s = min(sinks, B - 1)
    return each_head(layer, lambda kv: evict(layer, kv, list(range(s)) + list(range(L - (B - s), L))))


def h2o(layer: Layer, B: int) -> LayerResult:
    """10.2"""
    return each_head(layer, lambda kv: recent_and_top(layer, kv, B // 2, B, column_sum(layer, kv)))


def snapkv(layer: Layer, B: int, *, window: int = 32, kernel: int = 5) -> LayerResult:
    """10.3"""
    return snapkv_layer(layer, B, R=min(window, B // 2), window=window, kernel=kernel)


def snapkv_layer(layer: Layer, B: int, *, R: int, window: int, kernel: int) -> LayerResult:
    def keep(kv: int) -> Head:
        return recent_and_top(layer, kv, R, B, pooled_window_score(layer, kv, window, kernel, R))

    return each_head(layer, keep)


def pyramid_budgets(B: int, L: int, n: int, R: int, beta: float) -> list[int]:
    """10.4. With B = 1 the printed rule would leave upper layers empty, while 12.2 wants one entry each."""
    if n == 1 or B == 1:
        return [B] * n
    b_min = Fraction(B - R) / Fraction(beta)
    b_max = 2 * (B - R) - b_min
    if b_max > L - R:
        b_max = Fraction(L - R)
        b_min = 2 * (B - R) - b_max
    return largest_remainder([R + b_max - layer * (b_max - b_min) / (n - 1) for layer in range(n)], n * B)


def pyramidkv(
    layers: list[Layer], B: int, *, window: int = 32, kernel: int = 5, beta: float = 20
) -> list[LayerResult]:
    """10.4"""
    L = layers[0].length
    R = min(window, B // 2)
    return [
        snapkv_layer(layer, B_l, R=R, window=window, kernel=kernel) if B_l < L else identity(layer)
        for layer, B_l in zip(layers, pyramid_budgets(B, L, len(layers), R, beta), strict=True)
    ]


def adakv(layer: Layer, B: int, *, window: int = 32, kernel: int = 5) -> LayerResult:
    """10.5"""
    n, L, R = layer.kv_heads, layer.length, min(window, B // 2)
    scores = [pooled_window_score(layer, kv, window, kernel, R) for kv in range(n)]
    everything = [(kv, j) for kv in range(n) for j in range(L - R)]
    everything.sort(key=lambda at: (-scores[at[0]][at[1]], at))
    best = everything[: n * (B - R)]
    cnt = [sum(1 for kv, _ in best if kv == head) for head in range(n)]
    shares = [Fraction(4, 5) * c + Fraction(1, 5) * (B - R) for c in cnt]
    budgets = [R + extra for extra in largest_remainder(shares, n * (B - R))]
    return each_head(layer, lambda kv: recent_and_top(layer, kv, R, budgets[kv], scores[kv]))


def vlcache(layers: list[Layer], B: int, *, p: float = 0.01, recent_frac: float = 0.1) -> list[LayerResult]:
    """10.6"""
    L, visual = layers[0].length, layers[0].visual
    rows = [i for i in range(L) if any(visual) and not any(visual[i:])]
    if not rows:
        rows = list(range(L - min(32, L), L))
    densities = [density(layer, rows, p) for layer in layers]
    budgets = allocate(densities, len(layers) * B, least(B, L), L)
    return [
        vlcache_layer(layer, B_l, rows, recent_frac) if B_l < L else identity(layer)
        for layer, B_l in zip(layers, budgets, strict=True)
    ]


def density(layer: Layer, rows: list[int], p: float) -> float:
    """Counts first, one division last: equal densities stay equal."""
    dense = sum(1 for A in layer.attention for i in rows for j in range(i + 1) if A[i][j] >= p * max(A[i]))
    return dense / (layer.heads * sum(i + 1 for i in rows))


def vlcache_layer(layer: Layer, B: int, rows: list[int], recent_frac: float) -> LayerResult:
    R = 0 if B == 1 else max(1, floor(recent_frac * B))
    return each_head(
        layer, lambda kv: recent_and_top(layer, kv, R, B, mixed(layer, kv, len(rows), rows_sum(layer, kv, rows)))
    )


def mixkv(layer: Layer, B: int, *, window: int = 32, kernel: int = 5) -> LayerResult:
    """10.7"""
    L, R = layer.length, min(window, B // 2)

    def keep(kv: int) -> Head:
        ext = [x / min(window, L) for x in pooled_window_score(layer, kv, window, kernel, R)]
        unit = [normalised(k) for k in layer.keys[kv]]
        mu = [mean([k[d] for k in unit]) for d in range(len(unit[0]))]
        r = min(max((L * dot(mu, mu) - 1) / (L - 1), 0.0), 1.0)
        norms = scaled_like(ext, [math.sqrt(dot(v, v)) for v in layer.values[kv][: L - R]])
        imp = [e + s for e, s in zip(ext, norms, strict=True)]
        div = scaled_like(ext, [-dot(k, mu) for k in unit[: L - R]])
        score = [r * d + (1 - r) * i for d, i in zip(div, imp, strict=True)]
        return recent_and_top(layer, kv, R, B, score)

    return each_head(layer, keep)


def normalised(x: Vector) -> Vector:
    norm = max(math.sqrt(dot(x, x)), 1e-12)
    return [v / norm for v in x]


def scaled_like(ext: Vector, x: Vector) -> Vector:
    """mm(x) brought to the mean of ext."""
    mm = [(v - min(x)) / (max(x) - min(x) + 1e-8) for v in x]
    return [v * mean(ext) / (mean(mm) + 1e-8) for v in mm]


def cam(layer: Layer, B: int, *, window: int, mode: str = "expected", against: str = "mean") -> LayerResult:
    """10.8, the deterministic mode; against the largest: as in released code."""
    assert mode == "expected"
    L = layer.length

    def keep(kv: int) -> Head:
        V, C = layer.values[kv], column_sum(layer, kv)
        head = recent_and_top(layer, kv, B // 2, B, C)
        for t in range(L):
            if t in head.positions:
                continue
            slots = [s for s, c in enumerate(head.positions) if c > t][:window]
            if not slots:
                continue
            mine = [C[head.positions[s]] for s in slots]
            base = mean(mine) if against == "mean" else max(C[p] for p in head.positions)
            z = min(max(C[t] / base, 0.0), 1.0)
            for s in slots:
                head.values[s] = weighted_sum([1.0, z / len(slots)], [head.values[s], V[t]])
        return head

    return each_head(layer, keep)


def madakv(layer: Layer, B: int, *, proxies: int = 32) -> LayerResult:
    """10.9"""
    L, R = layer.length, min(proxies, B // 2)
    visual = [j for j in range(L - R) if layer.visual[j]]
    text = [j for j in range(L - R) if not layer.visual[j]]

    def keep(kv: int) -> Head:
        score = proxy_importance(layer, kv, proxies)
        on_visual = sum(score[j] for j in visual)
        a = on_visual / (on_visual + sum(score[j] for j in text))
        n_visual = floor(a * (B - R) + 0.5)
        n_visual = max(min(n_visual, len(visual)), B - R - len(text))
        best = top(visual, n_visual, score) + top(text, B - R - n_visual, score)
        return evict(layer, kv, best + list(range(L - R, L)))

    return each_head(layer, keep)


def infinipot(layer: Layer, B: int, *, newest: int = 1, share: float = 0.5) -> LayerResult:
    """METHODS_NEW 18, video forms; text beyond half of the budget where older frames are fewer than what is left."""
    L = layer.length
    text = [j for j in range(L) if not layer.visual[j]]
    runs: list[list[int]] = []
    for j in range(L):
        if layer.visual[j]:
            runs = runs if j and layer.visual[j - 1] else [*runs, []]
            runs[-1].append(j)
    new, older = runs[max(0, len(runs) - newest) :], runs[: max(0, len(runs) - newest)]
    words = text[max(0, len(text) - B // 2) :]
    shown = [j for run in new for j in run]
    shown = shown[max(0, len(shown) - (B - len(words))) :]
    N = B - len(words) - len(shown)

    def keep(kv: int) -> Head:
        K, V = layer.keys[kv], layer.values[kv]
        likeness: dict[int, float] = {}
        for run in older:
            for place, j in enumerate(run):
                there = [K[frame[place]] for frame in new if place < len(frame)]
                mean_key = [mean([k[d] for k in there]) for d in range(len(K[j]))] if there else []
                likeness[j] = cosine(K[j], mean_key) if there else 0.0
        changed = sorted(likeness, key=lambda j: (likeness[j], j))[: floor(share * N)]
        rest = sorted((j for j in likeness if j not in changed), key=lambda j: (-dot(V[j], V[j]), j))
        spare = [j for j in reversed(text) if j not in words]
        return evict(layer, kv, sorted([*words, *shown, *[*changed, *rest, *spare][:N]]))

    return each_head(layer, keep)


# ---------------------------------------------------------------- 13 peak and weave


def peak_score(layer: Layer, kv: int, probed: bool) -> Vector:
    """13.2: the largest group-mean attention that any prompt row gives; with probes D / max D + 0.5 peak."""
    L, heads = layer.length, layer.group(kv)
    most = [max(mean([layer.attention[h][i][j] for h in heads]) for i in range(L)) for j in range(L)]
    if layer.decoded is None or not probed:
        return mixed(layer, kv, 1, most)
    D = layer.decoded_attention[kv]
    return [d / max(D) + 0.5 * p for d, p in zip(D, most, strict=True)]


def peak(layer: Layer, B: int, *, recent: int = 32, probed: bool = False) -> LayerResult:
    def keep(kv: int) -> Head:
        return recent_and_top(layer, kv, min(recent, B // 2), B, peak_score(layer, kv, probed))

    return each_head(layer, keep)


def weave(
    layer: Layer,
    B: int,
    *,
    proxies: int = 32,
    sensitivity_quantile: float | None = 0.35,
    recent: int = 32,
    cross_scope: str = "any",
    merge_rule: str = "average",
    mass_bias: bool = True,
    probed: bool = False,
    merge: bool = True,
    **merging,
) -> LayerResult:
    """13.3: s is that of 13.1, with probes that of 13.2."""
    P = min(proxies, layer.length)

    def keep(kv: int) -> Head:
        score = peak_score(layer, kv, True) if probed else [x / P for x in proxy_importance(layer, kv, proxies)]
        if not merge:
            return recent_and_top(layer, kv, min(recent, B // 2), B, score)
        return match_and_merge(
            layer,
            kv,
            B,
            score,
            recent=recent,
            scope="cross",
            sensitivity_quantile=sensitivity_quantile,
            cross_scope=cross_scope,
            merge_rule=merge_rule,
            mass_bias=mass_bias,
            **merging,
        )

    return each_head(layer, keep)


UNIFORM: dict[str, Callable[..., LayerResult]] = {
    "full": lambda layer, B: identity(layer),
    "streaming_llm": streaming_llm,
    "h2o": h2o,
    "snapkv": snapkv,
    "adakv": adakv,
    "mixkv": mixkv,
    "flowmm": flowmm,
    "lookm": lookm,
    "kvmerger": kvmerger,
    "chelsea": chelsea,
    "cam": cam,
    "madakv": madakv,
    "infinipot": infinipot,
    "peak": peak,
    "weave": weave,
}
LAYER_ADAPTIVE: dict[str, Callable[..., list[LayerResult]]] = {
    "pyramidkv": pyramidkv,
    "flashcache": flashcache,
    "meda": meda,
    "d2o": d2o,
    "vlcache": vlcache,
}


def compress(name: str, layers: list[Layer], budget: float | int, **options) -> list[LayerResult]:
    L = layers[0].length
    B = budget_tokens(budget, L)
    if B >= L:
        return [identity(layer) for layer in layers]
    if name in reference_entries.NAMES:
        return reference_entries.compress(name, layers, B, **options)
    own = name in UNIFORM or name in LAYER_ADAPTIVE
    if name in reference_scores.RECIPES and (not own or set(options) & set(reference_scores.SHARED)):
        return reference_scores.scored(name, layers, B, **options)
    if name in UNIFORM:
        return [UNIFORM[name](layer, B, **options) for layer in layers]
    return LAYER_ADAPTIVE[name](layers, B, **options)


import reference_entries  # noqa: E402  (both are written in terms of this file)
import reference_scores  # noqa: E402

METHODS = sorted({*UNIFORM, *LAYER_ADAPTIVE, *reference_scores.RECIPES, *reference_entries.NAMES})
