"""Bad input is refused by name: the option, the value it had, and what is allowed."""

import math

import pytest
import torch

import kvweave
from strategies import PATTERNS, compress, random_case, registered

REFUSED = (ValueError, TypeError)


def refusal(name, **options) -> str:
    with pytest.raises(REFUSED) as caught:
        kvweave.get_method(name, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", registered("flowmm", "h2o", "meda", "adakv"))
@pytest.mark.parametrize("budget", [0, 0.0, -0.2, -3, 1.5, math.nan, math.inf, "12 parsecs", "", "0MiB", "-1KiB"])
def test_budgets(name, budget):
    with pytest.raises(ValueError) as caught:
        kvweave.get_method(name, budget=budget)
    message = str(caught.value)
    assert "budget" in message
    assert str(budget) in message
    assert "share" in message or "(0, 1]" in message


@pytest.mark.parametrize("budget", [True, False, None, [0.2], 1j])
def test_budgets_of_another_type(budget):
    message = refusal("flowmm", budget=budget)
    assert "budget" in message
    assert str(budget) in message


@pytest.mark.parametrize(("wrong", "meant"), [("flowm", "flowmm"), ("snap_kv", "snapkv"), ("h20", "h2o")])
def test_an_unknown_method_names_the_nearest(wrong, meant):
    with pytest.raises(ValueError) as caught:
        kvweave.get_method(wrong, budget=0.5)
    assert wrong in str(caught.value)
    assert meant in str(caught.value)


@pytest.mark.parametrize(
    ("name", "wrong", "meant"),
    [("flowmm", "thetta", "theta"), ("flowmm", "proxy", "proxies"), ("snapkv", "windows", "window")],
)
def test_an_unknown_option_names_the_nearest(name, wrong, meant):
    message = refusal(name, budget=0.5, **{wrong: 1})
    assert wrong in message
    assert meant in message.replace(wrong, "")


# (method, option, value, a word of what is allowed)
OUT_OF_RANGE = [
    ("flowmm", "theta", math.nan, ""),
    ("flowmm", "proxies", 0, ""),
    ("flowmm", "proxies", -4, ""),
    ("flowmm", "sensitivity_quantile", 1.2, "1"),
    ("flowmm", "sensitivity_quantile", -0.1, "0"),
    ("flowmm", "sensitivity_quantile", math.nan, "1"),
    ("flowmm", "flow", "sideways", "aligned"),
    ("flowmm", "flow_ratio", "exact", "balanced"),
    ("flowmm", "cross_scope", "none", "other_only"),
    ("flowmm", "merge_rule", "foo", "similarity"),
    ("flowmm", "no_target", "keep", "evict"),
    ("flowmm", "modality_floor", -1, "0"),
    ("flowmm", "mass_kind", "weight", "attention"),
    ("weave", "sensitivity_quantile", 3, "1"),
    ("weave", "recent", -1, "0"),
    ("weave", "temperature", 0.5, "1"),
    ("weave", "merge_rule", "foo", "average"),
    ("snapkv", "window", 0, ""),
    ("snapkv", "kernel", 0, ""),
    ("pyramidkv", "beta", 0, ""),
    ("flashcache", "gamma", 1.5, "1"),
    ("flashcache", "gamma", math.nan, "1"),
    ("flashcache", "recent", -2, "0"),
    ("lookm", "text_prior", "perhaps", "union"),
    ("lookm", "recent_frac", 1.5, "1"),
    ("lookm", "merge_rule", "foo", "pivotal"),
    ("meda", "recent_frac", -0.5, "0"),
    ("d2o", "var_norm", "l2", "head_minmax"),
    ("d2o", "merge_rule", "foo", "similarity"),
    ("kvmerger", "sigma", 0, ""),
    ("kvmerger", "threshold", math.nan, ""),
    ("chelsea", "chunk", 0, ""),
    ("cam", "mode", "guess", "expected"),
    ("cam", "window", 0, ""),
    ("vlcache", "p", -0.5, ""),
    ("vlcache", "p", math.nan, ""),
    ("vlcache", "recent_frac", 2.0, "1"),
    ("madakv", "proxies", 0, ""),
]


@pytest.mark.parametrize(
    ("name", "option", "value", "allowed"),
    [
        pytest.param(*row, id=f"{row[0]}:{row[1]}={row[2]}")
        for row in OUT_OF_RANGE
        if row[0] in kvweave.list_methods()
    ],
)
def test_options_out_of_range(name, option, value, allowed):
    with pytest.raises(ValueError) as caught:
        kvweave.get_method(name, budget=0.5, **{option: value})
    message = str(caught.value)
    assert option in message
    assert str(value) in message
    assert allowed in message


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("theta", "high"),
        ("proxies", 2.5),
        ("proxies", "32"),
        ("proxies", True),
        ("merge_rule", 3),
    ],
)
def test_options_of_another_type(option, value):
    message = refusal("flowmm", budget=0.5, **{option: value})
    assert option in message
    assert str(value) in message


# ---------------------------------------------------------------- tensors that do not fit


def arguments(**replaced):
    case = random_case(PATTERNS["interleaved"](10), layers=2, seed=0, dtype=torch.float32)
    given = {"queries": case.queries, "keys": case.keys, "values": case.values, "visual": case.visual}
    return {**given, **replaced}


def tensors(*shapes, dtype=torch.float32):
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


Q, KV = (1, 4, 10, 8), (1, 2, 10, 8)


@pytest.mark.parametrize(
    ("replaced", "named"),
    [
        ({"queries": tensors(Q)}, "queries"),  # one layer of queries, two of keys
        ({"values": tensors(KV)}, "values"),
        ({"queries": [], "keys": [], "values": []}, "layer"),
        ({"queries": tensors((1, 3, 10, 8), (1, 3, 10, 8))}, "3"),  # three heads on two KV heads
        ({"queries": tensors((1, 4, 10, 6), (1, 4, 10, 6))}, "6"),  # another head dimension
        ({"queries": tensors((1, 4, 9, 8), (1, 4, 9, 8))}, "9"),  # fewer queries than keys
        ({"queries": tensors((2, 4, 10, 8), (2, 4, 10, 8))}, "2"),  # another batch
        ({"keys": tensors((10, 8), (10, 8))}, "keys"),  # no batch, no heads
        ({"values": tensors((1, 2, 7, 8), (1, 2, 7, 8))}, "values"),
        ({"visual": torch.zeros(1, 10)}, "visual"),  # not bool
        ({"visual": torch.zeros(1, 10, dtype=torch.long)}, "visual"),
        ({"visual": torch.zeros(1, 9, dtype=torch.bool)}, "visual"),
        ({"visual": torch.zeros(10, dtype=torch.bool)}, "visual"),
        ({"valid": torch.ones(1, 10)}, "valid"),
        ({"valid": torch.ones(1, 11, dtype=torch.bool)}, "valid"),
        ({"valid": torch.zeros(1, 10, dtype=torch.bool)}, "valid"),  # a row without a token
    ],
)
def test_tensors_that_do_not_fit(replaced, named):
    with pytest.raises(REFUSED) as caught:
        kvweave.compress_tensors(kvweave.get_method("flowmm", budget=0.5), **arguments(**replaced))
    assert named in str(caught.value)


def test_one_row_of_a_batch_without_a_token():
    case = random_case(PATTERNS["interleaved"](10), seed=0)
    two = case.map_heads(lambda q: q.repeat(2, 1, 1, 1), lambda k: k.repeat(2, 1, 1, 1))
    valid = torch.tensor([[True] * 10, [False] * 10])
    with pytest.raises(ValueError, match="valid"):
        kvweave.compress_tensors(
            kvweave.get_method("h2o", budget=0.5),
            two.queries,
            two.keys,
            two.values,
            visual=case.visual.repeat(2, 1),
            valid=valid,
        )


def test_turning_keys_needs_the_tables():
    """4.2: without cos and sin there is no angle to turn by."""
    case = random_case(PATTERNS["interleaved"](10), seed=0)
    with pytest.raises(ValueError, match="rotary"):
        compress("flowmm", case, 0.5, rope_aware=True)
