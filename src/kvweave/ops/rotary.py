"""Phases of rotary position embedding."""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn `x` by the angles of `cos` and `sin`, half-split pairs (x_m, x_{m + dim / 2}).

    Args:
        x: [..., dim]; channels beyond the tables' width are left as they are (partial rotary).
        cos, sin: [..., rotary_dim], both halves alike.
    """
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    half = width // 2
    swapped = torch.cat([-turned[..., half:], turned[..., :half]], -1)
    turned = turned * cos + swapped * sin
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def unit_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables with an attention scaling folded into them (YaRN) brought back to the unit circle."""
    norm = torch.sqrt(cos.square() + sin.square()).clamp(min=1e-12)
    return cos / norm, sin / norm


def phase_difference(cos_to: Tensor, sin_to: Tensor, cos_from: Tensor, sin_from: Tensor) -> tuple[Tensor, Tensor]:
    """Tables of the angle from one phase to another (METHODS 4.2)."""
    return cos_to * cos_from + sin_to * sin_from, sin_to * cos_from - cos_to * sin_from
