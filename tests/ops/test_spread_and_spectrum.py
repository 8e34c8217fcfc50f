"""Entropies, densities and low-passes as computed fast equal their dense definitions, in however many blocks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvweave.ops import spectrum, spread
from kvweave.ops.spectrum import above
from kvweave.ops.statistics import AttentionRule


def tensors(length=30, seed=0, heads=4, kv_heads=2, dim=8):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(2, heads, length, dim, generator=generator, dtype=torch.float64)
    keys = torch.randn(2, kv_heads, length, dim, generator=generator, dtype=torch.float64)
    visual = torch.rand(2, length, generator=generator) > 0.5
    return queries, keys, visual


def logits_of(queries, keys, scaling):
    return queries @ keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1).mT * scaling


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_cross_entropy(causal, block, monkeypatch):
    queries, keys, visual = tensors()
    monkeypatch.setattr(spread, "_LOGITS", block * queries.shape[0] * queries.shape[1] * queries.shape[2])
    logits = logits_of(queries, keys, 0.3)
    closed = visual[:, None, :, None] == visual[:, None, None]
    if causal:
        closed = closed | torch.ones(30, 30, dtype=torch.bool).triu(1)
    weights = logits.masked_fill(closed, -torch.inf).softmax(-1).nan_to_num()
    entropy = torch.special.entr(weights).sum(-1)  # [batch, heads, rows]
    expected = [
        sum(entropy[n][:, rows].sum(-1) / rows.sum() for rows in (visual[n], ~visual[n])).mean() for n in range(2)
    ]
    by_head = visual[:, None].expand(-1, 2, -1)
    mine = spread.cross_entropy(queries, keys, AttentionRule(0.3), by_head, visual, causal=causal)
    assert torch.allclose(mine, torch.stack(expected))


@pytest.mark.parametrize("heads", [1, 4], ids=["one mask", "a mask a head"])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_spread_under_a_mask_of_the_models_own(kind, heads, monkeypatch):
    """Heads that hold different tokens, some rows that see nothing, and a soft cap."""
    queries, keys, row_visual = tensors()
    monkeypatch.setattr(spread, "_LOGITS", 5 * 2 * 30)
    generator = torch.Generator().manual_seed(5)
    visual = torch.rand(2, 2, 30, generator=generator) > 0.4
    hidden = torch.rand(2, heads, 30, 30, generator=generator) > 0.6
    hidden[:, :, 3] = True
    mask = (
        ~hidden
        if kind == "boolean"
        else torch.zeros(hidden.shape).double().masked_fill(hidden, torch.finfo(torch.float64).min)
    )
    rule = AttentionRule(0.3, mask=lambda start, stop: mask[:, :, start:stop], softcap=2.0)
    logits = 2 * torch.tanh(logits_of(queries, keys, 0.3) / 2)
    closed = hidden | (row_visual[:, None, :, None] == visual.repeat_interleave(2, 1)[:, :, None])
    entropy = torch.special.entr(logits.masked_fill(closed, -torch.inf).softmax(-1).nan_to_num()).sum(-1)
    expected = [
        sum(entropy[n][:, rows].sum(-1) / rows.sum() for rows in (row_visual[n], ~row_visual[n])).mean()
        for n in range(2)
    ]
    mine = spread.cross_entropy(queries, keys, rule, visual, row_visual, causal=True)
    assert torch.allclose(mine, torch.stack(expected))
    hidden = hidden.expand(2, 4, 30, 30)
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()
    dense = (weights >= 0.5 * weights.amax(-1, keepdim=True)) & ~hidden
    mine = spread.row_density(queries, keys, rule, 0.5)
    assert torch.allclose(mine, dense.sum((1, 2, 3)).double() / (~hidden).sum((1, 2, 3)))


def test_cross_entropy_of_one_modality_is_nothing():
    queries, keys, visual = tensors()
    none = torch.zeros_like(visual)
    mine = spread.cross_entropy(
        queries, keys, AttentionRule(0.3), none[:, None].expand(-1, 2, -1), none, causal=False
    )
    assert mine.tolist() == [0, 0]


@pytest.mark.parametrize("block", [1, 4, 1000])
@pytest.mark.parametrize("rows", [5, 30])
def test_row_density(block, rows, monkeypatch):
    queries, keys, _ = tensors()
    monkeypatch.setattr(spread, "_LOGITS", block * queries.shape[0] * queries.shape[1] * queries.shape[2])
    hidden = torch.ones(30, 30, dtype=torch.bool).triu(1)
    weights = logits_of(queries, keys, 0.5).masked_fill(hidden, -torch.inf).softmax(-1)[:, :, 30 - rows :]
    dense = (weights >= 0.2 * weights.amax(-1, keepdim=True)) & ~hidden[30 - rows :]
    expected = dense.sum((1, 2, 3)) / (4 * sum(range(31 - rows, 31)))
    mine = spread.row_density(queries[:, :, 30 - rows :], keys, AttentionRule(0.5), 0.2)
    assert torch.allclose(mine, expected.double())


def cosine_matrix(length):
    m, t = torch.arange(length).double()[:, None], torch.arange(length).double()
    basis = torch.cos(math.pi * (t + 0.5) * m / length) * math.sqrt(2 / length)
    basis[0] /= math.sqrt(2)
    return basis


@settings(deadline=None, max_examples=60)
@given(length=st.integers(1, 60), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_what_lies_above_is_what_the_truncated_cosine_transform_leaves(length, share, seed):
    x = torch.randn(2, 3, length, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cutoff, basis = math.floor(share * length), cosine_matrix(length)
    assert torch.allclose(basis @ basis.mT, torch.eye(length, dtype=torch.float64), atol=1e-9)
    coefficients = basis @ x
    coefficients[..., cutoff + 1 :, :] = 0
    distance, energy = above([x], cutoff)[0]
    assert torch.allclose(distance, (x - basis.mT @ coefficients).square().mean(-1), atol=1e-9)
    assert torch.allclose(energy, x.square().sum((2, 3)))


@pytest.mark.parametrize("most", [1, 300, 1 << 20], ids=["channels apart", "heads apart", "all at once"])
def test_several_tensors_are_each_as_they_are_alone(most, monkeypatch):
    """Of one shape, of others, and in whatever pieces."""
    draw = torch.Generator().manual_seed(most)
    alike = [torch.randn(2, 3, 31, 40, generator=draw, dtype=torch.float64) for _ in range(2)]
    narrow = torch.randn(2, 3, 31, 8, generator=draw, dtype=torch.float64)
    alone = [above([x], 6)[0] for x in (*alike, narrow)]
    monkeypatch.setattr(spectrum, "_NUMBERS", most)
    together = [*above(alike, 6), *above([alike[0], narrow], 6)]
    for (distance, energy), of in zip(together, [0, 1, 0, 2], strict=True):
        assert torch.allclose(distance, alone[of][0])
        assert torch.allclose(energy, alone[of][1])


def test_nothing_lies_above_the_last_frequency():
    x = torch.randn(1, 2, 17, 4)
    assert not above([x], 16)[0][0].any()
    assert not above([x], 17)[0][0].any()
    assert above([x], 15)[0][0].all()


@pytest.mark.parametrize("length", [4096, 4099], ids=["a power of two", "a prime"])
def test_half_precision_is_widened(length):
    x = torch.randn(1, 1, length, 2, generator=torch.Generator().manual_seed(length)).bfloat16()
    (mine,), (wide,) = above([x], length // 5), above([x.double()], length // 5)
    for one, other in zip(mine, wide, strict=True):
        assert one.dtype == torch.float32
        assert torch.allclose(one.double(), other, rtol=1e-4, atol=1e-5)
