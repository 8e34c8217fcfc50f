"""Random cases, the options each method is tried with, and comparisons: shared by tests and properties."""

from __future__ import annotations

from dataclasses import dataclass, replace

import hypothesis.strategies as st
import torch

import kvweave
import reference


@dataclass(frozen=True, repr=False)
class Case:
    """One list entry per layer: [batch, heads, length, dim], and [batch, kv_heads, length, dim] twice."""

    queries: list[torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    visual: torch.Tensor
    valid: torch.Tensor | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    scaling: float | None = None

    def __repr__(self) -> str:
        """Short enough to be read in a failing property's report."""
        modalities = "".join("TV"[v] for v in self.visual[0].tolist())
        heads = f"{self.queries[0].shape[1]} heads on {self.kv_heads}, dim {self.queries[0].shape[-1]}"
        return f"Case({modalities}, {len(self.keys)} layers, {heads}, {self.keys[0].dtype})"

    def _repr_pretty_(self, printer, cycle) -> None:  # hypothesis asks this first
        printer.text(repr(self))

    @property
    def length(self) -> int:
        return self.visual.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.keys[0].shape[1]

    def map_heads(self, on_queries, on_keys) -> Case:
        return replace(
            self,
            queries=[on_queries(q) for q in self.queries],
            keys=[on_keys(k) for k in self.keys],
            values=[on_keys(v) for v in self.values],
        )


PATTERNS = {
    "interleaved": lambda L: [(i // 5) % 2 == 1 for i in range(L)],
    "image first": lambda L: [1 <= i < L - 3 for i in range(L)],
    "image last": lambda L: [i >= L // 2 for i in range(L)],
    "alternating": lambda L: [i % 2 == 0 for i in range(L)],
    "one visual token": lambda L: [i == L // 3 for i in range(L)],
    "all text": lambda L: [False] * L,
    "all visual": lambda L: [True] * L,
}


def random_case(
    visual: list[bool],
    *,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 8,
    seed: int = 0,
    sharpness: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Normal tensors; sharpness scales the logits, so that some cases have sinks and some are flat."""
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int) -> torch.Tensor:
        return torch.randn(1, count, len(visual), dim, generator=generator, dtype=torch.float64)

    return Case(
        [(normal(heads) * sharpness).to(dtype) for _ in range(layers)],
        [normal(kv_heads).to(dtype) for _ in range(layers)],
        [normal(kv_heads).to(dtype) for _ in range(layers)],
        torch.tensor([visual]),
    )


def rotary_tables(
    length: int, dim: int, *, base: float = 100.0, start: int = 0, scale: float = 1.0, seed: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin [1, length, dim], half-split; with a seed the angles are random, as those of several axes."""
    angles = torch.arange(start, start + length)[:, None] * base ** (-torch.arange(dim // 2) * 2 / dim)
    if seed is not None:
        angles = torch.rand(length, dim // 2, generator=torch.Generator().manual_seed(seed)) * 6.28
    angles = torch.cat([angles, angles], -1)[None].double()
    return angles.cos() * scale, angles.sin() * scale


def pad(case: Case, front: int, back: int = 0, garbage: float = 0.0) -> Case:
    """The same case with slots that hold no token; what they hold must not matter."""

    def widen(x: torch.Tensor, fill: float) -> torch.Tensor:
        def block(width: int) -> torch.Tensor:
            return torch.full((*x.shape[:-2], width, x.shape[-1]), fill, dtype=x.dtype)

        return torch.cat([block(front), x, block(back)], -2)

    L = case.length
    valid = torch.tensor([[False] * front + [True] * L + [False] * back])
    visual = torch.ones(1, front + L + back, dtype=torch.bool)  # pads marked visual: that must not matter either
    visual[:, front : front + L] = case.visual
    return replace(
        case,
        queries=[widen(q, garbage) for q in case.queries],
        keys=[widen(k, garbage) for k in case.keys],
        values=[widen(v, -garbage) for v in case.values],
        visual=visual,
        valid=valid,
        rotary=None if case.rotary is None else tuple(widen(x, 1.0) for x in case.rotary),
    )


def batch(cases: list[Case]) -> Case:
    def stack(per_layer: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        return [torch.cat(rows) for rows in zip(*per_layer, strict=True)]

    return replace(
        cases[0],
        queries=stack([p.queries for p in cases]),
        keys=stack([p.keys for p in cases]),
        values=stack([p.values for p in cases]),
        visual=torch.cat([p.visual for p in cases]),
        valid=None if cases[0].valid is None else torch.cat([p.valid for p in cases]),
        rotary=None
        if cases[0].rotary is None
        else tuple(torch.cat(tables) for tables in zip(*(p.rotary for p in cases), strict=True)),
    )


# ---------------------------------------------------------------- both implementations


def compress(name: str, case: Case, budget: float | int | str, **options):
    """kvweave's layers."""
    return kvweave.compress_tensors(
        kvweave.get_method(name, budget=budget, **options),
        case.queries,
        case.keys,
        case.values,
        visual=case.visual,
        valid=case.valid,
        rotary=case.rotary,
        scaling=case.scaling,
    )


def reference_layers(case: Case) -> list[reference.Layer]:
    """The first (unpadded) row, as lists."""
    rotary = None if case.rotary is None else tuple(x[0].tolist() for x in case.rotary)
    return [
        reference.Layer(q[0].tolist(), k[0].tolist(), v[0].tolist(), case.visual[0].tolist(), case.scaling, rotary)
        for q, k, v in zip(case.queries, case.keys, case.values, strict=True)
    ]


@dataclass
class Kept:
    """What one KV head of one row of kvweave's result really holds: the slots that are not empty."""

    positions: list[int]
    keys: torch.Tensor
    values: torch.Tensor
    mass: list[float]
    bias: torch.Tensor  # zeros where the method has none


def kept(layer, row: int, kv: int, offset: int = 0) -> Kept:
    filled = layer.positions[row, kv] >= 0
    bias = torch.zeros_like(layer.mass) if layer.bias is None else layer.bias
    return Kept(
        (layer.positions[row, kv][filled] - offset).tolist(),
        layer.keys[row, kv][filled],
        layer.values[row, kv][filled],
        layer.mass[row, kv][filled].tolist(),
        bias[row, kv][filled],
    )


def heads_of(layers, row: int = 0, offset: int = 0) -> list[list[Kept]]:
    return [[kept(layer, row, kv, offset) for kv in range(layer.positions.shape[1])] for layer in layers]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}"
    )


def assert_matches(layers, expected: list[reference.LayerResult], *, row: int = 0, offset: int = 0, tolerance=1e-5):
    """Positions and mass exactly, keys, values and bias up to the tolerance."""
    assert len(layers) == len(expected)
    for number, (heads, wanted) in enumerate(zip(heads_of(layers, row, offset), expected, strict=True)):
        for kv, (head, want) in enumerate(zip(heads, wanted.heads, strict=True)):
            where = f"layer {number}, KV head {kv}"
            assert head.positions == want.positions, where
            assert head.mass == want.mass, where
            shape = (len(want.positions), layers[number].keys.shape[-1])
            assert_close(head.keys, torch.tensor(want.keys).reshape(shape), tolerance, f"{where}, keys")
            assert_close(head.values, torch.tensor(want.values).reshape(shape), tolerance, f"{where}, values")
            assert_close(head.bias, torch.tensor(want.bias), tolerance, f"{where}, bias")


def assert_same(actual: list[list[Kept]], expected: list[list[Kept]], *, tolerance=0.0, bias=True) -> None:
    """Two results of kvweave; tolerance 0 is bit for bit."""
    assert len(actual) == len(expected)
    for number, (heads, wanted) in enumerate(zip(actual, expected, strict=True)):
        for kv, (head, want) in enumerate(zip(heads, wanted, strict=True)):
            where = f"layer {number}, KV head {kv}"
            assert head.positions == want.positions, where
            assert head.mass == want.mass, where
            assert_close(head.keys, want.keys, tolerance, f"{where}, keys")
            assert_close(head.values, want.values, tolerance, f"{where}, values")
            if bias:
                assert_close(head.bias, want.bias, tolerance, f"{where}, bias")


# ---------------------------------------------------------------- the options each method is tried with

MERGE_RULES = ["similarity", "average", "pivotal", "weighted", "importance"]
NARROW = {"proxies": 4}  # several modalities and many candidates before the recent window

# 17.7: neighbours, maxima and heads' budgets, of every scored method
NEIGHBOURS = {"ahead": 3, "behind": 1, "rows_by": "max", "heads_by": "max"}
FADING = {"ahead": 6, "behind": 2, "fade": 0.5, "rows_by": "max", "heads_by": "max"}
LAYER = {"allocation": "layer", "heads_by": "max", "floor": 0.3}
GLOBAL = {"allocation": "global", "ahead": 2}

OPTIONS: dict[str, list[dict]] = {
    "full": [{}],
    "random": [{}, {"seed": 3}],
    "streaming_llm": [{}],
    "h2o": [
        *({**shared} for shared in (NEIGHBOURS, LAYER, GLOBAL)),
        {},
    ],
    "snapkv": [
        *({**shared, "window": 6} for shared in (NEIGHBOURS, LAYER, GLOBAL)),
        {},
        {"window": 6},
        {"window": 3, "kernel": 3},
        {"window": 5, "kernel": 1},
    ],
    "pyramidkv": [
        *({**shared, "window": 4} for shared in (NEIGHBOURS, LAYER, GLOBAL)),
        {},
        {"window": 6},
        {"window": 4, "beta": 5},
    ],
    "adakv": [
        *({**shared, "window": 6} for shared in (NEIGHBOURS, LAYER, GLOBAL)),
        {},
        {"window": 6},
        {"window": 2, "kernel": 3},
    ],
    "mixkv": [*({**shared, "window": 6} for shared in (NEIGHBOURS, LAYER, GLOBAL)), {}, {"window": 6}],
    "vlcache": [
        *({**shared} for shared in (NEIGHBOURS, LAYER, GLOBAL)),
        {},
        {"p": 0.1},
        {"p": 0.3, "recent_frac": 0.5},
    ],
    "madakv": [{}, {"proxies": 4}, {"proxies": 1}],
    "peak": [*({**shared, "recent": 4} for shared in (NEIGHBOURS, LAYER, GLOBAL)), {}, {"recent": 4}],
    "cam": [
        {"mode": "expected", "window": 3},
        {"mode": "expected", "window": 1},
        {"mode": "expected", "window": 2, "against": "largest"},
    ],
    "flowmm": [
        {},
        NARROW,
        {"proxies": 1},
        *({**NARROW, "merge_rule": rule} for rule in MERGE_RULES),
        {**NARROW, "merge_keys": False},
        {**NARROW, "merge_keys": False, "merge_rule": "pivotal"},
        *({**NARROW, "sensitivity_quantile": q} for q in (None, 0.0, 0.5, 0.8, 1.0)),
        *({**NARROW, "flow": flow} for flow in ("cross", "intra", "misaligned")),
        *({**NARROW, "flow_ratio": ratio} for ratio in ("balanced", "nosink")),
        {**NARROW, "theta": 0.5, "flow_ratio": "balanced", "flow": "misaligned"},
        *({**NARROW, "theta": theta} for theta in (0.0, 0.4, 0.5)),
        {**NARROW, "flow": "cross", "cross_scope": "other_only"},
        {**NARROW, "flow": "cross", "cross_scope": "other_only", "no_target": "any"},
        {**NARROW, "flow": "intra", "no_target": "any", "sensitivity_quantile": 0.0},
        *({**NARROW, "flow": "intra", "modality_floor": f} for f in (1, 3, 100)),
        {**NARROW, "modality_floor": 2, "sensitivity_quantile": 0.5, "merge_rule": "importance"},
        {**NARROW, "mass_bias": True},
        {
            **NARROW,
            "mass_bias": True,
            "mass_kind": "attention",
            "merge_rule": "importance",
            "merge_keys": False,
        },
        {**NARROW, "rope_aware": True},
        {
            **NARROW,
            "rope_aware": True,
            "merge_rule": "average",
            "sensitivity_quantile": None,
            "flow": "cross",
        },
    ],
    "weave": [
        *({**shared, "defer": 0, "proxies": 4, "recent": 4} for shared in (NEIGHBOURS, LAYER, GLOBAL)),
        *(
            {**shared, "defer": 0, "proxies": 4, "recent": 2, "sinks": 2}
            for shared in (FADING, GLOBAL, {"fade": 1.0})
        ),
        {**FADING, "defer": 0, "proxies": 4, "recent": 2, "sinks": 3, "merge": False},
        *(
            {**shared, "defer": 0, "proxies": 2, "recent": 1, "sinks": 1, "merge": merge, "reach": reach}
            for shared, merge, reach in (
                (GLOBAL, False, 3),
                (GLOBAL, False, 64),
                (LAYER, False, 2),
                (GLOBAL, True, 4),
            )
        ),
        {"defer": 0},
        {"defer": 0, "proxies": 4, "recent": 4},
        {"defer": 0, "proxies": 2, "recent": 6, "sensitivity_quantile": 0.8},
        {"defer": 0, "proxies": 4, "recent": 4, "sensitivity_quantile": None, "mass_bias": False},
        {"defer": 0, "proxies": 4, "recent": 4, "merge_rule": "similarity"},
        {"defer": 0, "proxies": 4, "recent": 4, "cross_scope": "other_only"},
        {"defer": 0, "proxies": 4, "recent": 4, "rope_aware": True},
        {"defer": 0, "proxies": 4, "recent": 4, "merge": False},
        {"defer": 0, "proxies": 4, "recent": 4, "merge_rule": "importance", "mass_kind": "entropy"},
        {"defer": 0, "proxies": 4, "recent": 4, "merge_rule": "pivotal", "mass_kind": "entropy"},
    ],
    "lookm": [
        *({"merge_rule": rule} for rule in MERGE_RULES),
        {},
        {"text_prior": "off"},
        {"text_prior": "union"},
        {"recent_frac": 0.0},
        {"recent_frac": 1.0},
        {"recent_frac": 0.3, "merge_keys": False, "mass_bias": True},
        {"rope_aware": True},
    ],
    "meda": [
        {},
        {"causal": True},
        {"recent_frac": 0.5, "text_prior": "off", "merge_rule": "pivotal"},
        {"merge_keys": False, "mass_bias": True},
        {"rope_aware": True},
    ],
    "d2o": [
        {},
        {"var_norm": "none"},
        {"recent_frac": 0.5, "merge_rule": "weighted"},
        {"merge_rule": "average", "merge_keys": False, "mass_bias": True},
        {"rope_aware": True},
    ],
    "kvmerger": [
        {"variant": "budgeted"},
        {"variant": "budgeted", "recent": 3, "sigma": 1.0},
        {"variant": "budgeted", "recent": 0},
        {"variant": "budgeted", "recent": 2, "value_scale": True},
        {"variant": "budgeted", "recent": 2, "merge_keys": False, "mass_bias": True},
        {"variant": "budgeted", "recent": 2, "rope_aware": True},
        {"variant": "threshold", "recent": 0, "threshold": 0.3},
        {"variant": "threshold", "recent": 4, "threshold": 0.0, "sigma": 2.0},
    ],
    "chelsea": [
        {},
        {"recent": 4},
        {"chunk": 4, "recent": 2},
        {"chunk": 5, "recent": 0},
        {"chunk": 1, "recent": 3},
    ],
    "flashcache": [
        *({**shared, "recent": 2} for shared in (NEIGHBOURS, LAYER, GLOBAL)),
        {},
        {"per_head": True},
        {"gamma": 0.5, "recent": 4},
        {"gamma": 0.0},
        {"gamma": 1.0, "recent": 2},
    ],
}
OPTIONS |= {
    "tova": [{}, {"per_head": True, "sinks": 2}, {"recent": 5, **LAYER}, {"per_head": True, **GLOBAL}],
    "keydiff": [{}, {"recent": 3, "sinks": 2}, LAYER, {"recent": 2, **GLOBAL}],
    "knorm": [{}, {"recent": 3, "sinks": 2}, LAYER, {"sinks": 2, **GLOBAL}],
    "expected_attention": [
        {},
        {"future": 1, "covariance": False, "value_norm": False, "sinks": 0},
        {"future": 7, "epsilon": 0.0, "recent": 2},
        {"sinks": 2, "heads_by": "max", "ahead": 1},
        {"sinks": 1, **GLOBAL},
    ],
    "leave_one_out": [
        {},
        {"window": 4},
        {"window": 3, "recent": 1, "sinks": 2, **NEIGHBOURS},
        {"window": 4, **GLOBAL},
    ],
    "defensive": [{}, {"window": 4}, {"window": 3, "recent": 1, "sinks": 2}, {"window": 4, "allocation": "layer"}],
    "leverage": [{}, {"chunk": 5}, {"sinks": 2, "recent": 2, "blend": 0.35, "chunk": 7}, {"sinks": 0, **GLOBAL}],
    "tgv": [{}, {"recent": 4}, {"recent": 2, "heads_by": "max"}, LAYER, {"recent": 2, **GLOBAL}],
    "kvzip": [
        {},
        {"sinks": 0},
        {"allocation": "layer", "recent": 3},
        {"allocation": "head", "sinks": 2},
        {"allocation": "layer", "sinks": 0, "floor": 0.5, "ahead": 1},
    ],
    "infinipot": [{}, {"newest": 0}, {"newest": 2, "share": 0.29}],
}
OPTIONS |= {
    "match": [
        {"rows": 6, "recent": 4},
        {},
        {"rows": 9, "recent": 3, "score": "mean", "gate": True, "cap": 0.5},
        {"rows": 3, "recent": 2, "score": "max", "bound": 1.0, "steps": 0, "ridge": 1.0},
    ],
    "weave2": [
        {"defer": 0},
        {"defer": 0, "rows": 8, "recent": 4, "clusters": 0.6},
        {"defer": 0, "rows": 8, "recent": 3, "gate": "all", "span": 6, "rounds": 2},
        {"defer": 0, "rows": 6, "recent": 0, "gate": "none", "cap": None, "score": "mean", "span": None},
        {"defer": 0, "rows": 12, "recent": 4, "clusters": 0.0, "cap": 0.05, "bound": 0.2},
    ],
}
#: Wrappers are not listed; each with methods inside.
WRAPPED = [
    ("critical", {"method": "snapkv", "window": 6}),
    ("critical", {"method": "kvzip", "first": 0.2, "sinks": 1}),
    ("critical", {"method": "keydiff", "first": 0.0, "offset": 0.1}),
    ("critical", {"method": "tgv", "recent": 3}),
    ("fold", {"window": 6, "spare": 0}),
    ("fold", {"method": "h2o", "targets": "low", "spare": 2}),
    ("fold", {"method": "knorm", "weights": "uniform", "merge_keys": True}),
    ("fold", {"method": "adakv", "window": 4, "quantile": 0.8, "targets": "low"}),
    ("fold", {"method": "kvzip", "sinks": 0, "ahead": 1}),
    ("fold", {"method": "tova", "per_head": True, "spare": 0}),
    ("fold", {"method": "defensive", "window": 4}),
    ("fold", {"method": "tgv", "spare": 0}),
    ("residual", {"window": 6, "rows": 6}),
    ("residual", {"method": "keydiff", "gate": False, "recent": 2, "span": 5}),
    ("residual", {"method": "adakv", "window": 4, "clusters": 1.0, "rounds": 0, "rows": 3}),
    ("residual", {"method": "kvzip", "clusters": 0.7, "span": None, "rows": 9}),
    ("residual", {"method": "vlcache", "gate": False, "clusters": 0.9}),
    ("regress", {"window": 6, "rows": 6, "fixed": 4}),
    ("regress", {"method": "flowmm", "proxies": 4, "mass_bias": True, "gate": False}),
    ("regress", {"method": "adakv", "window": 4, "rows": 5, "gate": False, "cap": None, "ridge": 1.0}),
    ("regress", {"method": "kvzip", "rows": 12, "fixed": 0}),
]
MERGING = {"flowmm", "weave", "lookm", "meda", "d2o", "kvmerger", "chelsea"}
#: Two tokens are as far from their mean: which one these keep is rounding.
SYMMETRIC = {"flashcache", "keydiff", "leverage"}
#: Values are fitted: they are no copies, and may leave the members' hull.
FITTED = {"match", "weave2"}
LAYER_ADAPTIVE = {*reference.LAYER_ADAPTIVE, "tgv"}


def is_ragged(name: str, options: dict) -> bool:
    """Heads may keep different counts."""
    return name == "adakv" or options.get("allocation", "global" if name == "kvzip" else "head") != "head"


def pools(name: str, options: dict) -> bool:
    """Budgets are shared out over all layers, whatever the method's own layer budgets."""
    return options.get("allocation", "global" if name == "kvzip" else "head") == "global"


def for_reference(name: str, options: dict) -> dict:
    """`defer` and `seed` mean nothing to the reference: it defers nothing and draws nothing."""
    return {k: v for k, v in options.items() if k not in ("defer", "seed")}


def uses_budget(name: str, options: dict) -> bool:
    """12.2 names the exceptions: sizes that follow from the data."""
    return not (name == "full" or options.get("text_prior") == "union" or options.get("variant") == "threshold")


def names_and_options() -> list[tuple[str, dict]]:
    """Every registered method with every set of options it is tried with."""
    return [(name, options) for name in kvweave.list_methods() for options in OPTIONS.get(name, [{}])]


def registered(*names: str) -> list[str]:
    return [name for name in names if name in kvweave.list_methods()]


def spelled(options: dict) -> str:
    return ",".join(f"{k}={v}" for k, v in options.items()) or "defaults"


# ---------------------------------------------------------------- hypothesis


@st.composite
def cases(draw, *, min_length=1, max_length=20, mixed=False, max_layers=3, rotary=True) -> Case:
    """Any modality pattern, any grouping of heads, flat to sharp attention, both float types."""
    L = draw(st.integers(max(min_length, 2 if mixed else 1), max_length))
    visual = draw(st.lists(st.booleans(), min_size=L, max_size=L))
    if mixed and len(set(visual)) == 1:
        visual[draw(st.integers(0, L - 1))] ^= True
    kv_heads = draw(st.integers(1, 3))
    case = random_case(
        visual,
        layers=draw(st.integers(1, max_layers)),
        kv_heads=kv_heads,
        heads=kv_heads * draw(st.integers(1, 3)),
        dim=draw(st.sampled_from([4, 8])),
        seed=draw(st.integers(0, 2**20)),
        sharpness=draw(st.sampled_from([0.3, 1.0, 4.0])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
    )
    return replace(case, rotary=rotary_tables(L, case.keys[0].shape[-1])) if rotary else case


shares = st.floats(0.01, 1.0, exclude_min=True)
budgets = st.one_of(shares, st.integers(1, 24))


def options_of(name: str) -> st.SearchStrategy[dict]:
    return st.sampled_from(OPTIONS.get(name, [{}]))
