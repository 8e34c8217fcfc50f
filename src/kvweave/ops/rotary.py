"""Phases of rotary position embedding."""

from collections.abc import Sequence

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn `x` by the angles of `cos` and `sin`.

    Args:
        x: [..., dim]; channels beyond the tables' width are left as they are (partial rotary).
        cos, sin: [..., rotary_dim], the same number for both channels of a pair.
        interleaved: pairs are (x_2m, x_2m+1); else half-split, (x_m, x_(m + rotary_dim / 2)).
    """
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        swapped = torch.stack([-turned[..., 1::2], turned[..., 0::2]], -1).flatten(-2)
    else:
        swapped = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], -1)
    turned = turned * cos + swapped * sin
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def paired_tables(table: Tensor, *, interleaved: bool) -> Tensor:
    """`table` [..., rotary_dim] laid out for `rotate`: some models repeat its first half only when they use it."""
    half = table.shape[-1] // 2
    if interleaved and torch.equal(table[..., :half], table[..., half:]):
        return table[..., :half].repeat_interleave(2, -1)
    return table


def unit_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables with an attention scaling folded into them (YaRN) brought back to the unit circle."""
    norm = torch.sqrt(cos.square() + sin.square()).clamp(min=1e-12)
    return cos / norm, sin / norm


def phase_difference(cos_to: Tensor, sin_to: Tensor, cos_from: Tensor, sin_from: Tensor) -> tuple[Tensor, Tensor]:
    """Tables of the angle from one phase to another (SPEC 4.2)."""
    return cos_to * cos_from + sin_to * sin_from, sin_to * cos_from - cos_to * sin_from


def mean_phase(
    last: Sequence[Tensor], here: Sequence[Tensor], there: Sequence[Tensor], count: int
) -> tuple[Tensor, Tensor]:
    """Mean cosine and sine of the next `count` angles behind `last`, which go on by the step from `here` to `there`.

    Args:
        last, here, there: (cos, sin) on the unit circle, [..., rotary_dim] each.
    Returns:
        [..., rotary_dim] each (SPEC 16.4).
    """
    step_cos, step_sin = (x.double() for x in phase_difference(*there, *here))
    half = torch.atan2(step_sin, step_cos) / 2
    middle = torch.atan2(last[1].double(), last[0].double()) + (count + 1) * half
    flat = half.sin().abs() < 1e-12  # the sum of a geometric series, or of equal numbers
    length = torch.where(flat, 1.0, (count * half).sin() / (count * half.sin().masked_fill(flat, 1)))
    return length * middle.cos(), length * middle.sin()
