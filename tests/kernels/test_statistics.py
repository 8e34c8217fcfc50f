"""Column sums, matching and merging in Triton against the torch reference."""

import pytest
import torch
from kernel_inputs import DEVICE, DTYPES, close, normal, on_cpu

from kvweave.ops import kernels
from kvweave.ops.match import nearest
from kvweave.ops.merge import merge
from kvweave.ops.statistics import AttentionRule, column_sums

BATCH, KV, LENGTH = 2, 2, 150  # more than two tiles, and not a multiple of one


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim", "rows"), [(4, 24, LENGTH), (2, 16, 70)])
def test_column_sums(dtype, heads, dim, rows):
    queries = 2 * normal(BATCH, rows, heads, dim, dtype=dtype).transpose(1, 2)  # as models hand them over
    keys = normal(BATCH, KV, LENGTH, dim, dtype=dtype, seed=1)
    visual = torch.rand(BATCH, rows, generator=torch.Generator().manual_seed(2)) < 0.6
    kinds = torch.stack([~visual, visual], 1).to(DEVICE)
    expected = column_sums(*on_cpu(queries, keys), AttentionRule(0.3), kinds.cpu())
    close(kernels.column_sums(queries, keys, 0.3, kinds), expected, 1e-5)
    alone = kernels.column_sums(queries, keys, 0.3, torch.ones_like(kinds[:, :1]))
    close(alone, expected.sum(2, keepdim=True), 1e-5)


def split(kept=67, seed=0):
    order = torch.rand(BATCH, KV, LENGTH, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return [x.sort(-1).values.to(DEVICE) for x in (order[..., :kept], order[..., kept:])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("restricted", [False, True], ids=["any", "by label"])
def test_nearest(dtype, restricted):
    keys = normal(BATCH, LENGTH, KV, 24, dtype=dtype).transpose(1, 2)
    keep, source = split()
    allowed = label = None
    if restricted:
        generator = torch.Generator().manual_seed(3)
        allowed = torch.rand(BATCH, KV, 2, keep.shape[-1], generator=generator) < 0.3
        allowed[1, 0, 1] = False  # nothing for this label
        label = torch.randint(0, 2, source.shape, generator=generator)
        allowed, label = allowed.to(DEVICE), label.to(DEVICE)
    given = [None if x is None else x.cpu() for x in (allowed, label)]
    index, cosine = nearest(*on_cpu(keys, source, keep), *given)
    found = kernels.nearest(keys, source, keep, allowed, label)
    assert torch.equal(found[0].cpu(), index)
    close(found[1], cosine, 1e-5)


def test_ties_go_to_the_lower_target():
    keys = torch.eye(16).repeat(10, 1)[torch.randperm(150, generator=torch.Generator().manual_seed(5))]
    keys = keys.expand(BATCH, KV, -1, -1).contiguous().to(DEVICE)
    keep, source = split(seed=6)
    assert torch.equal(
        kernels.nearest(keys, source, keep, None, None)[0].cpu(), nearest(*on_cpu(keys, source, keep))[0]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge(dtype):
    x = normal(BATCH, KV, LENGTH, 24, dtype=dtype)
    keep, source = split(kept=9)
    generator = torch.Generator().manual_seed(4)
    target = torch.randint(-1, 6, source.shape, generator=generator)  # the last entries stay alone, some are evicted
    target[0, 0] = 2  # and one takes in everything
    weight, own = torch.rand(source.shape, generator=generator), torch.rand(keep.shape, generator=generator)
    expected = merge(x.cpu(), keep.cpu(), source.cpu(), target, weight, own)
    merged = kernels.merge(x, keep, source, target.to(DEVICE), weight.to(DEVICE), own.to(DEVICE))
    assert merged.dtype == dtype
    close(merged, expected, 1e-5 if dtype == torch.float32 else 1e-2)
    alone = [e for e in range(9) if not (target[1, 1] == e).any()]
    assert torch.equal(merged[1, 1, alone], x[1, 1, keep[1, 1, alone]])
