"""METHODS_NEW.md 18 in plain loops: a bounded cache of one layer and one sequence, in lists of floats.

Written from the text alone, and no line of it is kvweave's. A pass hands over queries, keys and values of its tokens;
what is held is a list of entries a KV head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from reference import cosine, dot, floor, mean, softmax

Vector = list[float]


@dataclass
class Entry:
    position: int
    key: Vector
    value: Vector
    mass: float = 1.0
    bias: float = 0.0
    visual: bool = False


@dataclass
class Slots:
    """What a cut sees of a layer: entries of each KV head, and queries of the last of them, [query head][row]."""

    heads: list[list[Entry]]
    queries: list[list[Vector]]
    layer: int = 0
    layers: int = 1

    @property
    def length(self) -> int:
        return len(self.heads[0])

    @property
    def group(self) -> int:
        return len(self.queries) // len(self.heads)

    def attention(self, head: int, row: int) -> Vector:
        """Of the row-th of the tail's queries, in query head `head`: causal by rank, entries' biases added."""
        entries = self.heads[head // self.group]
        query = self.queries[head][row]
        rank = self.length - len(self.queries[head]) + row
        scale = len(query) ** -0.5
        seen = softmax([scale * dot(query, entry.key) + entry.bias for entry in entries[: rank + 1]])
        return seen + [0.0] * (self.length - rank - 1)

    def received(self, kv: int, rows: int) -> Vector:
        """From the tail's last `rows` rows, mean over the group's heads."""
        tail = len(self.queries[0])
        heads = range(kv * self.group, (kv + 1) * self.group)
        each = [[self.attention(h, r) for r in range(max(0, tail - rows), tail)] for h in heads]
        return [mean([sum(row[j] for row in head) for head in each]) for j in range(self.length)]


def best(score: Vector, among: range | list[int], count: int) -> list[int]:
    return sorted(sorted(among, key=lambda j: (-score[j], j))[:count])


def kept(entries: list[Entry], score: Vector, budget: int, recent: int) -> list[Entry]:
    """Forced entries, then the top of the others."""
    length = len(entries)
    top = best(score, range(length - recent), budget - recent)
    return [entries[j] for j in [*top, *range(length - recent, length)]]


# ---------------------------------------------------------------- methods, as far as 18 is tested with them


def streaming_llm(slots: Slots, budget: int) -> list[list[Entry]]:
    sinks = min(4, budget - 1)
    return [[*head[:sinks], *head[len(head) - (budget - sinks) :]] for head in slots.heads]


def knorm(slots: Slots, budget: int) -> list[list[Entry]]:
    return [kept(head, [-math.sqrt(dot(e.key, e.key)) for e in head], budget, 0) for head in slots.heads]


def keydiff(slots: Slots, budget: int) -> list[list[Entry]]:
    out = []
    for head in slots.heads:
        weights = [math.exp(e.bias) for e in head]
        units = [[x / math.sqrt(dot(e.key, e.key)) for x in e.key] for e in head]
        anchor = [
            sum(w * u[d] for w, u in zip(weights, units, strict=True)) / sum(weights) for d in range(len(units[0]))
        ]
        out.append(kept(head, [1 - cosine(e.key, anchor) for e in head], budget, 0))
    return out


def tova(slots: Slots, budget: int) -> list[list[Entry]]:
    last = len(slots.queries[0]) - 1
    rows = [slots.attention(h, last) for h in range(len(slots.queries))]
    score = [mean([row[j] for row in rows]) for j in range(slots.length)]
    return [kept(head, score, budget, min(1, budget // 2)) for head in slots.heads]


def h2o(slots: Slots, budget: int) -> list[list[Entry]]:
    tail = len(slots.queries[0])
    return [kept(head, slots.received(kv, tail), budget, budget // 2) for kv, head in enumerate(slots.heads)]


def snapkv(slots: Slots, budget: int, window: int = 32, kernel: int = 5) -> list[list[Entry]]:
    recent = min(window, budget // 2)
    out = []
    for kv, head in enumerate(slots.heads):
        raw = slots.received(kv, window)[: slots.length - recent]
        reach = range(-(kernel // 2), kernel // 2 + 1)
        pooled = [sum(raw[j + d] for d in reach if 0 <= j + d < len(raw)) / kernel for j in range(len(raw))]
        out.append(kept(head, pooled, budget, recent))
    return out


def weave(
    slots: Slots, budget: int, proxies: int = 32, recent: int = 32, quantile: float = 0.35
) -> list[list[Entry]]:
    """13.3 without decoded tokens: pivots, the less important ones absorb the others, bias log(mass)."""
    R = min(recent, budget // 2)
    out = []
    for kv, head in enumerate(slots.heads):
        score = slots.received(kv, proxies)
        pivots = best(score, range(len(head) - R), budget - R)
        tau = sorted(score[j] for j in pivots)[floor(quantile * (len(pivots) - 1))]
        targets = [j for j in pivots if score[j] <= tau]
        staying = [*pivots, *range(len(head) - R, len(head))]
        members: dict[int, list[int]] = {j: [] for j in staying}
        for t in range(len(head)):
            if t not in members:
                members[min(targets, key=lambda c: (-cosine(head[t].key, head[c].key), c))].append(t)
        entries = []
        for j in staying:
            inside = [head[i] for i in [j, *members[j]]]
            mass = sum(e.mass for e in inside)

            def average(name: str, inside: list[Entry] = inside, mass: float = mass) -> Vector:
                vectors = [getattr(e, name) for e in inside]
                weights = [e.mass / mass for e in inside]
                return [sum(w * v[d] for w, v in zip(weights, vectors, strict=True)) for d in range(len(vectors[0]))]

            entries.append(Entry(head[j].position, average("key"), average("value"), mass, math.log(mass)))
        out.append(entries)
    return out


OWN_SINKS = {"streaming_llm": 4}
METHODS = {f.__name__: f for f in (streaming_llm, knorm, keydiff, tova, h2o, snapkv, weave)}


# ---------------------------------------------------------------- 18


@dataclass
class Stream:
    """One layer of a bounded cache."""

    method: str
    budget: int
    every: int
    stream_sinks: int = 4
    options: dict = field(default_factory=dict)
    memory: list[list[Entry]] = field(default_factory=list)
    tail: list[list[Entry]] = field(default_factory=list)
    queries: list[list[Vector]] = field(default_factory=list)
    columns: int = 0  # of the tail, padding included
    cuts: int = 0

    @property
    def held(self) -> list[list[Entry]]:
        return [memory + tail for memory, tail in zip(self.memory, self.tail, strict=True)]

    def read(self, queries, keys, values, positions: list[int], columns: int, *, ended: bool) -> None:
        """A pass of `columns` columns, of which those at `positions` are real tokens."""
        if not self.memory:
            self.memory, self.tail = [[] for _ in keys], [[] for _ in keys]
            self.queries = [[] for _ in queries]
        for kv in range(len(keys)):
            for n, position in enumerate(positions):
                self.tail[kv].append(Entry(position, keys[kv][n], values[kv][n]))
        for h in range(len(queries)):
            self.queries[h] += queries[h]
        self.columns += columns
        if self.columns >= self.every or (ended and len(self.held[0]) > self.budget):
            self.cut()

    def cut(self) -> None:
        held = self.held
        if len(held[0]) > self.budget:
            first = min(max(0, self.stream_sinks - OWN_SINKS.get(self.method, 0)), self.budget // 2)
            before = len(held[0]) - len(self.queries[0])  # slots that the tail's rows lie behind
            rest = Slots([head[first:] for head in held], [rows[max(0, first - before) :] for rows in self.queries])
            left = METHODS[self.method](rest, self.budget - first, **self.options)
            self.memory = [head[:first] + new for head, new in zip(held, left, strict=True)]
            self.cuts += 1
        else:
            self.memory = held
        self.tail = [[] for _ in held]
        self.queries = [[] for _ in self.queries]
        self.columns = 0
