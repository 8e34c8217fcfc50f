"""Heads of unlike counts in buffers of fixed shape give what they give one by one."""

import pickle

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kvweave.memory.fixed_heads import FixedHeads, in_fixed_buffers, out_of_fixed_buffers
from kvweave.memory.heads import block_of
from kvweave.memory.slots import Slots

BATCH, DIM, LENGTH, COUNTS = 2, 8, 40, (5, 17, 9)


@pytest.fixture
def block():
    torch.manual_seed(0)

    def head(count):
        columns = torch.stack([torch.randperm(LENGTH)[:count].sort().values for _ in range(BATCH)])[:, None]
        return Slots(*torch.randn(2, BATCH, 1, count, DIM), columns, torch.ones(columns.shape))

    return block_of([head(count) for count in COUNTS])


def valid():
    seen = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    seen[1, :11] = False
    return seen


def exact(block, query, mask):
    """All heads side by side, over the slots that the mask, bool [batch, 1, 1, columns], shows."""
    slots = block.as_slots(valid())
    shown = mask.expand(-1, len(COUNTS), -1, -1).gather(3, slots.positions.clamp(min=0)[:, :, None])
    shown &= (slots.positions >= 0)[:, :, None]
    rows = query.view(BATCH, len(COUNTS), 2, DIM)
    return scaled_dot_product_attention(rows, slots.keys, slots.values, shown).reshape(BATCH, 1, -1, DIM)


@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_a_token_attends_to_what_the_mask_shows(block, kind):
    fixed = in_fixed_buffers(block, 3, LENGTH, valid())
    assert isinstance(fixed, FixedHeads)
    grown = block
    for step in range(3):
        new = torch.randn(2, BATCH, len(COUNTS), 1, DIM)
        grown = grown.append(*new, LENGTH + step)
        assert fixed.append(*new) is fixed
        assert int(fixed.seen) == LENGTH + step + 1
        mask = torch.zeros(BATCH, 1, 1, fixed.columns, dtype=torch.bool)
        mask[:, 0, 0, :LENGTH] = valid()
        mask[..., LENGTH : LENGTH + step + 1] = True
        if kind != "none":
            mask[0, ..., 3:30:2] = False
        query = torch.randn(BATCH, 2 * len(COUNTS), 1, DIM)
        given = None if kind == "none" else mask
        if kind == "additive":
            given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        torch.testing.assert_close(fixed.attend(query, given, None, 0.0), exact(grown, query, mask))


def test_a_mask_for_each_head_is_read_part_by_part(block):
    fixed = in_fixed_buffers(block, 3, LENGTH, valid())
    mask = torch.ones(BATCH, 2 * len(COUNTS), 1, fixed.columns, dtype=torch.bool)
    assert fixed.attend(torch.randn(BATCH, 2 * len(COUNTS), 1, DIM), mask, None, 0.0) is None


def test_what_leaves_the_buffers_is_what_came(block):
    new = torch.randn(2, BATCH, len(COUNTS), 1, DIM)
    fixed = in_fixed_buffers(block, 3, LENGTH, valid())
    fixed.append(*new)
    copied = pickle.loads(pickle.dumps(fixed))
    fixed.append(*torch.randn(2, BATCH, len(COUNTS), 1, DIM))  # a copy does not hear of it
    wanted = block.append(*new, LENGTH).as_slots(valid())
    left = out_of_fixed_buffers(copied).as_slots(valid())
    for name in ("keys", "values", "positions", "mass"):
        torch.testing.assert_close(getattr(left, name), getattr(wanted, name), rtol=0, atol=0)
    assert fixed.nbytes == block.nbytes + 2 * wanted.keys.new_empty(BATCH, len(COUNTS), 1, DIM).nbytes * 2
