"""Attention over packed slots, a block at a time, against SDPA over the same slots in full precision."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure import peak_bytes
from kvweave.ops import packed_attention
from kvweave.ops.packed_attention import attend_packed
from kvweave.ops.quantize import pack


def packed_slots(batch, kv_heads, slots, dim, value_dim, bits, group=8, channels=4):
    generator = torch.Generator().manual_seed(slots + bits)
    keys = torch.randn(batch, kv_heads, slots // group, group, dim, generator=generator)
    values = torch.randn(batch, kv_heads, slots, value_dim // channels, channels, generator=generator)
    return pack(keys, bits, -2), pack(values, bits, -1)


@pytest.mark.parametrize("numbers", [1, 500, 1 << 18], ids=["a row at a time", "heads apart", "all"])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("young", "biased"), [(0, False), (5, True)])
def test_equals_unpacked(numbers, bits, young, biased, monkeypatch):
    monkeypatch.setattr(packed_attention, "_NUMBERS", numbers)
    keys, values = packed_slots(2, 3, 40, 16, 12, bits)
    queries, bias = torch.randn(2, 3, 4, 16), torch.randn(2, 1, 40 + young).expand(-1, 3, -1) if biased else None
    rest = torch.randn(2, 3, young, 16), torch.randn(2, 3, young, 12)
    written = keys.unpacked().flatten(2, 3), values.unpacked().flatten(3)
    whole = [torch.cat(parts, 2) for parts in zip(written, rest, strict=True)]
    expected = F.scaled_dot_product_attention(queries, *whole, None if bias is None else bias[:, :, None], scale=0.3)
    torch.testing.assert_close(attend_packed(queries, keys, values, rest, bias, 0.3), expected, rtol=1e-4, atol=1e-5)


def test_half_precision_is_summed_in_float32():
    keys, values = packed_slots(1, 2, 400, 32, 32, 4)
    halves = [type(x)(x.codes, x.scale.bfloat16(), x.zero.bfloat16(), 4) for x in (keys, values)]
    exact = [type(x)(x.codes, x.scale.double(), x.zero.double(), 4) for x in halves]
    queries, nothing = torch.randn(1, 2, 3, 32).bfloat16(), torch.zeros(1, 2, 0, 32).bfloat16()
    expected = attend_packed(queries.double(), *exact, (nothing.double(), nothing.double()), None, 0.2)
    found = attend_packed(queries, *halves, (nothing, nothing), None, 0.2)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.bfloat16(), rtol=1e-2, atol=1e-3)


def test_the_whole_is_never_written_out():
    keys, values = packed_slots(1, 4, 8192, 128, 128, 4, group=32, channels=32)
    queries, nothing = torch.randn(1, 4, 7, 128), torch.zeros(1, 4, 0, 128)
    whole = 2 * 4 * 8192 * 128 * 4
    peak = peak_bytes(lambda: attend_packed(queries, keys, values, (nothing, nothing), None, 0.1))
    assert peak < 0.3 * whole, f"{peak / 2**20:.1f} MiB of {whole / 2**20:.0f}"
