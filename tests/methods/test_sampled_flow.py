"""The flow ratio from some rows: an estimate, seeded, that becomes the ratio itself as rows become all."""

import pytest
import torch

import kvweave
from kvweave.ops.draw import stratified_rows


def prompt(batch=2, length=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries, keys, values = (torch.randn(batch, heads, length, 16, generator=generator) for heads in (4, 2, 2))
    visual = torch.zeros(batch, length, dtype=torch.bool)
    visual[0, 20:220] = True
    visual[1:, 5:40] = True
    return [queries], [keys], [values], visual


def flows(visual, *tensors, **options):
    method = kvweave.FlowMM(budget=0.2, **options)
    parts = [[x[0][row : row + 1]] for x in tensors for row in (0, 1)]
    rows = [parts[row::2] for row in (0, 1)]
    return [kvweave.compress_tensors(method, *row, visual=visual[n : n + 1])[0].flow for n, row in enumerate(rows)]


def test_it_is_near_the_exact_ratio_and_nearer_with_more_rows():
    queries, keys, values, visual = prompt()
    exact = flows(visual, queries, keys, values, flow_rows=0)
    errors = []
    for rows in (16, 256):
        drawn = [flows(visual, queries, keys, values, flow_rows=rows, seed=seed) for seed in range(8)]
        errors.append(max(abs(mine - want) for row in drawn for mine, want in zip(row, exact, strict=True)))
    assert errors[1] < 0.02
    assert errors[1] < errors[0] < 0.2


@pytest.mark.parametrize("rows", [300, 5000])
def test_all_rows_are_the_ratio_itself(rows):
    queries, keys, values, visual = prompt()
    assert flows(visual, queries, keys, values, flow_rows=rows) == flows(visual, queries, keys, values, flow_rows=0)


def test_it_is_seeded_and_a_row_gives_what_it_gives_alone():
    queries, keys, values, visual = prompt()
    alone = flows(visual, queries, keys, values, flow_rows=32)
    assert alone == flows(visual, queries, keys, values, flow_rows=32)
    assert alone != flows(visual, queries, keys, values, flow_rows=32, seed=1)
    both = kvweave.compress_tensors(kvweave.FlowMM(budget=0.2, flow_rows=32), queries, keys, values, visual=visual)
    assert both[0].flow == pytest.approx(sum(alone) / 2, abs=1e-6)


@pytest.mark.parametrize("count", [2, 7, 40])
def test_rows_are_drawn_from_both_modalities_and_stand_for_all(count):
    visual = torch.zeros(3, 40, dtype=torch.bool)
    visual[0, 3], visual[1, :39] = True, True
    index, weight = stratified_rows(visual, count, seed=0, layer=1)
    assert (index.diff(dim=-1) > 0).all()
    assert torch.allclose(weight.sum(-1), torch.tensor([[39.0, 1.0], [1.0, 39.0], [40.0, 0.0]]))
    drawn = visual.gather(1, index)
    assert torch.equal(weight[:, 1] > 0, drawn)
    assert torch.equal(weight[:, 0] > 0, ~drawn)


@pytest.mark.parametrize(("length", "estimated"), [(1024, False), (1025, True)])
def test_only_long_prompts_are_estimated_by_default(length: int, estimated: bool):
    queries, keys, values, visual = prompt(batch=1, length=length)
    mine, exact = (
        kvweave.compress_tensors(kvweave.FlowMM(budget=0.2, **options), queries, keys, values, visual=visual)[0].flow
        for options in ({}, {"flow_rows": 0})
    )
    assert (mine != exact) == estimated
    assert mine == pytest.approx(exact, abs=0.05)
