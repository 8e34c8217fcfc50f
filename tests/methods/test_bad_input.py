"""Bad input is refused by name: the option, the value it had, and what is allowed."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvweave
from inputs import HUGE, JSON
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


@pytest.mark.parametrize(
    "budget",
    [int("9" * 400), 10**5000, 2**63, -(10**400), "9" * 400, "9" * 400 + "MiB", "9" * 5000, "1e400"],
    ids=lambda budget: type(budget).__name__,
)
def test_budgets_of_many_digits(budget):
    with pytest.raises(ValueError, match=r"budget=.* allowed is") as caught:
        kvweave.get_method("snapkv", budget=budget)
    assert len(str(caught.value)) < 300
    if isinstance(budget, str):
        with pytest.raises(ValueError, match=r"budget=.* allowed is"):
            kvweave.parse_method(f"snapkv:budget={budget}")


@pytest.mark.parametrize(
    ("budget", "same"),
    [(np.int64(8), 8), (np.int32(8), 8), (np.float64(0.3), 0.3), (np.float32(0.25), 0.25), (np.float32(1), 1.0)],
)
def test_numpys_numbers_are_budgets(budget, same):
    method = kvweave.SnapKV(budget=budget)
    assert method == kvweave.SnapKV(budget=same)
    assert type(method.budget) is type(same)
    assert kvweave.method_from_dict(method.to_dict()) == method
    assert kvweave.parse_method(method.spelling()) == method


def test_numpys_numbers_out_of_range():
    for budget in (np.int64(0), np.float32(1.5), np.float64("nan")):
        with pytest.raises(ValueError, match="budget="):
            kvweave.SnapKV(budget=budget)
    with pytest.raises(TypeError, match="budget="):
        kvweave.SnapKV(budget=np.bool_(True))


def test_a_budget_of_one_says_that_it_is_one_token():
    with pytest.warns(UserWarning, match=r"one token .*budget=1\.0") as told:
        kvweave.FlowMM(budget=1)
    assert {warning.filename for warning in told} == {__file__}
    with pytest.warns(UserWarning, match=r"budget=1\.0"):
        kvweave.parse_method("quantized:method=snapkv,budget=1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kvweave.FlowMM(budget=1.0)
        kvweave.FlowMM(budget=2)


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


@pytest.mark.parametrize(
    ("spelled", "said"),
    [
        ({"name": 3}, "method=3 is unknown"),
        ({"name": None}, "method=None is unknown"),
        ({"name": ["snapkv"]}, "method=.* is unknown"),
        ([], r"name is missing from the method \[\]"),
        ({"name": "snapkv", 3: 4}, "3=4 is no option of snapkv"),
        ({"name": "snapkv", "budget": {}}, "budget={}"),
        ({"name": "snapkv", "defer_weight": HUGE}, "defer_weight=.* is not allowed"),
        ({"name": "snapkv", "window": HUGE}, r"window=.* is not allowed .* an int >= 1, below 2\*\*63"),
        ({"name": "flowmm", "theta": HUGE}, "theta=.* is not allowed"),
        ({"name": "quantized", "method": {"name": 3}}, "method=3 is unknown"),
        ({"name": "quantized", "method": 3}, "method=3 is not allowed"),
        ({"name": "quantized", "bits": 4.0}, "bits=4.0 is not allowed"),
    ],
)
def test_dictionaries_that_are_no_methods(spelled, said):
    with pytest.raises(REFUSED, match=said) as caught:
        kvweave.method_from_dict(spelled)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("spelling", "said"),
    [
        ("snapkv:name=x", "name='x' is no option of snapkv"),
        ("snapkv:self=x", "self='x' is no option of snapkv"),
        ("quantized:method=snapkv,name=x", "name='x' is no option of quantized"),
        ("quantized:method=quantized", "method='quantized' is not allowed for quantized"),
        ("quantized:method=..x", "method='..x' is of a module that is not imported"),
        ("snapkv:window=" + "9" * 5000, "window=.* is not allowed"),
        (f"snapkv:defer=1,defer_weight={HUGE}", "defer_weight=.* is not allowed"),
    ],
)
def test_spellings_that_are_no_methods(spelling, said):
    with pytest.raises(ValueError, match=said) as caught:
        kvweave.parse_method(spelling)
    assert len(str(caught.value)) < 500


NAMES = st.sampled_from([*kvweave.list_methods(), "quantized", "oracle", "os.snapkv", "", ".", "x"])
OPTIONS = st.sampled_from(["budget", "window", "defer", "defer_weight", "theta", "method", "bits", "name", "cls", ""])
VALUES = st.text(max_size=8) | st.integers().map(str) | st.floats().map(str) | st.sampled_from(["9" * 5000, "flowmm"])


def read_or_refused(read, given):
    """What is read is a method that can be saved; what is refused, in one line that is not too long."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = ""
        try:
            method = read(given)
        except REFUSED as refused:
            said = str(refused)
        else:
            assert kvweave.method_from_dict(method.to_dict()) == method
    assert len(said) < 1500
    assert not said or ("allowed" in said and len(said.splitlines()) == 1)


@given(NAMES, st.lists(st.tuples(OPTIONS, VALUES), max_size=3))
def test_any_spelling_is_read_or_refused(name, options):
    read_or_refused(kvweave.parse_method, f"{name}:{','.join('='.join(option) for option in options)}")


@given(NAMES | JSON, st.dictionaries(OPTIONS, JSON, max_size=3))
def test_any_dictionary_is_read_or_refused(name, options):
    read_or_refused(kvweave.method_from_dict, {**options, "name": name})


@given(JSON)
def test_any_json_is_read_or_refused(given_):
    read_or_refused(kvweave.method_from_dict, given_)


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


@pytest.mark.parametrize("name", ["queries", "keys", "values"])
@pytest.mark.parametrize("method", ["snapkv", "flowmm", "streaming_llm"])
def test_nan_is_refused(name, method):
    given = arguments()
    given[name] = [x.clone() for x in given[name]]
    given[name][1][0, 1, 7, 3] = math.nan
    with pytest.raises(ValueError, match=rf"{name}, layer 1: NaN at row 0, head 1, token 7: allowed is numbers"):
        kvweave.compress_tensors(kvweave.get_method(method, budget=0.5), **given)


def test_padding_may_hold_nan():
    plain, wrong = arguments(), arguments()
    valid = torch.ones(1, 10, dtype=torch.bool)
    valid[:, :3] = False
    for name in ("queries", "keys", "values"):
        wrong[name] = [x.clone() for x in wrong[name]]
        for x in wrong[name]:
            x[:, :, :3] = math.nan
    method = kvweave.get_method("snapkv", budget=0.5)
    expected = kvweave.compress_tensors(method, **plain, valid=valid)
    for layer, other in zip(kvweave.compress_tensors(method, **wrong, valid=valid), expected, strict=True):
        assert torch.equal(layer.keys, other.keys)


def test_tensors_without_a_mask_or_a_method():
    given = arguments()
    with pytest.raises(ValueError, match=r"visual must be bool \[batch, length\] = \[1, 10\], got None"):
        kvweave.compress_tensors(kvweave.get_method("snapkv"), **given | {"visual": None})
    with pytest.raises(TypeError, match="method='snapkv' is not a kvweave method: allowed is"):
        kvweave.compress_tensors("snapkv", **given)


def test_an_option_is_said_once():
    with pytest.raises(ValueError, match=r"budget comes twice in method .*: allowed is once"):
        kvweave.parse_method("snapkv:budget=0.2,budget=0.3")
