"""Random choices that depend on the seed, the layer and what a row holds, and on nothing else."""

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


def stratified_rows(row_visual: Tensor, count: int, seed: int, layer: int) -> tuple[Tensor, Tensor]:
    """Some rows, drawn from text and visual ones in proportion, at least one of each that there is.

    Args:
        row_visual: bool [batch, rows]; count: rows to draw, 2 <= count <= rows.
    Returns:
        ascending rows, int64 [batch, count]; and what each counts for among all text and all visual rows, float
        [batch, 2, count].
    """
    batch, rows = row_visual.shape
    index = np.empty((batch, count), dtype=np.int64)
    weight = np.zeros((batch, 2, count), dtype=np.float32)
    for n, visual in enumerate(row_visual.cpu().numpy()):
        generator = np.random.default_rng([seed, layer])
        of_each = [np.flatnonzero(~visual), np.flatnonzero(visual)]
        visuals = round(count * len(of_each[1]) / rows)
        if len(of_each[0]) and len(of_each[1]):
            visuals = min(max(visuals, 1), count - 1)
        drawn = [
            generator.choice(these, size, replace=False)
            for these, size in zip(of_each, (count - visuals, visuals), strict=True)
        ]
        index[n] = np.sort(np.concatenate(drawn))
        for kind, (these, those) in enumerate(zip(of_each, drawn, strict=True)):
            weight[n, kind, np.isin(index[n], those)] = len(these) / max(1, len(those))
    device = row_visual.device
    return torch.from_numpy(index).to(device), torch.from_numpy(weight).to(device)
