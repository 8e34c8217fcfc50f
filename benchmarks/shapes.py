"""The layers that are measured: the same tensors in every benchmark and every process. Needs nothing but torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Heads of a layer."""

    heads: int
    kv_heads: int
    dim: int

    def __str__(self) -> str:
        return f"H={self.heads} KV={self.kv_heads} D={self.dim}"


SMALL, QWEN = Shape(8, 8, 64), Shape(28, 4, 128)  # QWEN: a layer of Qwen2.5-VL-7B


@dataclass(frozen=True)
class Layer:
    """A layer of one prompt: [1, heads, length, dim] each, and bool [1, length], which tokens are visual."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    visual: Tensor

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    @property
    def rotary(self) -> tuple[Tensor, Tensor]:
        """(cos, sin), [1, length, dim] each, for methods that turn keys."""
        dim = self.keys.shape[3]
        angles = torch.arange(self.length)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
        angles = torch.cat([angles, angles], -1)[None]
        return angles.cos(), angles.sin()


def layer_of(shape: Shape, length: int) -> Layer:
    """A random layer; its prompt is text, images, text."""
    generator = torch.Generator().manual_seed(length)
    queries, keys, values = (
        torch.randn(1, heads, length, shape.dim, generator=generator)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    visual = torch.zeros(1, length, dtype=torch.bool)
    visual[:, length // 8 : length * 3 // 4] = True
    return Layer(queries, keys, values, visual)
