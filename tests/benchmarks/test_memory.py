"""Regression guard: the most bytes that an operation holds at a time. Bytes, not seconds: the same on any machine."""

import pytest
import torch

import kvweave
from benchmarks.measure import MIB, peak_bytes
from kvweave.ops.match import nearest
from kvweave.ops.merge import merge
from kvweave.ops.statistics import AttentionRule, column_sums, window_attention

LENGTH, HEADS, DIM = 2048, 8, 64
KEEP = torch.arange(0, LENGTH, 5).expand(1, HEADS, -1)
SOURCE = torch.tensor([j for j in range(LENGTH) if j % 5]).expand(1, HEADS, -1)


@pytest.fixture(scope="module")
def layer():
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(1, HEADS, LENGTH, DIM, generator=generator) for _ in range(3))
    visual = torch.arange(LENGTH)[None] % 3 > 0
    return queries, keys, values, visual


def test_the_measure_itself():
    def holds_three_at_most():
        a = torch.ones(2**18)  # 1 MiB
        b = a + 1
        del a
        return [torch.cat([b, b])]

    assert peak_bytes(holds_three_at_most) == 3 * MIB
    assert peak_bytes(lambda: None) == 0


def test_column_sums_hold_a_block_of_rows(layer):
    queries, keys, _, visual = layer
    kinds = torch.stack([~visual, visual], 1)
    rule = AttentionRule(DIM**-0.5)
    logits = 128 * (LENGTH + 1) * 4
    sums = HEADS * 2 * LENGTH * 4
    assert peak_bytes(lambda: column_sums(queries, keys, rule, kinds)) < logits + sums + MIB // 4


def test_window_attention_holds_the_window(layer):
    queries, keys, _, _ = layer
    rule = AttentionRule(DIM**-0.5)
    logits = 4 * 2**18 + 4 * 4 * 32  # heads together up to a quarter of a million, and a column for sinks
    assert peak_bytes(lambda: window_attention(queries, keys, rule, 32)) < logits + HEADS * LENGTH * 4 + MIB // 4


def test_matching_holds_a_tile(layer):
    _, keys, _, _ = layer
    assert peak_bytes(lambda: nearest(keys, SOURCE, KEEP)) < 8 * MIB


def test_merging_holds_little_more_than_its_members(layer):
    _, keys, _, _ = layer
    target = SOURCE // 5
    weight, own = torch.full(SOURCE.shape, 0.2), torch.full(KEEP.shape, 0.2)
    members = SOURCE.shape[-1] * HEADS * DIM * 4
    assert peak_bytes(lambda: merge(keys, KEEP, SOURCE, target, weight, own)) < 2.5 * members + MIB


@pytest.mark.parametrize(("name", "mebibytes"), [("snapkv", 4), ("h2o", 4), ("flowmm", 14)])
def test_whole_methods(layer, name, mebibytes):
    queries, keys, values, visual = layer
    method = kvweave.get_method(name, budget=0.2)
    inputs = [queries], [keys], [values]
    peak = peak_bytes(lambda: kvweave.compress_tensors(method, *inputs, visual=visual))
    assert peak < mebibytes * MIB, f"{peak / MIB:.1f} MiB"
