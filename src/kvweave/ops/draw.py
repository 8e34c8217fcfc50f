"""Random numbers that depend on the seed, the layer and the KV head, and on nothing else."""

import numpy as np
import torch
from torch import Tensor


def uniform(seed: int, layer: int, like: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), alike for every row of the batch, so that a row gives what it gives alone.

    Args:
        like: [batch, kv_heads, n], for shape and device.
    Returns:
        float64 [batch, kv_heads, n].
    """
    _, kv_heads, n = like.shape
    numbers = np.stack([np.random.default_rng([seed, layer, head]).random(n) for head in range(kv_heads)])
    return torch.from_numpy(numbers).to(like.device).expand(like.shape)
