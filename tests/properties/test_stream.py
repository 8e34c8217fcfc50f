"""A layer's cuts over a stream against METHODS_NEW.md 18 in plain loops, whatever comes in whatever passes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvweave
from kvweave.cut.stream import stream_of
from kvweave.cut.stream_cut import StreamCut
from kvweave.cut.terms import Terms
from kvweave.memory.slots import Slots
from kvweave.ops.statistics import AttentionRule
from kvweave.prompt import Prompt
from reference_stream import METHODS, Stream

OPTIONS = {"snapkv": {"window": 4, "kernel": 3}, "weave": {"proxies": 4, "recent": 3}}
HEADS, KV_HEADS, DIM = 4, 2, 4


@st.composite
def streams(draw):
    """Passes, some of which end a prompt, of rows with padding in front."""
    passes = draw(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=8))
    columns = sum(size for size, _ in passes)
    padding = draw(st.lists(st.integers(0, columns - 1), min_size=1, max_size=3))
    return passes, padding, draw(st.integers(1, 12)), draw(st.integers(2, 14)), draw(st.integers(0, 6))


def tensors(columns, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, heads, columns, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=25, deadline=None)
@given(case=streams(), seed=st.integers(0, 10**6))
def test_every_cut_is_that_of_plain_loops(name, case, seed):
    passes, padding, every, budget, sinks = case
    columns, rows = sum(size for size, _ in passes), len(padding)
    method, stream = stream_of(kvweave.get_method(name, budget=budget, **OPTIONS.get(name, {})), every, None, sinks)
    terms = Terms.of(method, query_rows=method.needs.rows, stream=stream)
    queries, keys, values = tensors(columns, rows, seed)
    valid = torch.arange(columns) >= torch.tensor(padding)[:, None]
    cut, block, seen = StreamCut(), None, 0
    cut.query_shape = HEADS, DIM
    plain = [Stream(name, budget, every, sinks, OPTIONS.get(name, {})) for _ in padding]
    for size, ended in passes:
        new = slice(seen, seen + size)
        block = (
            Slots(keys[:, :, new], values[:, :, new])
            if block is None
            else block.append(keys[:, :, new], values[:, :, new], seen)
        )
        seen += size
        prompt = Prompt(torch.zeros_like(valid[:, :seen]), valid[:, :seen])
        block, _ = cut.take(
            block, prompt, queries[:, :, new], AttentionRule(DIM**-0.5), None, ended=ended, terms=terms
        )
        for row, one in enumerate(plain):
            real = [column for column in range(seen - size, seen) if valid[row, column]]
            one.read(*(x[row][:, real].tolist() for x in (queries, keys, values)), real, size, ended=False)
        if ended and any(len(one.held[0]) > budget for one in plain):
            for one in plain:  # all rows are cut at the same pass
                one.cut()
        held(block, prompt, plain)
    assert cut.cuts == max(one.cuts for one in plain)
    if not any(padding):
        assert cut.peak <= budget + every - 1 + max(size for size, _ in passes)


def held(block, prompt, plain):
    slots = block.as_slots(prompt.valid)
    for row, one in enumerate(plain):
        for kv, entries in enumerate(one.held):
            real = slots.positions[row, kv] >= 0
            columns = slots.positions[row, kv].clamp(min=0)
            real &= prompt.valid[row, columns]
            assert columns[real].tolist() == [entry.position for entry in entries]
            bias = torch.zeros_like(slots.mass) if slots.bias is None else slots.bias
            for mine, theirs in (
                (slots.keys, [entry.key for entry in entries]),
                (slots.values, [entry.value for entry in entries]),
                (slots.mass, [entry.mass for entry in entries]),
                (bias, [entry.bias for entry in entries]),
            ):
                expected = torch.tensor(theirs, dtype=torch.float64).reshape(mine[row, kv][real].shape)
                torch.testing.assert_close(mine[row, kv][real].double(), expected, rtol=1e-6, atol=1e-6)
