"""Asymmetric integer quantisation with real packing: 8, 4 or 2 bits a number (KIVI, 2402.02750)."""

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (8, 4, 2)


@dataclass(frozen=True)
class Quantization:
    """How slots are packed.

    Attributes:
        bits: 8, 4 or 2 a number.
        group: tokens that share a key channel's scale, and channels that share a value's.
        residual: youngest slots that stay in full precision, at least.
    """

    bits: int
    group: int
    residual: int


@dataclass(frozen=True)
class Packed:
    """A quantised tensor.

    Attributes:
        codes: uint8 [..., n, dim * bits / 8], 8 / bits numbers a byte.
        scale, zero: a number's value is code * scale + zero; broadcast over the axis they were taken along.
        bits: 8, 4 or 2.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.codes, self.scale, self.zero))

    def unpacked(self) -> Tensor:
        """The numbers, in the dtype of `scale`."""
        shifts = torch.arange(0, 8, self.bits, device=self.codes.device, dtype=torch.uint8)
        codes = (self.codes[..., None] >> shifts) & (2**self.bits - 1)
        return codes.flatten(-2).to(self.scale.dtype) * self.scale + self.zero

    def rows(self, index: Tensor) -> "Packed":
        """The given rows of the first dimension."""
        return Packed(self.codes[index], self.scale[index], self.zero[index], self.bits)


def pack(x: Tensor, bits: int, dim: int) -> Packed:
    """Quantise `x` [..., n, dim], one scale and zero for all numbers along `dim`.

    Args:
        bits: 8, 4 or 2; the last dimension must be a multiple of 8 / bits.
        dim: -1: by token (values), -2: by channel (keys).
    """
    wide = x.to(torch.float32)
    low, high = wide.amin(dim, keepdim=True), wide.amax(dim, keepdim=True)
    zero = low.to(x.dtype)
    scale = ((high - zero.to(torch.float32)) / (2**bits - 1)).to(x.dtype)
    step = scale.to(torch.float32)
    step = torch.where(step > 0, step, 1.0)
    codes = ((wide - zero.to(torch.float32)) / step).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    parts = codes.unflatten(-1, (-1, 8 // bits))
    shifts = torch.arange(0, 8, bits, device=x.device, dtype=torch.uint8)
    return Packed((parts << shifts).sum(-1, dtype=torch.uint8), scale, zero, bits)
