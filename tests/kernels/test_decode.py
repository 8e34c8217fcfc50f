"""Attention of one token in Triton against torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from kernel_inputs import DEVICE, DTYPES, close, normal, on_cpu

from kvweave.ops.decode import attend, attend_packed, attend_uneven
from kvweave.ops.quantize import Packed, pack

PACKED = [(64, 64, 192, 40), (24, 40, 32, 0), (128, 96, 96, 1)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
#: batch, KV heads, query heads of each, channels, of values, slots: one run and many, less than a tile and more
SHAPES = [(1, 2, 7, 128, 128, 300), (2, 1, 1, 24, 40, 5), (2, 2, 3, 80, 80, 64), (1, 1, 4, 64, 64, 1000)]


def reference(queries, keys, values, bias, scaling):
    added = None if bias is None else on_cpu(bias)[0][:, :, None]
    return F.scaled_dot_product_attention(*on_cpu(queries, keys, values), added, scale=scaling)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "kv_heads", "group", "dim", "value_dim", "slots"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_one_token(dtype, batch, kv_heads, group, dim, value_dim, slots, biased):
    queries = normal(batch, kv_heads, group, dim, dtype=dtype)
    keys = normal(batch, kv_heads, slots + 9, dim, dtype=dtype, seed=1)[:, :, :slots]  # a part of a buffer
    values = normal(batch, kv_heads, slots + 9, value_dim, dtype=dtype, seed=2)[:, :, :slots]
    bias = None
    if biased:
        bias = normal(batch, kv_heads, slots + 3, dtype=dtype, seed=3)[:, :, :slots]
        bias[:, :, : slots // 2] = torch.finfo(dtype).min  # whole runs that hold nothing
    attended = attend(queries, keys, values, bias, 0.3)
    assert attended.dtype == dtype
    close(attended, reference(queries, keys, values, bias, 0.3), TOLERANCE[dtype])


def test_a_bias_that_all_rows_share():
    queries, keys, values = normal(2, 2, 3, 32), normal(2, 2, 150, 32, seed=1), normal(2, 2, 150, 32, seed=2)
    bias = normal(1, 1, 150, seed=3).expand(2, 2, 150)
    close(attend(queries, keys, values, bias, 0.2), reference(queries, keys, values, bias, 0.2), 1e-5)


def test_large_logits_do_not_overflow():
    queries, keys, values = normal(1, 1, 2, 16) * 100, normal(1, 1, 200, 16, seed=1), normal(1, 1, 200, 16, seed=2)
    attended = attend(queries, keys, values, None, 1.0)
    close(attended, reference(queries, keys, values, None, 1.0), 1e-4)
    assert attended.isfinite().all()


def test_the_seam_calls_it_on_a_gpu(monkeypatch):
    """`attend` gives the same by the kernel as by torch, masks of every form included."""
    from kvweave.memory import attend as module

    query, keys, values = normal(2, 6, 1, 16), normal(2, 2, 70, 16, seed=1), normal(2, 2, 70, 16, seed=2)
    seen = torch.rand(2, 1, 1, 70, generator=torch.Generator().manual_seed(4)).to(DEVICE) < 0.7
    masks = [None, seen, seen.expand(-1, 2, -1, -1), normal(1, 2, 1, 70, seed=5), normal(2, 6, 1, 70, seed=6)]
    with torch.no_grad():
        for mask in masks:
            found = []
            for kernel in (False, True):
                monkeypatch.setattr(module, "fused", lambda *_, kernel=kernel: kernel)
                found.append(module.attend(query, keys, values, mask, 0.3))
            close(found[1], found[0].cpu(), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tail", [0, 3])
def test_heads_of_different_counts(dtype, biased, tail):
    counts, dim, batch = (5, 200, 64, 130), 24, 2
    queries = normal(batch, len(counts), 3, dim, dtype=dtype)
    buffers = [[normal(batch, 1, n + 10, dim, dtype=dtype, seed=n + s) for n in counts] for s in (1, 2)]
    keys, values = ([x[:, :, :n] for x, n in zip(part, counts, strict=True)] for part in buffers)
    biases = [normal(batch, 1, n + 10, dtype=dtype, seed=n)[:, :, :n] for n in counts] if biased else None
    attended = attend_uneven(queries, keys, values, biases, 0.3, tail)
    for head in range(len(counts)):
        own = None if biases is None else biases[head]
        expected = reference(queries[:, head : head + 1], keys[head], values[head], own, 0.3)
        close(attended[:, head : head + 1], expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("dim", "value_dim", "slots", "young"), PACKED)
def test_packed_slots(dtype, bits, dim, value_dim, slots, young):
    queries = normal(2, 2, 3, dim, dtype=dtype)
    keys = pack(normal(2, 2, slots // 32, 32, dim, dtype=dtype, seed=1), bits, -2)
    values = pack(normal(2, 2, slots, value_dim // 8, 8, dtype=dtype, seed=2), bits, -1)
    rest = normal(2, 2, young, dim, dtype=dtype, seed=3), normal(2, 2, young, value_dim, dtype=dtype, seed=4)
    bias = normal(2, 2, slots + young, dtype=dtype, seed=5)
    bias[:, :, : slots // 2] = torch.finfo(dtype).min
    wide = [Packed(x.codes, x.scale.double(), x.zero.double(), x.bits).unpacked().cpu() for x in (keys, values)]
    whole = [
        torch.cat([x.flatten(*at).to(DEVICE), y.double()], 2)
        for x, y, at in zip(wide, rest, ((2, 3), (3, 4)), strict=True)
    ]
    for added in (None, bias):
        attended = attend_packed(queries, keys, values, rest, added, 0.3)
        close(attended, reference(queries.double(), *whole, added, 0.3), TOLERANCE[dtype])
