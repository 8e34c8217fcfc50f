"""Packing numbers in few bits: the error is half a step, and the bytes are what they should be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvweave.ops.quantize import BITS, pack


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from(BITS),
    dim=st.sampled_from([-1, -2]),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-100, 100),
    seed=st.integers(0, 999),
)
def test_the_error_is_at_most_half_a_step(bits, dim, scale, shift, seed):
    x = torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(seed)) * scale + shift
    packed = pack(x, bits, dim)
    step = packed.scale / 2 + 1e-6 * x.abs().amax()
    assert ((packed.unpacked() - x).abs() <= step * 1.001).all()
    assert packed.codes.numel() == x.numel() * bits // 8


@pytest.mark.parametrize("bits", BITS)
def test_the_extremes_and_a_constant_come_back(bits):
    x = torch.tensor([[-1.0, 3.0, 0.5, 1.0], [7.0, 7.0, 7.0, 7.0]])
    back = pack(x, bits, -1).unpacked()
    assert torch.allclose(back[0, :2], x[0, :2])
    assert torch.equal(back[1], x[1])


@pytest.mark.parametrize("bits", BITS)
def test_keys_by_channel_do_not_suffer_from_another_channels_range(bits):
    x = torch.randn(1, 1, 32, 8, generator=torch.Generator().manual_seed(0))
    x[..., 3] *= 1000
    by_channel = (pack(x, bits, -2).unpacked() - x)[..., :3].abs().max()
    by_token = (pack(x, bits, -1).unpacked() - x)[..., :3].abs().max()
    assert by_channel < by_token / 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half(dtype):
    x = torch.randn(2, 4, 8, dtype=dtype)
    packed = pack(x, 8, -1)
    assert packed.unpacked().dtype == dtype
    assert (packed.unpacked() - x).abs().max() < 0.1
