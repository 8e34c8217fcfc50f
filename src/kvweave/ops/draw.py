"""Random choices that depend on the seed, the layer and what a row holds, and on nothing else."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray


def uniform(seed: int, layer: int, like: Tensor, first: int = 0) -> Tensor:
    """Uniform numbers in [0, 1), alike for every row of the batch, so that a row gives what it gives alone.

    Args:
        like: [batch, kv_heads, n], for shape and device.
        first: number of the first of these heads.
    Returns:
        float64 [batch, kv_heads, n].
    """
    _, kv_heads, n = like.shape
    numbers = np.stack(
        [np.random.default_rng([seed, layer, head]).random(n) for head in range(first, first + kv_heads)]
    )
    return torch.from_numpy(numbers).to(like.device).expand(like.shape)


def stratified_rows(row_visual: Tensor, count: int, seed: int, layer: int) -> tuple[Tensor, Tensor]:
    """Some rows, drawn from text and visual ones in proportion, at least one of each that there is.

    The rows of a modality are cut into as many runs of neighbours as it gives rows, and each run gives one: what a
    row attends to changes slowly along the prompt, so that the draw speaks for all of it.

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
        texts, visuals = np.flatnonzero(~visual), np.flatnonzero(visual)
        size = round(count * len(visuals) / rows)
        if len(texts) and len(visuals):
            size = min(max(size, 1), count - 1)
        samples = [_one_of_each_run(*of, generator) for of in ((texts, count - size), (visuals, size))]
        index[n] = np.concatenate([at for at, _ in samples])
        weight[n, 0, : count - size], weight[n, 1, count - size :] = (runs for _, runs in samples)
        order = index[n].argsort()
        index[n], weight[n] = index[n, order], weight[n][:, order]
    device = row_visual.device
    return torch.from_numpy(index).to(device), torch.from_numpy(weight).to(device)


def _one_of_each_run(
    these: "NDArray[np.int64]", runs: int, generator: np.random.Generator
) -> "tuple[NDArray[np.int64], NDArray[np.int64]]":
    """One of each of `runs` runs of neighbours, as equal as can be, and the runs' lengths."""
    edges = np.arange(runs + 1) * len(these) // max(1, runs)
    lengths = np.diff(edges)
    return these[edges[:-1] + generator.integers(lengths)], lengths
