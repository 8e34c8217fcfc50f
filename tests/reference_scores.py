"""SPEC 16 and 17.7 in plain loops: every method that keeps forced tokens and the best of the others by one
score.

Written from the specification alone, as `reference.py`. A score is a tuple for each candidate position: its first
number decides, the next among equals, then the lower position.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import reference as plain
from reference import Head, Layer, LayerResult, Vector, dot, floor, mean, softmax

Ranked = dict[int, tuple[float, ...]]  # candidates only


@dataclass
class Asked:
    """What a score is asked for: the layer's budget, its forced tokens and the options."""

    B: int
    S: int
    R: int
    options: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.options[name]


@dataclass
class Recipe:
    """A scored method: options, forced tokens, score and layer budgets."""

    score: Callable[[Layer, int, Asked], Vector | Ranked]
    defaults: dict[str, Any]
    forced: Callable[[int, int, dict[str, Any]], tuple[int, int]] | None = None  # (B of the layer, uniform B)
    budgets: Callable[[list[Layer], int, dict[str, Any]], list[int]] | None = None
    own: dict[str, Any] = field(default_factory=dict)  # defaults of 17.7 that differ


SHARED = {
    "heads_by": "mean",
    "rows_by": "mean",
    "ahead": 0,
    "behind": 0,
    "fade": 1.0,
    "allocation": "head",
    "floor": 0.2,
    "profile": None,
    "mix": 0.5,
}


def forced_of(B: int, options: dict[str, Any]) -> tuple[int, int]:
    """15.2: S first and R last tokens."""
    R = min(options.get("recent", 0), B // 2)
    return min(options.get("sinks", 0), (B - R) // 2), R


# ---------------------------------------------------------------- reductions


def over_heads(rows: list[float], by: str) -> float:
    return max(rows) if by == "max" else mean(rows)


def over_rows(rows: list[float], by: str) -> float:
    return max(rows) if by == "max" else sum(rows)


def prompt_part(layer: Layer, kv: int, rows: list[int], options: dict[str, Any]) -> Vector:
    """17.7: heads first, then rows; the sum where it is no maximum."""
    out = []
    for j in range(layer.length):
        by_row = [over_heads([layer.attention[h][i][j] for h in layer.group(kv)], options["heads_by"]) for i in rows]
        out.append(over_rows(by_row, options["rows_by"]))
    return out


def decoded_rows(layer: Layer) -> list[list[Vector]]:
    """13.1: each decoded token's probabilities on the prompt, its own kind in the denominator: [head][token][j]."""
    assert layer.decoded is not None
    queries, keys = layer.decoded
    scale = 1 / math.sqrt(len(queries[0][0])) if layer.scale is None else layer.scale
    out = []
    for h in range(layer.heads):
        kv = h // (layer.heads // layer.kv_heads)
        out.append(
            [
                softmax([scale * dot(q, k) for k in layer.keys[kv] + keys[kv][: t + 1]])[: layer.length]
                for t, q in enumerate(queries[h])
            ]
        )
    return out


def decoded_part(layer: Layer, kv: int, options: dict[str, Any]) -> Vector:
    """D of 13.1, reduced as asked; the mean over tokens where it is no maximum."""
    rows = decoded_rows(layer)
    tokens = len(rows[0])
    out = []
    for j in range(layer.length):
        by_row = [over_heads([rows[h][t][j] for h in layer.group(kv)], options["heads_by"]) for t in range(tokens)]
        out.append(over_rows(by_row, options["rows_by"]) / (1 if options["rows_by"] == "max" else tokens))
    return out


def mixed(layer: Layer, kv: int, rows: int, own: Vector, options: dict[str, Any]) -> Vector:
    """13.1, times the number of rows where these were summed."""
    if layer.decoded is None:
        return own
    D, lam = decoded_part(layer, kv, options), layer.decoded_weight
    factor = 1 if options["rows_by"] == "max" else rows
    return [(1 - lam) * w + lam * factor * d for w, d in zip(own, D, strict=False)]


def window_score(layer: Layer, kv: int, window: int, options: dict[str, Any]) -> Vector:
    P = min(window, layer.length)
    own = prompt_part(layer, kv, list(range(layer.length - P, layer.length)), options)
    return mixed(layer, kv, P, own, options)


# ---------------------------------------------------------------- 10: the scored ones of the first part


def snapkv(layer: Layer, kv: int, asked: Asked) -> Vector:
    P, before = min(asked["window"], layer.length), layer.length - asked.R
    own = prompt_part(layer, kv, list(range(layer.length - P, layer.length)), asked.options)
    if not (asked["ahead"] or asked["behind"]):
        half, width = asked["kernel"] // 2, asked["kernel"]
        raw = own[:before]
        own = [
            sum(raw[i] for i in range(j - half, j - half + width) if 0 <= i < before) / width for j in range(before)
        ]
    return mixed(layer, kv, P, own, asked.options)


def mixkv(layer: Layer, kv: int, asked: Asked) -> Vector:
    L, before = layer.length, layer.length - asked.R
    rows = 1 if asked["rows_by"] == "max" else min(asked["window"], L)
    ext = [x / rows for x in snapkv(layer, kv, asked)[:before]]
    unit = [plain.normalised(k) for k in layer.keys[kv]]
    mu = [mean([k[d] for k in unit]) for d in range(len(unit[0]))]
    r = min(max((L * dot(mu, mu) - 1) / (L - 1), 0.0), 1.0)
    norms = plain.scaled_like(ext, [norm(v) for v in layer.values[kv][:before]])
    div = plain.scaled_like(ext, [-dot(k, mu) for k in unit[:before]])
    return [r * d + (1 - r) * (e + s) for d, e, s in zip(div, ext, norms, strict=True)]


def h2o(layer: Layer, kv: int, asked: Asked) -> Vector:
    own = prompt_part(layer, kv, list(range(layer.length)), asked.options)
    if layer.decoded is None or asked["rows_by"] == "max":
        return mixed(layer, kv, 1, own, asked.options)
    odds = layer.decoded_weight / (1 - layer.decoded_weight)
    return [c + odds * 32 * d for c, d in zip(own, decoded_part(layer, kv, asked.options), strict=True)]


def peak(layer: Layer, kv: int, asked: Asked) -> Vector:
    own = prompt_part(layer, kv, list(range(layer.length)), asked.options)
    if layer.decoded is None:
        return own
    D = decoded_part(layer, kv, asked.options | {"rows_by": "mean"})
    if asked.options.get("probed"):
        return [d / max(D) + 0.5 * p for d, p in zip(D, own, strict=True)]
    return [(1 - layer.decoded_weight) * p + layer.decoded_weight * d for p, d in zip(own, D, strict=True)]


def after_images(layer: Layer) -> list[int]:
    visual = layer.visual
    rows = [i for i in range(layer.length) if any(visual) and not any(visual[i:])]
    return rows or list(range(layer.length - min(32, layer.length), layer.length))


def vlcache(layer: Layer, kv: int, asked: Asked) -> Vector:
    rows = after_images(layer)
    return mixed(layer, kv, len(rows), prompt_part(layer, kv, rows, asked.options), asked.options)


def flashcache(layer: Layer, kv: int, asked: Asked) -> Vector:
    return plain.deviations(layer, kv, asked["gamma"], asked["per_head"])


def weave(layer: Layer, kv: int, asked: Asked) -> Vector:
    if asked.options.get("probed"):
        return peak(layer, kv, Asked(asked.B, asked.S, asked.R, asked.options | {"rows_by": "max"}))
    score = window_score(layer, kv, asked["proxies"], asked.options)
    lends = asked["ahead"] or asked["behind"]
    return [0.0 if lends and j < asked.S else s for j, s in enumerate(score)]


# ---------------------------------------------------------------- 16


def norm(x: Vector) -> float:
    return math.sqrt(dot(x, x))


def tova(layer: Layer, kv: int, asked: Asked) -> Vector:
    """16.1: the last row; one set for all KV heads unless `per_head`."""
    if asked["per_head"]:
        return window_score(layer, kv, 1, asked.options)
    heads = [window_score(layer, other, 1, asked.options) for other in range(layer.kv_heads)]
    return [over_heads([head[j] for head in heads], asked["heads_by"]) for j in range(layer.length)]


def keydiff(layer: Layer, kv: int, asked: Asked) -> Vector:
    """16.2: 1 - cos(k_j, u)."""
    unit = [plain.normalised(k) for k in layer.keys[kv]]
    u = [mean([k[d] for k in unit]) for d in range(len(unit[0]))]
    return [1 - plain.cosine(k, u) for k in layer.keys[kv]]


def knorm(layer: Layer, kv: int, asked: Asked) -> Vector:
    """16.3"""
    return [-norm(k) for k in layer.keys[kv]]


def angle(layer: Layer, token: int, pair: int) -> float:
    assert layer.rotary is not None
    cos, sin = layer.rotary
    return math.atan2(sin[token][pair], cos[token][pair])


def turned(x: Vector, angles: list[float]) -> Vector:
    """Rot(angles) x on half-split pairs; channels beyond them as they are."""
    return linear(x, [math.cos(a) for a in angles], [math.sin(a) for a in angles])


def linear(x: Vector, c: list[float], s: list[float]) -> Vector:
    """[[c, -s], [s, c]] on each channel pair."""
    out, half = list(x), len(c)
    for m in range(half):
        out[m] = c[m] * x[m] - s[m] * x[m + half]
        out[m + half] = s[m] * x[m] + c[m] * x[m + half]
    return out


def pairs_of(layer: Layer) -> int:
    return len(layer.rotary[0][0]) // 2 if layer.rotary is not None else 0


def unrotated(layer: Layer, x: Vector, token: int) -> Vector:
    return turned(x, [-angle(layer, token, m) for m in range(pairs_of(layer))])


def expected_attention(layer: Layer, kv: int, asked: Asked) -> Ranked:
    """16.4"""
    L, D, half = layer.length, len(layer.keys[kv][0]), pairs_of(layer)
    scale = 1 / math.sqrt(D) if layer.scale is None else layer.scale
    rows = [i for i in range(L) if i >= asked["sinks"]] if asked["sinks"] < L else list(range(L))
    texts = [j for j in range(L - 1) if not layer.visual[j] and not layer.visual[j + 1]]
    c, s = [], []
    for m in range(half):
        omega = 0.0
        if L > 1:
            j = texts[-1] if texts else L - 2
            omega = angle(layer, j + 1, m) - angle(layer, j, m)
            omega = math.atan2(math.sin(omega), math.cos(omega))
        future = [angle(layer, L - 1, m) + (t + 1) * omega for t in range(asked["future"])]
        c.append(mean([math.cos(a) for a in future]))
        s.append(mean([math.sin(a) for a in future]))
    positions = list(range(asked.S, L))
    by_head = []
    for h in layer.group(kv):
        queries = [unrotated(layer, layer.queries[h][i], i) for i in rows]
        mu = [mean([q[d] for q in queries]) for d in range(D)]
        sigma = [[mean([(q[a] - mu[a]) * (q[b] - mu[b]) for q in queries]) for b in range(D)] for a in range(D)]
        half_turned = [linear(row, c, s) for row in sigma]  # Sig R^T
        columns = [linear([half_turned[a][b] for a in range(D)], c, s) for b in range(D)]  # R Sig R^T, by column
        ahead = linear(mu, c, s)
        z = []
        for j in positions:
            k = layer.keys[kv][j]
            z.append(scale * dot(k, ahead))
            if asked["covariance"]:
                z[-1] += 0.5 * scale**2 * sum(k[b] * dot(k, columns[b]) for b in range(D))
        by_head.append(softmax(z))
    out: Ranked = {}
    for n, j in enumerate(positions):
        p = over_heads([head[n] for head in by_head], asked["heads_by"])
        out[j] = ((p + asked["epsilon"]) * norm(layer.values[kv][j]) if asked["value_norm"] else p,)
    return out


def prompt_only(layer: Layer, kv: int, window: int) -> tuple[list[list[Vector]], list[list[Vector]]]:
    """15.3: A of the last rows and of the decoded tokens, over prompt slots only: [token][head][j]."""
    L, P = layer.length, min(window, layer.length)
    own = [[layer.attention[h][i] for h in layer.group(kv)] for i in range(L - P, L)]
    behind = []
    if layer.decoded is not None:
        scale = 1 / math.sqrt(len(layer.keys[kv][0])) if layer.scale is None else layer.scale
        for t in range(len(layer.decoded[0][0])):
            heads = [[scale * dot(layer.decoded[0][h][t], k) for k in layer.keys[kv]] for h in layer.group(kv)]
            behind.append([softmax(logits) for logits in heads])
    return own, behind


def leave_one_out(layer: Layer, kv: int, asked: Asked) -> Vector:
    """16.5"""
    V = layer.values[kv]

    def change(A: Vector, j: int) -> float:
        o = [sum(A[i] * V[i][d] for i in range(layer.length)) for d in range(len(V[0]))]
        p = min(A[j], 1 - 1e-6)
        return (p / (1 - p)) ** 2 * plain.squared_distance(V[j], o)

    def part(tokens: list[list[Vector]], j: int) -> float:
        rows = [over_heads([change(A, j) for A in heads], asked["heads_by"]) for heads in tokens]
        return over_rows(rows, asked["rows_by"]) / (1 if asked["rows_by"] == "max" else len(rows))

    own, behind = prompt_only(layer, kv, asked["window"])
    out = []
    for j in range(layer.length):
        score = part(own, j)
        if behind:
            score = (1 - layer.decoded_weight) * score + layer.decoded_weight * part(behind, j)
        out.append(score)
    return out


def defensive(layer: Layer, kv: int, asked: Asked) -> Ranked:
    """16.6"""
    L = layer.length
    P = min(asked["window"], L)
    m = prompt_part(layer, kv, list(range(L - P, L)), {"heads_by": "max", "rows_by": "max"})
    if layer.decoded is not None:
        D = decoded_part(layer, kv, {"heads_by": "max", "rows_by": "max"})
        m = [max(a, b) for a, b in zip(m, D, strict=True)]
    average = window_score(layer, kv, asked["window"], {"heads_by": "mean", "rows_by": "mean"})
    candidates = range(asked.S, L - asked.R)
    middle = mean([m[j] for j in candidates])
    return {j: (max(m[j], middle), average[j]) for j in candidates}


def leverage(layer: Layer, kv: int, asked: Asked) -> Ranked:
    """16.7"""
    L, D = layer.length, len(layer.keys[kv][0])
    scale = 1 / math.sqrt(D) if layer.scale is None else layer.scale
    candidates = list(range(asked.S, L - asked.R))
    keys = [unrotated(layer, layer.keys[kv][j], j) for j in candidates]
    middle = [mean([k[d] for k in keys]) for d in range(D)]
    Y = [[x - c for x, c in zip(k, middle, strict=True)] for k in keys]
    gram = [[sum(y[a] * y[b] for y in Y) for b in range(D)] for a in range(D)]
    e = 1e-4 * sum(gram[a][a] for a in range(D)) / D
    spans = []
    for y in Y:
        if e == 0:
            spans.append(0.0)
            continue
        x = solved([[gram[a][b] + (e if a == b else 0) for b in range(D)] for a in range(D)], y)
        spans.append(max(0.0, dot(y, x)))
    looked = []
    for start in range(0, len(candidates), asked["chunk"]):
        chunk = candidates[start : start + asked["chunk"]]
        for n, j in enumerate(chunk):
            by_row = []
            for i in chunk:
                heads = [
                    softmax([scale * dot(layer.queries[h][i], layer.keys[kv][x]) for x in chunk])[n]
                    for h in layer.group(kv)
                ]
                by_row.append(over_heads(heads, asked["heads_by"]))
            looked.append(over_rows(by_row, asked["rows_by"]) * norm(layer.values[kv][j]))
    near = [sum(looked[max(0, n - 1) : n + 2]) / 3 for n in range(len(looked))]
    blend = 1 - asked.B / L if asked["blend"] is None else asked["blend"]
    scores = [blend * a + b for a, b in zip(standard(spans), standard(near), strict=True)]
    return {j: (score,) for j, score in zip(candidates, scores, strict=True)}


def standard(x: Vector) -> Vector:
    middle = mean(x)
    deviation = math.sqrt(mean([(v - middle) ** 2 for v in x]))
    return [(v - middle) / max(deviation, 1e-6) for v in x]


def solved(matrix: list[Vector], right: Vector) -> Vector:
    """Gauss-Jordan with pivots."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    n = len(rows)
    for column in range(n):
        best = max(range(column, n), key=lambda i: abs(rows[i][column]))
        rows[column], rows[best] = rows[best], rows[column]
        pivot = rows[column][column]
        rows[column] = [x / pivot for x in rows[column]]
        for i in range(n):
            if i != column and rows[i][column]:
                factor = rows[i][column]
                rows[i] = [x - factor * y for x, y in zip(rows[i], rows[column], strict=True)]
    return [row[-1] for row in rows]


def text_rows(layer: Layer) -> list[int]:
    """16.8, T*."""
    L, visual = layer.length, layer.visual
    last = max((i for i in range(L) if visual[i]), default=L)
    behind = [i for i in range(L) if i > last]
    texts = [i for i in range(L) if not visual[i]]
    return behind or texts or list(range(L - min(32, L), L))


def tgv(layer: Layer, kv: int, asked: Asked) -> Ranked:
    T = text_rows(layer)

    def attention(i: int, j: int) -> float:
        return over_heads([layer.attention[h][i][j] for h in layer.group(kv)], asked["heads_by"])

    raw = [mean([attention(i, a) for i in T if i >= a]) for a in T]
    importance = [x / sum(raw) for x in raw]
    out: Ranked = {}
    for j in range(layer.length - asked.R):
        if layer.visual[j]:
            parts = [imp * attention(a, j) for imp, a in zip(importance, T, strict=True)]
            out[j] = (0, over_rows(parts, asked["rows_by"]))
        else:
            out[j] = (1, over_rows([attention(i, j) for i in T], asked["rows_by"]))
    return out


def tgv_budgets(layers: list[Layer], B: int, options: dict[str, Any]) -> list[int]:
    L = layers[0].length
    weights = [
        sum(
            layer.attention[h][i][j]
            for h in range(layer.heads)
            for i in text_rows(layer)
            for j in range(L)
            if layer.visual[j]
        )
        for layer in layers
    ]
    return plain.allocate(weights, len(layers) * B, plain.least(B, L), L)


def kvzip(layer: Layer, kv: int, asked: Asked) -> Vector:
    """16.9"""
    if layer.decoded is not None and asked.options.get("probed"):
        return decoded_part(layer, kv, asked.options)
    own = prompt_part(layer, kv, list(range(layer.length)), asked.options)
    if layer.decoded is None:
        return own
    return [max(a, b) for a, b in zip(own, decoded_part(layer, kv, asked.options), strict=True)]


MAXIMA = {"heads_by": "max", "rows_by": "max"}
SNAP = {"window": 32, "kernel": 5}


def window_forced(B: int, mean_B: int, options: dict[str, Any]) -> tuple[int, int]:
    return 0, min(options["window"], B // 2)


def window_or_recent(B: int, mean_B: int, options: dict[str, Any]) -> tuple[int, int]:
    recent = options["window"] if options["recent"] is None else options["recent"]
    return forced_of(B, options | {"recent": recent})


RECIPES: dict[str, Recipe] = {
    "h2o": Recipe(h2o, {}, lambda B, mean_B, o: (0, B // 2)),
    "snapkv": Recipe(snapkv, SNAP, window_forced),
    "pyramidkv": Recipe(
        snapkv,
        {**SNAP, "beta": 20},
        lambda B, mean_B, o: (0, min(o["window"], mean_B // 2, B)),
        lambda layers, B, o: plain.pyramid_budgets(
            B, layers[0].length, len(layers), min(o["window"], B // 2), o["beta"]
        ),
    ),
    "adakv": Recipe(snapkv, {**SNAP, "safeguard": 0.2}, window_forced),
    "mixkv": Recipe(mixkv, SNAP, window_forced),
    "vlcache": Recipe(
        vlcache,
        {"p": 0.01, "recent_frac": 0.1},
        lambda B, mean_B, o: (0, 0 if B == 1 else max(1, floor(o["recent_frac"] * B))),
        lambda layers, B, o: plain.allocate(
            [plain.density(layer, after_images(layer), o["p"]) for layer in layers],
            len(layers) * B,
            plain.least(B, layers[0].length),
            layers[0].length,
        ),
    ),
    "flashcache": Recipe(
        flashcache,
        {"gamma": 0.2, "per_head": False, "recent": 0},
        lambda B, mean_B, o: (0, min(o["recent"], mean_B // 2, B)),
        lambda layers, B, o: plain.allocate(
            [plain.energy_above(layer, o["gamma"]) for layer in layers], len(layers) * B, 1, layers[0].length
        ),
    ),
    "peak": Recipe(peak, {"recent": 32}, own={"rows_by": "max"}),
    "weave": Recipe(
        weave,
        {
            "proxies": 32,
            "recent": 32,
            "sinks": 0,
            "sensitivity_quantile": 0.35,
            "merge_rule": "average",
            "mass_bias": True,
            "merge": True,
            "reach": 0,
        },
    ),
    "tova": Recipe(tova, {"per_head": False, "recent": 1, "sinks": 0}),
    "keydiff": Recipe(keydiff, {"recent": 0, "sinks": 0}),
    "knorm": Recipe(knorm, {"recent": 0, "sinks": 0}),
    "expected_attention": Recipe(
        expected_attention,
        {"future": 512, "sinks": 4, "recent": 0, "covariance": True, "value_norm": True, "epsilon": 0.01},
    ),
    "leave_one_out": Recipe(leave_one_out, {"window": 32, "recent": None, "sinks": 0}, window_or_recent),
    "defensive": Recipe(defensive, {"window": 32, "recent": None, "sinks": 0}, window_or_recent, own=MAXIMA),
    "leverage": Recipe(leverage, {"sinks": 8, "recent": 4, "chunk": 256, "blend": None}),
    "tgv": Recipe(tgv, {"recent": 0}, budgets=tgv_budgets),
    "kvzip": Recipe(kvzip, {"sinks": 4, "recent": 0}, own={**MAXIMA, "allocation": "global", "floor": 0.0}),
}


# ---------------------------------------------------------------- 17.7: lending, allocation


@dataclass
class Chosen:
    """What one KV head keeps, by what."""

    forced: list[int]
    free: list[int]  # in the order of their rank
    ranked: Ranked

    @property
    def kept(self) -> list[int]:
        return sorted([*self.forced, *self.free])


def lent(scores: Ranked, ahead: int, behind: int, fade: float) -> Ranked:
    """s'_j = max over -behind <= d <= ahead of fade^|d| s_{j-d}; a rank before the score is the token's own."""
    out: Ranked = {}
    for j, key in scores.items():
        around = [
            scores[j - d] if fade == 1 else tuple(x * fade ** abs(d) for x in scores[j - d])
            for d in range(-behind, ahead + 1)
            if j - d in scores
        ]
        if len(key) == 2 and key[0] in (0, 1) and isinstance(key[0], int):  # text before images
            out[j] = (key[0], max(other[1] for other in around))
        else:
            out[j] = tuple(max(other[n] for other in around) for n in range(len(key)))
    return out


def by_rank(ranked: Ranked, candidates: list[int]) -> list[int]:
    return sorted(candidates, key=lambda j: (*(-x for x in ranked[j]), j))


def options_of(name: str, options: dict[str, Any]) -> dict[str, Any]:
    recipe = RECIPES[name]
    return {**SHARED, **recipe.own, **recipe.defaults, **options}


def choose(name: str, layers: list[Layer], B: int, **given: Any) -> list[list[Chosen]]:
    """For each layer and KV head what stays."""
    recipe, options = RECIPES[name], options_of(name, given)
    L, n, Hkv = layers[0].length, len(layers), layers[0].kv_heads
    pooled = options["allocation"] in ("global", "profile")
    budgets = [B] * n if pooled or recipe.budgets is None else recipe.budgets(layers, B, options)
    heads: list[list[Chosen]] = []
    rivals: list[list[Chosen]] = []  # what heads compete by, where it is not their scores
    for layer, B_l in zip(layers, budgets, strict=True):
        S, R = forced_of(B_l, options) if recipe.forced is None else recipe.forced(B_l, B, options)
        asked = Asked(B_l, S, R, options)
        forced = [*range(S), *range(L - R, L)]
        row = []
        for kv in range(Hkv):
            scores = recipe.score(layer, kv, asked)
            ranked: Ranked = scores if isinstance(scores, dict) else {j: (x,) for j, x in enumerate(scores)}
            ranked = lent(ranked, options["ahead"], options["behind"], options["fade"])
            row.append(Chosen(forced, by_rank(ranked, list(range(S, L - R))), ranked))
        heads.append(row)
        if options.get("reach"):
            far = [far_back(layer, kv, min(options["reach"], L // 4)) for kv in range(Hkv)]
            rivals.append([Chosen(forced, by_rank(one, list(range(S, L - R))), one) for one in far])
    for at, counts in enumerate(free_counts(rivals or heads, budgets, B, L, options)):
        for chosen, count in zip(heads[at], counts, strict=True):
            chosen.free = chosen.free[:count]
    return heads


def far_back(layer: Layer, kv: int, reach: int) -> Ranked:
    """17.7: the most that one of the last 256 rows, in one of the group's heads, pays to a token so far before it."""
    L = layer.length
    rows = range(max(0, L - 256), L)
    paid = [[layer.attention[h][i][j] for h in layer.group(kv) for i in rows if i - j >= reach] for j in range(L)]
    return {j: (max(most, default=0.0),) for j, most in enumerate(paid)}


def free_counts(
    heads: list[list[Chosen]], budgets: list[int], B: int, L: int, options: dict[str, Any]
) -> list[list[int]]:
    """How many of each head's candidates stay."""
    kind = options["allocation"]
    if kind == "head" and "safeguard" in options:  # 10.5
        return [adakv_counts(row, B_l) for row, B_l in zip(heads, budgets, strict=True)]
    if kind == "head":
        return [[B_l - len(head.forced) for head in row] for row, B_l in zip(heads, budgets, strict=True)]
    if kind == "layer":
        return [shared([row], B_l, options["floor"])[0] for row, B_l in zip(heads, budgets, strict=True)]
    together = shared(heads, B, options["floor"])
    if kind == "global":
        return together
    profile = options["profile"]
    base = len(heads[0][0].forced)
    weights = []
    for at, row in enumerate(heads):
        for kv in range(len(row)):
            share = profile_share(profile, B / L, at, kv)
            whole = (together[at][kv] + base) / L
            weights.append((1 - options["mix"]) * share + options["mix"] * whole)
    counts = plain.allocate(weights, len(weights) * B, max(1, base), L)
    Hkv = len(heads[0])
    return [[c - base for c in counts[at * Hkv : (at + 1) * Hkv]] for at in range(len(heads))]


def adakv_counts(row: list[Chosen], B: int) -> list[int]:
    """10.5: four fifths by how many of the layer's best fall in each head, a fifth to all alike."""
    n, each = len(row), B - len(row[0].forced)
    everything = sorted((tuple(-x for x in head.ranked[j]), kv, j) for kv, head in enumerate(row) for j in head.free)
    won = [kv for _, kv, _ in everything[: n * each]]
    shares = [Fraction(4, 5) * won.count(kv) + Fraction(1, 5) * each for kv in range(n)]
    return plain.largest_remainder(shares, n * each)


def profile_share(profile: dict[str, Any], budget: float, layer: int, kv: int) -> float:
    """Linear between the profile's budgets, which descend."""
    known = profile["budgets"]
    budget = min(max(budget, known[-1]), known[0])
    for n in range(len(known)):
        if budget == known[n]:
            return profile["shares"][n][layer][kv]
        if n + 1 < len(known) and known[n + 1] < budget < known[n]:
            part = (budget - known[n + 1]) / (known[n] - known[n + 1])
            return part * profile["shares"][n][layer][kv] + (1 - part) * profile["shares"][n + 1][layer][kv]
    raise AssertionError


def shared(heads: list[list[Chosen]], B: int, share: float) -> list[list[int]]:
    """16.9 with 17.7's floor: each head's own best first, then the best of the rest over these layers and heads."""
    forced = len(heads[0][0].forced)
    own = floor(share * (B - forced))
    if own == 0 and forced == 0:
        own = 1
    counts = [[min(own, len(head.free)) for head in row] for row in heads]
    rest = [
        (tuple(-x for x in head.ranked[j]), layer, kv, j)
        for layer, row in enumerate(heads)
        for kv, head in enumerate(row)
        for j in head.free[own:]
    ]
    total = sum(len(row) for row in heads) * (B - forced)
    for _, layer, kv, _ in sorted(rest)[: total - sum(map(sum, counts))]:
        counts[layer][kv] += 1
    return counts


def scored(name: str, layers: list[Layer], B: int, **options: Any) -> list[LayerResult]:
    """Keep what was chosen; evict the rest, or with weave merge it."""
    chosen, settings = choose(name, layers, B, **options), options_of(name, options)
    merges = name == "weave" and settings["merge"]

    def head(layer: Layer, kv: int, of: Chosen) -> Head:
        if not merges:
            return plain.evict(layer, kv, of.kept)
        score = [of.ranked[j][0] for j in range(layer.length)]
        tau = plain.lower_quantile([score[j] for j in of.free] or [0.0], settings["sensitivity_quantile"])
        targets = sorted(j for j in of.free if score[j] <= tau)
        dropped = [t for t in range(layer.length) if t not in of.kept]
        goes = {t: plain.nearest(layer.keys[kv], t, targets) for t in dropped}
        goes = {t: c for t, c in goes.items() if c is not None}
        rule = {"merge_rule": settings["merge_rule"], "mass_bias": settings["mass_bias"]}
        return plain.merge(layer, kv, of.kept, goes, score, **rule)

    return [
        plain.each_head(layer, lambda kv, layer=layer, row=row: head(layer, kv, row[kv]))
        for layer, row in zip(layers, chosen, strict=True)
    ]
