"""SPEC 15.3, 16.11 and 17 in plain loops: wrappers of scored methods, clusters, fits and gates.

Written from the specification alone, as `reference.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import reference as plain
import reference_scores as scores
from reference import Head, Layer, LayerResult, Vector, dot, floor, mean, softmax
from reference_scores import Chosen

# ---------------------------------------------------------------- 15.3 reference rows


@dataclass
class Row:
    """A query of a token, and what it sees of the prompt."""

    query: Vector
    last: int  # the last prompt slot that it sees
    logits: Vector  # on slots 0..last
    omega: float
    token: int

    @property
    def held_out(self) -> bool:
        return self.token % 4 == 3

    def attention(self, length: int) -> Vector:
        return softmax(self.logits) + [0.0] * (length - len(self.logits))


def scale_of(layer: Layer) -> float:
    return 1 / math.sqrt(len(layer.queries[0][0])) if layer.scale is None else layer.scale


def reference_rows(layer: Layer, kv: int, rows: int) -> list[Row]:
    L, scale, P = layer.length, scale_of(layer), min(rows, layer.length)
    k = 0 if layer.decoded is None else len(layer.decoded[0][0])
    T, lam = P + k, layer.decoded_weight
    out = []
    for number, i in enumerate(range(L - P, L)):
        omega = 1.0 if not k else T * (1 - lam) / P
        out += [Row(layer.queries[h][i], i, layer.logits[h][i][: i + 1], omega, number) for h in layer.group(kv)]
    for t in range(k):
        for h in layer.group(kv):
            query = layer.decoded[0][h][t]
            logits = [scale * dot(query, key) for key in layer.keys[kv]]
            out.append(Row(query, L - 1, logits, T * lam / k, P + t))
    return out


# ---------------------------------------------------------------- entries


@dataclass
class Entry:
    position: int
    key: Vector
    value: Vector
    mass: int = 1
    bias: float = 0.0


def entry(layer: Layer, kv: int, position: int) -> Entry:
    return Entry(position, layer.keys[kv][position], layer.values[kv][position])


def head_of(entries: list[Entry]) -> Head:
    entries = sorted(entries, key=lambda e: e.position)
    return Head(
        [e.position for e in entries],
        [e.key for e in entries],
        [e.value for e in entries],
        [e.mass for e in entries],
        [e.bias for e in entries],
    )


def entries_of(head: Head) -> list[Entry]:
    return [Entry(*x) for x in zip(head.positions, head.keys, head.values, head.mass, head.bias, strict=True)]


def entry_logits(layer: Layer, row: Row, entries: list[Entry]) -> list[float]:
    scale = scale_of(layer)
    return [scale * dot(row.query, e.key) + e.bias if e.position <= row.last else -math.inf for e in entries]


def entry_shares(layer: Layer, row: Row, entries: list[Entry]) -> list[float]:
    """X: a row that sees no entry has zeros."""
    logits = entry_logits(layer, row, entries)
    if all(x == -math.inf for x in logits):
        return [0.0] * len(entries)
    return softmax(logits)


def output(layer: Layer, kv: int, row: Row) -> Vector:
    return plain.weighted_sum(softmax(row.logits), layer.values[kv][: row.last + 1])


def given(layer: Layer, row: Row, entries: list[Entry]) -> Vector:
    if not entries:
        return [0.0] * len(layer.values[0][0])
    return plain.weighted_sum(entry_shares(layer, row, entries), [e.value for e in entries])


def error(layer: Layer, kv: int, rows: list[Row], entries: list[Entry]) -> float:
    wrong = right = 0.0
    for row in rows:
        O = output(layer, kv, row)  # noqa: E741
        wrong += row.omega * plain.squared_distance(O, given(layer, row, entries))
        right += row.omega * dot(O, O)
    return wrong / max(right, 1e-12)


# ---------------------------------------------------------------- 17.1 fits


def solve(Z: list[Vector], y: list[Vector], lam: float) -> list[Vector]:
    """[columns][outputs]; the primal form always, least norm for lam = 0."""
    if not Z or not Z[0]:
        return []
    if lam == 0:
        return (np.linalg.pinv(np.array(Z), rcond=1e-6) @ np.array(y)).tolist()
    m = len(Z[0])
    gram = [[sum(row[a] * row[b] for row in Z) + (lam if a == b else 0) for b in range(m)] for a in range(m)]
    columns = []
    for d in range(len(y[0])):
        right = [sum(row[a] * out[d] for row, out in zip(Z, y, strict=True)) for a in range(m)]
        columns.append(scores.solved(gram, right))
    return [[column[a] for column in columns] for a in range(m)]


def size(Z: list[Vector]) -> float:
    return sum(x * x for row in Z for x in row)


def fit_biases(layer, rows, entries, mutable, ridge, bound, steps) -> list[Entry]:
    M = [c for c, may in enumerate(mutable) if may]
    Z, y = [], []
    for row in rows:
        lse = math.log(sum(math.exp(x) for x in row.logits))
        shares = [0.0 if x == -math.inf else math.exp(x - lse) for x in entry_logits(layer, row, entries)]
        w = math.sqrt(row.omega)
        Z.append([w * shares[c] for c in M])
        y.append([w * (1 - sum(shares))])
    t = len({row.token for row in rows})
    lam = ridge * size(Z) / t
    low, high = math.exp(-bound), math.exp(bound)
    start = solve(Z, y, lam)
    u = [min(max(1 + d[0], low), high) for d in start]
    for _ in range(steps):
        away = [dot(row, [x - 1 for x in u]) - out[0] for row, out in zip(Z, y, strict=True)]
        slope = [sum(row[a] * e for row, e in zip(Z, away, strict=True)) + lam * (u[a] - 1) for a in range(len(M))]
        u = [min(max(x - s / (size(Z) + lam), low), high) for x, s in zip(u, slope, strict=True)]
    out = list(entries)
    for factor, c in zip(u, M, strict=True):
        out[c] = replace(out[c], bias=out[c].bias + math.log(factor))
    return out


def fit_values(layer, kv, rows, entries, mutable, ridge, cap) -> list[Entry]:
    M = [c for c, may in enumerate(mutable) if may]
    X, y = [], []
    for row in rows:
        shares, w = entry_shares(layer, row, entries), math.sqrt(row.omega)
        gap = [a - b for a, b in zip(output(layer, kv, row), given(layer, row, entries), strict=True)]
        X.append([w * shares[c] for c in M])
        y.append([w * x for x in gap])
    lam = ridge * size(X) / len({row.token for row in rows})
    step = solve(X, y, lam)
    if cap is not None:
        own, long = math.sqrt(size([entries[c].value for c in M])), math.sqrt(size(step))
        step = [[x * min(1.0, cap * own / long) if long else x for x in d] for d in step]
    out = list(entries)
    for d, c in zip(step, M, strict=True):
        out[c] = replace(out[c], value=[a + b for a, b in zip(out[c].value, d, strict=True)])
    return out


def fitted(layer, kv, rows, entries, mutable, kinds, gate, o) -> list[Entry]:
    """17.1: with a gate the kind that does best on what is held out, fitted again on all rows."""
    if not any(mutable):
        return entries

    def by(kind: str, on: list[Row]) -> list[Entry]:
        now = entries
        if kind == "both":
            now = fit_biases(layer, on, now, mutable, o["ridge"], o["bound"], o["steps"])
        return now if kind == "none" else fit_values(layer, kv, on, now, mutable, o["ridge"], o["cap"])

    if not gate:
        return by(kinds[-1], rows)
    held = [row for row in rows if row.held_out]
    if not held:
        return entries
    others = [row for row in rows if not row.held_out]
    winner, best = "none", error(layer, kv, held, entries)
    for kind in kinds[1:]:
        wrong = error(layer, kv, held, by(kind, others))
        if wrong < 0.99 * best:
            winner, best = kind, wrong
    return by(winner, rows)


# ---------------------------------------------------------------- 17.3 clusters


def clusters(layer: Layer, kv: int, J: list[int], r: int, rounds: int, span: int | None) -> list[list[int]]:
    keys = {j: layer.keys[kv][j] for j in J}
    seeds = [J[(2 * t + 1) * len(J) // (2 * r)] for t in range(r)]
    centres = [keys[seed] for seed in seeds]

    def assign() -> dict[int, int]:
        out = {}
        for j in J:
            may = [t for t in range(r) if span is None or abs(seeds[t] - j) <= span]
            may = may or [min(range(r), key=lambda t: (abs(seeds[t] - j), t))]
            out[j] = min(may, key=lambda t: (plain.squared_distance(keys[j], centres[t]), t))
        return out

    for _ in range(rounds):
        where = assign()
        for t in range(r):
            members = [keys[j] for j in J if where[j] == t]
            if members:
                centres[t] = [mean([m[d] for m in members]) for d in range(len(members[0]))]
    where = assign()
    for t in range(r):
        if t not in where.values():
            counts = [list(where.values()).count(c) for c in range(r)]
            largest = min(range(r), key=lambda c: (-counts[c], c))
            members = [j for j in J if where[j] == largest]
            far = min(members, key=lambda j: (-plain.squared_distance(keys[j], centres[largest]), j))
            where[far] = t
    return [[j for j in J if where[j] == t] for t in range(r)]


def cluster_entry(layer: Layer, kv: int, members: list[int]) -> Entry:
    K, V, c = layer.keys[kv], layer.values[kv], len(members)
    if c == 1:
        return entry(layer, kv, members[0])
    key = [mean([K[j][d] for j in members]) for d in range(len(K[0]))]
    value = [mean([V[j][d] for j in members]) for d in range(len(V[0]))]
    away = {j: plain.squared_distance(K[j], key) for j in members}
    medoid = min(j for j in members if away[j] <= min(away.values()) * (1 + 1e-9) + 1e-18)  # pairs tie
    return Entry(medoid, key, value, c, math.log(c))


def with_clusters(layer, kv, exact: list[int], J: list[int], r: int, o) -> list[Entry]:
    out = [entry(layer, kv, j) for j in exact]
    if r:
        out += [cluster_entry(layer, kv, m) for m in clusters(layer, kv, J, r, o["rounds"], o["span"])]
    return sorted(out, key=lambda e: e.position)


def counts_of(share: float, N: int) -> list[int]:
    return [0, floor(share / 2 * N), floor(share * N)]


# ---------------------------------------------------------------- 17.5, 17.6


def row_score(layer: Layer, rows: list[Row], kind: str) -> Vector:
    A = [row.attention(layer.length) for row in rows]
    total = sum(row.omega for row in rows)
    out = []
    for j in range(layer.length):
        if kind == "max":
            out.append(max(a[j] for a in A))
        elif kind == "mean":
            out.append(sum(row.omega * a[j] for row, a in zip(rows, A, strict=True)) / total)
        else:
            out.append(math.sqrt(sum(row.omega * a[j] ** 2 for row, a in zip(rows, A, strict=True)) / total))
    return out


FIT = {"ridge": 0.1, "steps": 2, "rows": 32, "recent": 32, "score": "rms"}
CLUSTERS = {"clusters": 0.5, "rounds": 8, "span": 1024}
KINDS = ["none", "values", "both"]


def match(layer: Layer, B: int, **options: Any) -> LayerResult:
    o = {**FIT, "bound": 3, "cap": None, "gate": False, **options}
    L, R = layer.length, min(o["recent"], B // 2)

    def keep(kv: int) -> Head:
        rows = reference_rows(layer, kv, o["rows"])
        kept = plain.top(range(L - R), B - R, row_score(layer, rows, o["score"])) + list(range(L - R, L))
        entries = [entry(layer, kv, j) for j in sorted(kept)]
        mutable = [e.position < L - R for e in entries]
        return head_of(fitted(layer, kv, rows, entries, mutable, KINDS, o["gate"], o))

    return plain.each_head(layer, keep)


def weave2(layer: Layer, B: int, **options: Any) -> LayerResult:
    o = {**FIT, **CLUSTERS, "bound": 1, "cap": 0.3, "gate": "fit", **options}
    L, R = layer.length, min(o["recent"], B // 2)
    N = B - R

    def made(kv: int, rows: list[Row], r: int) -> list[Entry]:
        exact = plain.top(range(L - R), N - r, row_score(layer, rows, o["score"]))
        J = [j for j in range(L - R) if j not in exact]
        return with_clusters(layer, kv, [*exact, *range(L - R, L)], J, r, o)

    def keep(kv: int) -> Head:
        rows = reference_rows(layer, kv, o["rows"])
        held, others = [x for x in rows if x.held_out], [x for x in rows if not x.held_out]
        r = floor(o["clusters"] * N)
        if o["gate"] == "all" and held:
            r, best = 0, error(layer, kv, held, made(kv, others, 0))
            for more in counts_of(o["clusters"], N)[1:]:
                wrong = error(layer, kv, held, made(kv, others, more))
                if wrong < 0.99 * best:
                    r, best = more, wrong
        entries = made(kv, rows, r)
        mutable = [e.position < L - R for e in entries]
        return head_of(fitted(layer, kv, rows, entries, mutable, KINDS, o["gate"] != "none", o))

    return plain.each_head(layer, keep)


# ---------------------------------------------------------------- wrappers

OWN: dict[str, dict[str, Any]] = {
    "critical": {"first": 0.5, "offset": 1e-4},
    "fold": {"weights": "score", "merge_keys": False, "targets": "all", "quantile": 0.35, "spare": 4},
    "residual": {**CLUSTERS, "rows": 32, "gate": True},
    "regress": {"rows": 32, "fixed": 32, "ridge": 0.1, "cap": 0.1, "gate": True},
}


def value_of(name: str, ranked: tuple[float, ...]) -> float:
    """The score itself: text before images is a rank, not a score."""
    return ranked[1] if name == "tgv" else ranked[0]


def wrapped(
    wrapper: str, layers: list[Layer], B: int, *, method: str = "snapkv", **options: Any
) -> list[LayerResult]:
    o = {**OWN[wrapper], **{k: v for k, v in options.items() if k in OWN[wrapper]}}
    inside = {k: v for k, v in options.items() if k not in OWN[wrapper]}
    if wrapper == "regress":
        results = plain.compress(method, layers, B, **inside)
        return [regress(layer, result, B, o) for layer, result in zip(layers, results, strict=True)]
    chosen = scores.choose(method, layers, B, **inside)
    make = {"critical": critical, "fold": fold, "residual": residual}[wrapper]
    return [
        plain.each_head(layer, lambda kv, layer=layer, row=row: make(layer, kv, row[kv], method, o))
        for layer, row in zip(layers, chosen, strict=True)
    ]


def regress(layer: Layer, result: LayerResult, B: int, o: dict[str, Any]) -> LayerResult:
    L = layer.length
    if all(len(head.positions) == L for head in result.heads):
        return result

    def keep(kv: int) -> Head:
        entries = entries_of(result.heads[kv])
        mutable = [e.position < L - min(o["fixed"], B // 2) for e in entries]
        rows = reference_rows(layer, kv, o["rows"])
        return head_of(fitted(layer, kv, rows, entries, mutable, ["none", "values"], o["gate"], o))

    return LayerResult([keep(kv) for kv in range(layer.kv_heads)], result.evicted)


def critical(layer: Layer, kv: int, of: Chosen, name: str, o: dict[str, Any]) -> Head:
    """16.11 without W_O; ranks that come before the score, and ties, stay the method's."""
    candidates, N = list(of.ranked), len(of.free)
    candidates = [j for j in candidates if j not in of.forced]
    s = {j: value_of(name, of.ranked[j]) for j in candidates}
    low = min(0.0, *s.values())
    total = sum(x - low for x in s.values())
    s = {j: (x - low) / total if total else 0.0 for j, x in s.items()}
    sure = of.free[: floor(o["first"] * N)]
    norm = {j: sum(abs(x) for x in layer.values[kv][j]) for j in candidates}
    first = {j: of.ranked[j][0] if name == "tgv" else 0 for j in candidates}
    rest = [j for j in candidates if j not in sure]
    rest.sort(key=lambda j: (-first[j], -(s[j] + o["offset"]) * norm[j], j))
    return plain.evict(layer, kv, [*of.forced, *sure, *rest[: N - len(sure)]])


def fold(layer: Layer, kv: int, of: Chosen, name: str, o: dict[str, Any]) -> Head:
    """17.2"""
    K, V = layer.keys[kv], layer.values[kv]
    score = {j: max(value_of(name, x), 1e-30) for j, x in of.ranked.items()}
    targets = [j for j in of.free if j >= o["spare"]]
    if o["targets"] == "low" and targets:
        tau = plain.lower_quantile([value_of(name, of.ranked[j]) for j in targets], o["quantile"])
        targets = [j for j in targets if value_of(name, of.ranked[j]) <= tau]
    goes = {t: plain.nearest(K, t, sorted(targets)) for t in range(layer.length) if t not in of.kept}
    out = []
    for i in of.kept:
        members = [t for t, target in goes.items() if target == i]
        e = entry(layer, kv, i)
        if members:
            u = [1.0] * len(members)
            if o["weights"] == "score":
                u = [math.exp(min(max(math.log(score[t]) - math.log(score[i]), -30), 30)) for t in members]
            W = sum(u)
            w = [1 / (1 + W), *(x / (1 + W) for x in u)]
            value = plain.weighted_sum(w, [V[i], *(V[t] for t in members)])
            key = plain.weighted_sum(w, [K[i], *(K[t] for t in members)]) if o["merge_keys"] else K[i]
            e = Entry(i, key, value, 1 + len(members), math.log(1 + W))
        out.append(e)
    return head_of(out)


def residual(layer: Layer, kv: int, of: Chosen, name: str, o: dict[str, Any]) -> Head:
    """17.3"""
    N = len(of.free)
    candidates = [j for j in range(layer.length) if j not in of.forced]

    def made(r: int) -> list[Entry]:
        exact = of.free[: N - r]
        J = [j for j in candidates if j not in exact]
        return with_clusters(layer, kv, [*exact, *of.forced], J, r, o)

    if not o["gate"]:
        return head_of(made(floor(o["clusters"] * N)))
    rows = reference_rows(layer, kv, o["rows"])
    first, *later = [made(r) for r in counts_of(o["clusters"], N)]
    winner, best = first, error(layer, kv, rows, first)
    for entries in later:
        wrong = error(layer, kv, rows, entries)
        if wrong < 0.99 * best:
            winner, best = entries, wrong
    return head_of(winner)


def compress(name: str, layers: list[Layer], B: int, **options: Any) -> list[LayerResult]:
    if name in OWN:
        return wrapped(name, layers, B, **options)
    return [{"match": match, "weave2": weave2}[name](layer, B, **options) for layer in layers]


NAMES = ["match", "weave2", *OWN]
