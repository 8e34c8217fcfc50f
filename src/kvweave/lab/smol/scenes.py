"""Pictures of 96 x 96 pixels: nine cells, in each a pictogram or nothing, on a pale ground. Drawn many at once.

What differs from one picture to the next (sizes, shifts, grounds) is drawn as numbers first (`Scenes`), so that
workers can send it on cheaply and the pixels are made where the model is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kvweave.lab.smol.pictograms import pictures

CELL, GRID, PATCH = 32, 3, 16
SIDE = CELL * GRID
CELLS = GRID * GRID
EMPTY = -1
SIZES = tuple(range(24, CELL + 1))  # pixels of a pictogram
SEEN = tuple(size for size in SIZES if size % 2 == 0)  # the others only in hold-out pictures
NOISE = 0.02


@dataclass(frozen=True)
class Scenes:
    """Pictures before they are drawn.

    cells, int [pictures, 9]: nouns, row by row, -1 where there is nothing; sizes, rows, columns and flips alike:
    index in SIZES, shift within the cell, whether mirrored. ground, tint [pictures, 3]: the ground's colour and how
    far it swings; wave [pictures, 3]: the swing's periods across and down the picture, and its phase;
    checks, bool [pictures]: squares instead of waves, as only hold-out pictures have; light [pictures].
    """

    cells: Tensor
    sizes: Tensor
    rows: Tensor
    columns: Tensor
    flips: Tensor
    ground: Tensor
    tint: Tensor
    wave: Tensor
    checks: Tensor
    light: Tensor

    def __len__(self) -> int:
        return len(self.cells)

    def to(self, device: torch.device) -> Scenes:
        """The same on another device."""
        return Scenes(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


def dress(cells: np.ndarray, rng: np.random.Generator, holdout: bool = False) -> Scenes:
    """Scenes with these nouns in their cells, int [pictures, 9]; hold-out: sizes and grounds never trained on."""
    count = len(cells)
    allowed = [n for n, size in enumerate(SIZES) if (size in SEEN) != holdout]
    sizes = rng.choice(allowed, (count, CELLS))
    room = CELL - np.asarray(SIZES)[sizes]
    rows, columns = (np.floor(rng.random((count, CELLS)) * (room + 1)).astype(np.int64) for _ in range(2))
    ground = rng.uniform(0.72, 1.0, (count, 3))
    ground[rng.random(count) < 0.2] = 1.0
    tint = rng.uniform(-0.12, 0.12, (count, 3))
    if not holdout:
        tint[rng.random(count) < 0.4] = 0.0
    wave = np.concatenate([rng.uniform(-8, 8, (count, 2)), rng.uniform(0, 2 * np.pi, (count, 1))], 1)
    slow = rng.random(count) < 0.3  # a gradient
    wave[slow, :2] /= 12
    if holdout:
        wave[:, :2] = rng.uniform(3, 8, (count, 2))
    parts = {"ground": ground, "tint": tint, "wave": wave, "light": rng.uniform(0.85, 1.1, count)}
    return Scenes(
        cells=torch.from_numpy(cells.astype(np.int64)),
        sizes=torch.from_numpy(sizes),
        rows=torch.from_numpy(rows),
        columns=torch.from_numpy(columns),
        flips=torch.from_numpy(rng.random((count, CELLS)) < 0.15),
        checks=torch.full((count,), holdout),
        **{name: torch.from_numpy(part.astype(np.float32)) for name, part in parts.items()},
    )


def draw(scenes: Scenes, noise: Tensor) -> Tensor:
    """uint8 [pictures, 96, 96, 3]; `noise` is standard normal, of the same shape, on the scenes' device."""
    device = scenes.cells.device
    count = len(scenes)
    place = torch.arange(CELL, device=device)
    size = torch.tensor(SIZES, device=device)[scenes.sizes][..., None]  # [pictures, 9, 1]
    down = place - scenes.rows[..., None]  # [pictures, 9, 32], which row of the pictogram
    across = place - scenes.columns[..., None]
    across = torch.where(scenes.flips[..., None], size - 1 - across, across)
    inside = ((down >= 0) & (down < size))[..., None] & ((across >= 0) & (across < size))[..., None, :]
    inside &= (scenes.cells != EMPTY)[..., None, None]
    found = _bank(device)[
        scenes.sizes[..., None, None],
        scenes.cells.clamp(min=0)[..., None, None],
        down.clamp(0, CELL - 1)[..., None],
        across.clamp(0, CELL - 1)[..., None, :],
    ]  # [pictures, 9, 32, 32, 4]
    found = found.float() * (inside[..., None] / 255)
    found = found.view(count, GRID, GRID, CELL, CELL, 4).transpose(2, 3).reshape(count, SIDE, SIDE, 4)
    colour, alpha = found[..., :3], found[..., 3:]
    image = _grounds(scenes) * (1 - alpha) + colour
    image = image * scenes.light[:, None, None, None] + NOISE * noise
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def images(scenes: Scenes, rng: np.random.Generator) -> list[Image.Image]:
    """The pictures one by one, for people and processors."""
    noise = torch.from_numpy(rng.standard_normal((len(scenes), SIDE, SIDE, 3), dtype=np.float32))
    return [Image.fromarray(picture) for picture in draw(scenes, noise).numpy()]


def pixel_values(drawn: Tensor) -> Tensor:
    """float [pictures, 3, 96, 96] in -1 .. 1, as the tower takes them."""
    return drawn.permute(0, 3, 1, 2).float() / 127.5 - 1


def _grounds(scenes: Scenes) -> Tensor:
    """[pictures, 96, 96, 3]."""
    along = torch.arange(SIDE, device=scenes.wave.device) / SIDE * 2 * torch.pi
    across, down, phase = scenes.wave[:, :, None].unbind(1)  # [pictures, 1]
    across, down = across * along, down * along
    waves = torch.sin(down[:, :, None] + across[:, None, :] + phase[:, :, None])
    squares = torch.sign(torch.sin(down)[:, :, None] * torch.sin(across)[:, None, :])
    swing = torch.where(scenes.checks[:, None, None], squares, waves)
    return scenes.ground[:, None, None] + swing[..., None] * scenes.tint[:, None, None]


@functools.cache
def _bank(device: torch.device) -> Tensor:
    """uint8 [sizes, nouns, 32, 32, 4], colours times alpha, each pictogram in the top left corner."""
    found = pictures()
    bank = np.zeros((len(SIZES), len(found), CELL, CELL, 4), np.uint8)
    weighted = found.copy()
    weighted[..., :3] = np.round(found[..., :3] * (found[..., 3:] / 255))
    for n, size in enumerate(SIZES):
        for noun, picture in enumerate(weighted):
            channels = [
                Image.fromarray(channel).resize((size, size), Image.Resampling.BOX)
                for channel in np.moveaxis(picture, -1, 0)
            ]
            bank[n, noun, :size, :size] = np.stack([np.asarray(channel) for channel in channels], -1)
    return torch.from_numpy(bank).to(device)
