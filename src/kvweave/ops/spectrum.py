"""What the low frequencies of a sequence leave over, by an FFT there and one back (SPEC 5)."""

import math

import torch
from torch import Tensor

_NUMBERS = 1 << 18  # at a time on a CPU, so that they and their spectrum stay in a core's cache
_CHANNELS = 32  # but no fewer: a token's channels are read from memory by the line


def above(x: Tensor, cutoff: int) -> tuple[Tensor, Tensor]:
    """How far each token lies from the sequence that has only the DCT-II coefficients 0 .. `cutoff`.

    In O(length log length): the even tokens followed by the odd ones backwards have a real spectrum, whose element k
    turned by k quarter periods in `length` holds coefficients k and length - k (Makhoul, 1980).

    Args:
        x: [batch, heads, length, dim].
    Returns:
        The squared distance, mean over channels, [batch, heads, length], and the energy of `x` itself, sum of
        squares, [batch, heads]; float32 or wider.
    """
    batch, heads, length, dim = x.shape
    x = x.flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32))
    angles = torch.arange(length // 2 + 1, dtype=torch.float64, device=x.device) * (-math.pi / (2 * length))
    turns = torch.polar(torch.ones_like(angles), angles).to(x.dtype.to_complex())
    distance, energy = x.new_zeros(batch * heads, length), x.new_zeros(batch * heads)
    width = max(_CHANNELS, _NUMBERS // length) if x.is_cpu else batch * heads * dim  # channels at a time
    count = max(1, width // dim)
    for start in range(0, batch * heads, count):
        these = slice(start, min(batch * heads, start + count))
        for part in x[these].transpose(0, 1).flatten(1).split(width, -1):
            squared, total = _above(part, cutoff, turns)
            distance[these] += squared.unflatten(0, (these.stop - start, -1)).sum(1)
            energy[these] += total.unflatten(0, (these.stop - start, -1)).sum(1)
    half = (length + 1) // 2
    ordered = torch.empty_like(distance)
    ordered[:, ::2], ordered[:, 1::2] = distance[:, :half], distance[:, half:].flip(1)
    return ordered.div_(dim).unflatten(0, (batch, heads)), energy.unflatten(0, (batch, heads))


def _above(x: Tensor, cutoff: int, turns: Tensor) -> tuple[Tensor, Tensor]:
    """As `above`, of channels.

    Args:
        x: [length, channels]; turns: complex [length // 2 + 1].
    Returns:
        [channels, length], even tokens first and then odd ones backwards, and [channels].
    """
    length = len(x)
    signal = torch.cat([x[::2], x[1::2].flip(0)]).t().contiguous()
    energy = signal.square().sum(1)
    if cutoff >= length - 1:
        return torch.zeros_like(signal), energy  # nothing lies above: exactly so
    spectrum = torch.fft.rfft(signal).mul_(turns)
    pairs = torch.view_as_real(spectrum)  # coefficients k, and length - k with the sign changed
    pairs[:, cutoff + 1 :, 0] = 0
    pairs[:, : length - cutoff, 1] = 0
    return torch.fft.irfft(spectrum.mul_(turns.conj()), n=length).sub_(signal).square_(), energy
