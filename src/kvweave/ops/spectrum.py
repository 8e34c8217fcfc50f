"""Low-pass along the sequence by FFT: equal to truncating an orthonormal DCT-II (SPEC 5)."""

import torch
from torch import Tensor


def low_pass(x: Tensor, cutoff: int) -> Tensor:
    """`x` with only its DCT-II coefficients 0 .. `cutoff` along the sequence, in O(length log length).

    The sequence and its mirror image have a real spectrum whose truncation is that of the DCT.

    Args:
        x: [..., length, dim].
    Returns:
        [..., length, dim], float32 or wider.
    """
    length = x.shape[-2]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if cutoff >= length - 1:
        return x  # nothing lies above: exactly so
    spectrum = torch.fft.rfft(torch.cat([x, x.flip(-2)], -2), dim=-2)
    spectrum[..., cutoff + 1 :, :] = 0
    return torch.fft.irfft(spectrum, n=2 * length, dim=-2)[..., :length, :]
