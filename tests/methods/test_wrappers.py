"""Methods around a method: spelled, nested, saved and read back; what they refuse, and by which words."""

import math

import pytest

import kvweave
from kvweave.methods.registry import list_wrappers
from strategies import WRAPPED

NAMES = ["critical", "fold", "quantized", "regress", "residual"]


@pytest.mark.parametrize("name", NAMES)
def test_they_are_known_but_not_listed(name):
    assert name in list_wrappers()
    assert name not in kvweave.list_methods()
    assert kvweave.get_method(name).method.name == ("full" if name == "quantized" else "snapkv")


@pytest.mark.parametrize(("name", "options"), WRAPPED, ids=str)
def test_they_are_read_back(name, options):
    method = kvweave.get_method(name, budget=0.3, **options)
    assert method.budget == method.method.budget == 0.3
    assert kvweave.method_from_dict(method.to_dict()) == method
    assert kvweave.parse_method(method.spelling()) == method


def test_options_go_to_whom_they_belong():
    method = kvweave.parse_method("regress:method=match,rows=8,score=max,budget=0.2,defer=3,ridge=2")
    assert (method.rows, method.ridge, method.method.rows, method.method.ridge) == (8, 2.0, 32, 0.1)
    assert (method.method.score, method.defer, method.method.defer) == ("max", 3, 3)
    assert kvweave.parse_method(method.spelling()) == method
    both = kvweave.Regress(method=kvweave.Match(rows=5), rows=8)
    assert kvweave.parse_method(both.spelling()) == both


def test_they_nest():
    spelled = kvweave.parse_method("regress:method=[fold:method=[h2o:ahead=2],spare=0],rows=16,budget=0.4,defer=2")
    built = kvweave.get_method(
        "regress",
        method={"name": "fold", "method": {"name": "h2o", "ahead": 2}, "spare": 0},
        rows=16,
        budget=0.4,
        defer=2,
    )
    assert spelled == built
    assert built.method.method.budget == 0.4
    assert built.method.method.defer == 2
    assert kvweave.parse_method(built.spelling()) == built
    assert kvweave.method_from_dict(built.to_dict()) == built
    outer = kvweave.Quantized(method=built, bits=2)
    assert kvweave.parse_method(outer.spelling()) == outer
    assert outer.biases_logits
    assert not kvweave.get_method("regress").biases_logits


@pytest.mark.parametrize("method", ["flowmm", "weave", "full", "streaming_llm", "random", "match", "cam", "kvmerger"])
@pytest.mark.parametrize("name", ["critical", "fold", "residual"])
def test_what_has_no_score_is_not_wrapped(name, method):
    with pytest.raises(ValueError, match=r"allowed is one of adakv, .*snapkv.*vlcache") as caught:
        kvweave.get_method(name, method=method)
    assert method in str(caught.value)


@pytest.mark.parametrize("name", ["critical", "fold", "residual"])
def test_scored_wrappers_are_not_wrapped_by_scored_wrappers(name):
    with pytest.raises(ValueError, match="fold"):
        kvweave.get_method(name, method={"name": "fold"})


def test_quantized_is_outermost():
    for name in ("regress", "quantized"):
        with pytest.raises(ValueError, match="quantized"):
            kvweave.get_method(name, method={"name": "quantized"})


@pytest.mark.parametrize("method", ["keydiff", "knorm", "flashcache", "mixkv", "leave_one_out", "leverage"])
def test_scores_that_are_no_attention_fold_uniformly(method):
    with pytest.raises(ValueError, match=r"uniform.*tova") as caught:
        kvweave.get_method("fold", method=method)
    assert method in str(caught.value)
    assert kvweave.get_method("fold", method=method, weights="uniform").method.name == method


def test_options_beside_a_made_method_are_refused():
    with pytest.raises(ValueError, match="window"):
        kvweave.get_method("fold", method={"name": "snapkv"}, window=3)
    with pytest.raises(ValueError, match="windo"):
        kvweave.get_method("fold", method="snapkv", windo=3)
    with pytest.raises(ValueError, match="snapkx"):
        kvweave.get_method("fold", method="snapkx")
    for wrong in (3, None, ["snapkv"]):
        with pytest.raises(ValueError, match="allowed is one of"):
            kvweave.Fold(method=wrong)


OUT_OF_RANGE = [
    ("tova", "recent", -1, "0"),
    ("tova", "per_head", 1, "true"),
    ("keydiff", "sinks", True, "0"),
    ("knorm", "recent", 1.5, "0"),
    ("expected_attention", "future", 0, "1"),
    ("expected_attention", "epsilon", math.inf, "inf)"),
    ("expected_attention", "epsilon", -0.1, "0"),
    ("leave_one_out", "window", 0, "1"),
    ("defensive", "recent", -2, "None"),
    ("leverage", "chunk", 0, "1"),
    ("leverage", "blend", math.nan, "None"),
    ("kvzip", "allocation", "heads", "global"),
    ("snapkv", "allocation", "all", "profile"),
    ("snapkv", "heads_by", "median", "mean"),
    ("snapkv", "rows_by", "sum", "max"),
    ("snapkv", "ahead", -1, "0"),
    ("snapkv", "behind", 1.0, "0"),
    ("snapkv", "floor", 1.1, "1"),
    ("snapkv", "mix", math.nan, "1"),
    ("snapkv", "profile", "x.json", "allocation"),
    ("snapkv", "allocation", "profile", "path"),
    ("critical", "first", 1.5, "1"),
    ("critical", "offset", -1.0, "0"),
    ("fold", "weights", "attention", "uniform"),
    ("fold", "targets", "high", "low"),
    ("fold", "quantile", 2, "1"),
    ("fold", "spare", -1, "0"),
    ("residual", "clusters", -0.1, "0"),
    ("residual", "rounds", -1, "0"),
    ("residual", "span", 0, "None"),
    ("residual", "rows", 0, "1"),
    ("residual", "gate", "yes", "true"),
    ("regress", "fixed", -1, "0"),
    ("regress", "ridge", -0.1, "0"),
    ("regress", "ridge", math.inf, "inf)"),
    ("regress", "cap", 0.0, "None"),
    ("match", "bound", 0, "(0"),
    ("match", "steps", -1, "0"),
    ("match", "score", "sum", "rms"),
    ("weave2", "gate", True, "all"),
    ("weave2", "cap", -1, "None"),
]


@pytest.mark.parametrize(("name", "option", "value", "allowed"), OUT_OF_RANGE)
def test_options_out_of_range_are_refused_by_name(name, option, value, allowed):
    with pytest.raises(ValueError) as caught:
        kvweave.get_method(name, **{option: value})
    message = str(caught.value)
    assert option in message
    assert str(value) in message
    assert allowed in message


def test_norms_counted_twice_are_told():
    with pytest.warns(UserWarning, match="twice"):
        kvweave.get_method("critical", method="expected_attention")


@pytest.mark.parametrize("name", ["expected_attention", "leverage"])
def test_phases_need_the_tables(name):
    import torch

    x = torch.randn(1, 1, 12, 8)
    with pytest.raises(ValueError, match="rotary"):
        kvweave.compress_tensors(
            kvweave.get_method(name, budget=4), [x], [x], [x], visual=torch.zeros(1, 12, dtype=torch.bool)
        )
