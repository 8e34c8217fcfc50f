"""What methods do exactly at their limits, and on a later turn: against the plain reference or loops."""

from dataclasses import replace

import pytest
import torch

import kvweave
import reference
from kvweave.ops.statistics import AttentionRule
from kvweave.view import LayerView
from strategies import PATTERNS, assert_matches, compress, random_case, reference_layers


def view_of(case, **more):
    """One layer of a case, its rows whole."""
    length = case.length
    return LayerView(
        case.keys[0],
        case.values[0],
        case.queries[0],
        torch.arange(length).expand(1, case.kv_heads, length),
        torch.ones(1, case.kv_heads, length),
        case.visual[:, None].expand(1, case.kv_heads, length),
        AttentionRule(case.keys[0].shape[-1] ** -0.5),
        **more,
    )


@pytest.mark.parametrize("ratio", ["literal", "balanced", "nosink"])
def test_a_flow_of_exactly_theta_is_not_above_it(ratio):
    """3, step 2: cross-modal if rho > theta."""
    case = random_case(PATTERNS["interleaved"](24), seed=1, layers=1, dtype=torch.float64)
    flow = float(getattr(view_of(case).flow(), ratio)[0])
    assert flow == pytest.approx(reference.flow_ratios(reference_layers(case)[0])[ratio], abs=1e-9)
    below = torch.nextafter(torch.tensor(flow, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)).item()
    for theta, scope in ((flow, "intra"), (below, "cross")):
        method = kvweave.FlowMM(budget=0.4, proxies=4, theta=theta, flow_ratio=ratio)
        assert method.plan(view_of(case), 9).scope == (scope,)
        other = replace(method, flow="misaligned")
        assert other.plan(view_of(case), 9).scope == ("cross" if scope == "intra" else "intra",)


def test_no_flow_at_all_is_not_above_a_theta_of_zero():
    case = random_case(PATTERNS["all text"](20), seed=2, layers=1)
    assert kvweave.FlowMM(theta=0.0, proxies=4).plan(view_of(case), 8).scope == ("intra",)


ATTENTION = {"mass_bias": True, "mass_kind": "attention", "merge_rule": "importance", "merge_keys": False}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_bias_by_attention_is_never_above_that_of_the_whole_prompt(seed):
    """4.1: b is clamped to [0, log L]; text that LOOK-M keeps for being text absorbs images that matter far more."""
    case = random_case(PATTERNS["interleaved"](24), seed=seed, layers=2, sharpness=9.0)
    wanted = reference.compress("lookm", reference_layers(case), 0.4, **ATTENTION)
    limit = torch.tensor(24.0, dtype=torch.float64).log().item()
    biases = [bias for layer in wanted for head in layer.heads for bias in head.bias]
    assert biases.count(limit) >= 1  # else the limit was not reached
    assert len([bias for bias in biases if 0 < bias < limit]) >= 1
    assert_matches(compress("lookm", case, 0.4, **ATTENTION), wanted)


def test_a_bias_by_attention_is_never_below_zero():
    """An entry that decoding had lowered on an earlier turn, and that merges with others now."""
    case = random_case(PATTERNS["interleaved"](24), seed=1, layers=1)
    method = kvweave.LookM(budget=8, **ATTENTION)
    lowered = method.plan(view_of(case, bias=torch.full((1, case.kv_heads, 24), -9.0)), 8)
    plain = method.plan(view_of(case), 8)
    assert torch.equal(lowered.keep, plain.keep)
    assert plain.bias.min() >= 0
    assert torch.equal(lowered.bias, torch.zeros_like(plain.bias))


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("pattern", ["interleaved", "image first", "all text"])
def test_vlcache_at_the_ends_of_its_threshold(p, pattern):
    """10.6: at p = 0 every entry that a row sees is dense, so that all layers get the same."""
    case = random_case(PATTERNS[pattern](26), seed=3, layers=3, sharpness=4.0)
    flat = replace(case, queries=[case.queries[0], 0 * case.queries[1], case.queries[2]])
    for given in (case, flat):
        wanted = reference.compress("vlcache", reference_layers(given), 0.3, p=p)
        assert_matches(compress("vlcache", given, 0.3, p=p), wanted)
        if p == 0:
            assert {len(layer.heads[0].positions) for layer in wanted} == {7}
            assert float(view_of(given).density(5, 0.0)[0]) == 1.0


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.7, 1.0])
def test_d2o_moves_its_threshold_by_beta_on_a_later_turn(beta):
    """8: tau_t = beta * (mean nearest similarity now) + (1 - beta) * tau_{t-1}; above it a token merges."""
    case = random_case(PATTERNS["interleaved"](26), seed=4, layers=1, dtype=torch.float64)
    before = torch.tensor([[[0.9], [-0.6]]], dtype=torch.float64)[:, : case.kv_heads]
    assert case.kv_heads == 2
    method = kvweave.get_method("d2o", budget=10, beta=beta)
    plan = method.plan(view_of(case, memory=before), 10)
    first = method.plan(view_of(case), 10)
    assert torch.equal(plan.keep, first.keep)
    (layer,) = reference_layers(case)
    for kv in range(2):
        keep = plan.keep[0, kv].tolist()
        nearest = {
            t: max((reference.cosine(layer.keys[kv][t], layer.keys[kv][c]), -n) for n, c in enumerate(keep))
            for t in range(26)
            if t not in keep
        }
        now = sum(u for u, _ in nearest.values()) / len(nearest)
        threshold = beta * now + (1 - beta) * before[0, kv, 0].item()
        assert first.memory[0, kv, 0].item() == pytest.approx(now, abs=1e-9)
        assert plan.memory[0, kv, 0].item() == pytest.approx(threshold, abs=1e-9)
        wanted = [-n if u >= threshold else -1 for u, n in nearest.values()]
        assert plan.merge.source[0, kv].tolist() == list(nearest)
        assert plan.merge.target[0, kv].tolist() == wanted


def test_with_probes_weave_reads_all_rows_however_few_its_proxies():
    """13.2: the peak is over all prompt rows."""
    case = random_case(PATTERNS["interleaved"](27), seed=4, layers=2)
    behind = random_case([False] * 3, seed=5, layers=2)
    layers = reference_layers(case)
    for layer, asked, known in zip(layers, behind.queries, behind.keys, strict=True):
        layer.decoded = asked[0].tolist(), known[0].tolist()
    mine = kvweave.compress_tensors(
        kvweave.Weave(budget=0.35, recent=4, proxies=2),
        case.queries,
        case.keys,
        case.values,
        visual=case.visual,
        decoded=(behind.queries, behind.keys),
        probed=True,
    )
    assert_matches(mine, reference.compress("weave", layers, 0.35, recent=4, proxies=2, probed=True))
