"""MEDA's entropy from some rows: the mean over those that were drawn, the entropy itself where they are all."""

import pytest
import torch

import kvweave
from kvweave.ops.draw import stratified_rows
from kvweave.ops.statistics import AttentionRule
from kvweave.view import LayerView

LENGTH = 200


def view(seed=0, layer=1):
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (torch.randn(1, heads, LENGTH, 16, generator=generator).double() for heads in (4, 2))
    visual = torch.zeros(1, 2, LENGTH, dtype=torch.bool)
    visual[..., 20:150] = True
    positions = torch.arange(LENGTH).expand(1, 2, -1)
    mass = torch.ones(1, 2, LENGTH)
    return LayerView(keys, keys, queries, positions, mass, visual, AttentionRule(0.6), layer=layer, layers=2)


def entropies(layer, causal):
    """Of each row over the other modality: [heads, rows]."""
    logits = layer.queries[0] @ layer.keys[0].repeat_interleave(2, 0).mT * 0.6
    visual = layer.visual[0, 0]
    closed = visual[:, None] == visual
    if causal:
        closed = closed | torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return torch.special.entr(logits.masked_fill(closed, -torch.inf).softmax(-1).nan_to_num()).sum(-1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 24])
def test_it_is_the_mean_over_the_rows_that_are_drawn(rows, causal):
    layer = view()
    index, _ = stratified_rows(layer.row_visual(), max(2, rows), 0, layer.layer)
    drawn, kinds = entropies(layer, causal)[:, index[0]], layer.visual[0, 0, index[0]]
    assert 0 < kinds.sum() < len(kinds)
    expected = (drawn[:, kinds].mean(-1) + drawn[:, ~kinds].mean(-1)).mean()
    assert torch.allclose(layer.cross_entropy(causal=causal, rows=rows), expected[None])


def test_all_rows_are_the_entropy_itself_and_more_rows_come_nearer():
    exact = view().cross_entropy(causal=False)
    assert all(torch.equal(view().cross_entropy(causal=False, rows=rows), exact) for rows in (LENGTH, 5000))
    errors = [
        max(float((view(layer=n).cross_entropy(causal=False, rows=rows) - exact).abs()) for n in range(8))
        for rows in (8, 100)
    ]
    assert errors[1] < 0.1
    assert errors[1] < errors[0] < 0.6


def test_budgets_are_shared_out_nearly_as_by_all_rows():
    layers = [view(seed=n) for n in range(2)]
    tensors = (
        [layer.queries for layer in layers],
        [layer.keys for layer in layers],
        [layer.values for layer in layers],
    )
    tensors[0][1].mul_(3)  # narrow looks: fewer entries
    kept = [
        [
            x.keys.shape[2]
            for x in kvweave.compress_tensors(
                kvweave.get_method("meda", budget=0.3, entropy_rows=rows), *tensors, visual=layers[0].visual[:, 0]
            )
        ]
        for rows in (0, 64)
    ]
    assert kept[0][0] > 1.2 * kept[0][1]
    assert sum(kept[1]) == sum(kept[0]) == 2 * 60
    assert abs(kept[1][0] - kept[0][0]) <= 4
