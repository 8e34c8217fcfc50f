"""What the low frequencies of a sequence leave over, by an FFT there and one back (SPEC 5)."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_NUMBERS = 1 << 18  # at a time on a CPU, so that they and their spectrum stay in a core's cache
_GPU_NUMBERS = 1 << 26
_CHANNELS = 32  # but no fewer: a token's channels are read from memory by the line


def above(tensors: Sequence[Tensor], cutoff: int) -> list[tuple[Tensor, Tensor]]:
    """How far each token lies from the sequence that has only the DCT-II coefficients 0 .. `cutoff`.

    In O(length log length): the even tokens followed by the odd ones backwards have a real spectrum, whose element k
    turned by k quarter periods in `length` holds coefficients k and length - k (Makhoul, 1980).

    Args:
        tensors: [batch, heads, length, dim] each, of one length.
    Returns:
        Of each the squared distance, mean over channels, [batch, heads, length], and its own energy, sum of squares,
        [batch, heads]; float32 or wider.
    """
    first = tensors[0]
    most = _NUMBERS if first.is_cpu else _GPU_NUMBERS
    if len({(x.shape, x.dtype) for x in tensors}) == 1 and sum(x.numel() for x in tensors) <= most:
        distance, energy = _above(torch.cat(list(tensors), 1), cutoff, most)  # one call for all
        return list(zip(distance.chunk(len(tensors), 1), energy.chunk(len(tensors), 1), strict=True))
    return [_above(x, cutoff, most) for x in tensors]


def _above(x: Tensor, cutoff: int, most: int) -> tuple[Tensor, Tensor]:
    """As `above`, of one tensor, at most so many numbers at a time."""
    batch, heads, length, dim = x.shape
    x = x.flatten(0, 1)
    wide = torch.promote_types(x.dtype, torch.float32)
    order, turns = _tables(length, wide, x.device)
    distance = x.new_zeros(batch * heads, length, dtype=wide)
    energy = x.new_zeros(batch * heads, dtype=wide)
    width = max(_CHANNELS, most // length)  # channels at a time
    count = max(1, width // dim)
    for start in range(0, batch * heads, count):
        these = slice(start, min(batch * heads, start + count))
        for part in x[these].transpose(0, 1).flatten(1).split(width, -1):
            squared, total = _channels_above(part.index_select(0, order).t().to(wide).contiguous(), cutoff, turns)
            distance[these] += squared.unflatten(0, (these.stop - start, -1)).sum(1)
            energy[these] += total.unflatten(0, (these.stop - start, -1)).sum(1)
    distance = torch.empty_like(distance).index_copy_(1, order, distance).div_(dim)
    return distance.unflatten(0, (batch, heads)), energy.unflatten(0, (batch, heads))


def _channels_above(signal: Tensor, cutoff: int, turns: Tensor) -> tuple[Tensor, Tensor]:
    """As `above`, of channels whose even tokens come first and then the odd ones backwards.

    Args:
        signal: [channels, length], float32 or wider; turns: complex [length // 2 + 1].
    Returns:
        [channels, length] in the same order, and [channels].
    """
    length, energy = signal.shape[1], signal.square().sum(1)
    if cutoff >= length - 1:
        return torch.zeros_like(signal), energy  # nothing lies above: exactly so
    spectrum = torch.fft.rfft(signal).mul_(turns)
    pairs = torch.view_as_real(spectrum)  # coefficients k, and length - k with the sign changed
    pairs[:, cutoff + 1 :, 0] = 0
    pairs[:, : length - cutoff, 1] = 0
    return torch.fft.irfft(spectrum.mul_(turns.conj()), n=length).sub_(signal).square_(), energy


@functools.lru_cache(maxsize=4)  # all layers of a prompt ask for the same
def _tables(length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The tokens in the order of the transform, int64 [length], and the turns, complex [length // 2 + 1]."""
    with torch.inference_mode(False):
        order = torch.cat([torch.arange(0, length, 2), torch.arange(1, length, 2).flip(0)])
        angles = torch.arange(length // 2 + 1, dtype=torch.float64) * (-math.pi / (2 * length))
        turns = torch.polar(torch.ones_like(angles), angles).to(dtype.to_complex())
        return order.to(device), turns.to(device)
