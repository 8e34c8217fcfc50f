"""Heads that keep different counts: those of like counts lie together, and nobody can tell."""

import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kvweave.memory.heads import RaggedHeads, block_of, buckets_of, in_buckets, ragged
from kvweave.memory.slots import Slots

BATCH, DIM, GROUP = 2, 8, 3


def heads_of(counts, seed=0, biased=False, empty=0):
    """Slots of one KV head each; of the first, `empty` in front hold nothing in the second row of the batch."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for head, count in enumerate(counts):
        keys, values = (torch.randn(BATCH, 1, count, DIM, generator=generator) for _ in range(2))
        positions = (torch.arange(count) * (head + 2)).expand(BATCH, 1, -1).clone()
        none = 0 if head else min(empty, count - 1)
        positions[1, :, :none] = -1
        mass = (positions >= 0).float()
        bias = torch.rand(BATCH, 1, count, generator=generator) * mass if biased else None
        parts.append(Slots(keys, values, positions, mass, bias, bool(none)))
    return parts


def attention(parts, query):
    """Each head by itself, written out."""
    outs = []
    for head, slots in enumerate(part.as_slots() for part in parts):
        bias = torch.zeros_like(slots.positions, dtype=query.dtype) if slots.bias is None else slots.bias
        bias = bias.masked_fill(slots.positions < 0, -torch.inf)[:, :, None]
        queries = query[:, head * GROUP : (head + 1) * GROUP]
        logits = queries @ slots.keys.mT / DIM**0.5 + bias
        outs.append(torch.softmax(logits, -1) @ slots.values)
    return torch.cat(outs, 1).transpose(1, 2)


def assert_holds(block, parts):
    """`block` holds what the heads of `parts` hold, in their order."""
    slots = block.as_slots()
    for head, part in enumerate(part.as_slots() for part in parts):
        there = slots.positions[:, head] >= 0
        assert torch.equal(there.sum(-1), (part.positions[:, 0] >= 0).sum(-1))
        for row in range(len(there)):
            held, own = there[row], part.positions[row, 0] >= 0
            assert torch.equal(slots.positions[row, head, held], part.positions[row, 0, own])
            assert torch.equal(slots.keys[row, head, held], part.keys[row, 0, own])
            assert torch.equal(slots.values[row, head, held], part.values[row, 0, own])
            assert torch.equal(slots.mass[row, head, held], part.mass[row, 0, own])
    assert torch.equal(block.outline().positions, slots.positions)


COUNTS = [(16, 5, 17, 5), (40, 3, 38, 3), (9, 9), (30, 8, 31, 29, 8), (20, 3, 11), (9, 8, 9)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("empty", [0, 2])
def test_a_token_and_what_comes_and_goes(counts, biased, empty):
    parts = heads_of(counts, biased=biased, empty=empty)
    block = in_buckets(parts)
    assert_holds(block, parts)
    generator = torch.Generator().manual_seed(1)
    for step in range(40):  # until room has been made anew
        keys, values = (torch.randn(BATCH, len(counts), 1, DIM, generator=generator) for _ in range(2))
        query = torch.randn(BATCH, len(counts) * GROUP, 1, DIM, generator=generator)
        block = block.append(keys, values, 200 + step)
        new = zip(parts, keys.split(1, 1), values.split(1, 1), strict=True)
        parts = [part.append(key, value, 200 + step) for part, key, value in new]
        out = block.attend(query, block.mask(None, query), None, 0.0)
        torch.testing.assert_close(out, attention(parts, query))
    assert_holds(block, parts)
    crossed = torch.tensor([1, 0, 1])
    assert_holds(block.rows(crossed), [part.rows(crossed) for part in parts])
    for column in (220, 12):
        assert_holds(block.before(column, 240), [part.before(column, 240) for part in parts])


@given(st.lists(st.integers(1, 80), min_size=2, max_size=12))
def test_empty_slots_are_a_third_at_most(counts):
    parts = heads_of(counts)
    block = in_buckets(parts)
    assert block.nbytes == sum(part.nbytes for part in parts)
    lying = sum(part.keys.numel() for part in block.parts)
    assert lying * 3 <= sum(part.keys.numel() for part in parts) * 4
    kinds = ragged(block)
    if kinds is not None and kinds.heads:
        assert sorted(n for own in kinds.heads for n in own) == list(range(len(counts)))
        assert len(kinds.heads) < len(counts)


def partings(heads):
    """All ways to part a list."""
    if not heads:
        yield []
        return
    first, rest = heads[0], heads[1:]
    for size in range(len(rest) + 1):
        for beside in itertools.combinations(rest, size):
            for others in partings([head for head in rest if head not in beside]):
                yield [(first, *beside), *others]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(1, 80))
def test_no_other_parting_of_heads_costs_less(counts, call):
    def slots(buckets):
        return sum(len(own) * max(counts[n] for n in own) for own in buckets)

    def cost(buckets):
        order = [n for own in sorted(map(sorted, buckets)) for n in own]
        return slots(buckets) + call * len(buckets) + (0 if order == sorted(order) else call / 2)

    buckets = buckets_of(counts, call)
    assert sorted(n for own in buckets for n in own) == list(range(len(counts)))
    assert slots(buckets) - sum(counts) <= sum(counts) // 3
    if slots([range(len(counts))]) - sum(counts) <= sum(counts) // 3:  # nothing is ruled out
        assert cost(buckets) == min(map(cost, partings(list(range(len(counts))))))


@pytest.mark.parametrize("counts", [(400, 300, 31), (900, 20, 880, 300)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_unlike_heads_in_one_buffer(counts, biased):
    """Tokens come one by one, several at a time, and beside each other; copies hold what there is."""
    parts = heads_of(counts, biased=biased, empty=3)
    block, generator = block_of(parts), torch.Generator().manual_seed(1)

    def grown(block, parts, new, column):
        keys, values = (torch.randn(BATCH, len(counts), new, DIM, generator=generator) for _ in range(2))
        pieces = zip(parts, keys.split(1, 1), values.split(1, 1), strict=True)
        return block.append(keys, values, column), [part.append(key, value, column) for part, key, value in pieces]

    column = 2000
    for new in (1, 3, 1, 1, 16, 1, *[2] * 150, 1):  # until room has been made anew
        block, parts = grown(block, parts, new, column)
        column += new
        assert len(block.parts) > 1
        query = torch.randn(BATCH, len(counts) * GROUP, 1, DIM, generator=generator)
        out = block.attend(query, block.mask(None, query), None, 0.0)
        torch.testing.assert_close(out, attention(parts, query))
    assert_holds(block, parts)
    again = pickle.loads(pickle.dumps(block))
    assert_holds(again, parts)
    assert again.room is None
    other, other_parts = grown(block, parts, 1, column)  # the same room, the one after the other
    assert_holds(other, other_parts)
    assert_holds(block, parts)
    block, parts = grown(block, parts, 1, column)
    assert_holds(block, parts)
    assert_holds(block.before(2004, column + 1), [part.before(2004, column + 1) for part in parts])


@pytest.mark.parametrize("counts", [(160, 15, 170, 5), (400, 3, 380, 3)], ids=str)
def test_query_heads_and_what_is_computed_by_part_find_their_order(counts):
    block = in_buckets(heads_of(counts))
    assert isinstance(block, RaggedHeads)
    query = torch.randn(BATCH, len(counts) * GROUP, 4, DIM)
    parts = [query[:, own] for own in block.query_heads(query)]
    assert torch.equal(block.in_order(torch.cat(parts, 1), 1), query)
    assert [x.shape[1] for x in parts] == [GROUP * len(own) for own in block.heads]


def test_heads_one_by_one_are_what_they_were():
    parts = heads_of((16, 5, 17, 5))
    block = in_buckets(parts)
    for one, part in zip(block.one_by_one(block.parts), parts, strict=True):
        assert torch.equal(F.pad(part.positions, (one.count - part.count, 0), value=-1), one.positions)


def test_unlike_counts_stay_apart():
    parts = heads_of((4000, 30, 2000))
    assert in_buckets(parts).parts == block_of(parts).parts


def test_heads_lie_apart_until_room_is_made_for_decoded_tokens():
    parts = heads_of((1600, 5, 1700, 5))
    block = block_of(parts)
    assert [part.count for part in block.parts] == [1600, 5, 1700, 5]
    token = torch.ones(BATCH, 4, 1, DIM)
    once = block.append(token, token, 200)
    assert [part.keys.shape[1:3] for part in once.parts] == [(2, 1701), (2, 6)]
    again = once.append(token, token, 201)
    assert [part.keys.data_ptr() for part in again.parts] == [part.keys.data_ptr() for part in once.parts]
    assert block_of(heads_of((9, 8, 9))).append(token[:, :3], token[:, :3], 200).parts[0].count == 10


def test_a_block_that_is_no_token_is_appended_to_each_head():
    block = block_of(heads_of((16, 5, 17, 5)))
    many = torch.ones(BATCH, 4, 20, DIM)
    assert [part.count for part in block.append(many, many, 200).parts] == [36, 25, 37, 25]
