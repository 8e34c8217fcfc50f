"""Pictures, against a plain loop over pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from kvweave.lab.smol.scenes import CELL, CELLS, EMPTY, SEEN, SIDE, SIZES, draw, dress, images


def plainly(one, pictures: np.ndarray) -> np.ndarray:
    """One picture without noise, pixel by pixel."""
    canvas = np.zeros((SIDE, SIDE, 3))
    ground, tint, (across, down, phase) = (part[0].tolist() for part in (one.ground, one.tint, one.wave))
    for y in range(SIDE):
        for x in range(SIDE):
            along, below = 2 * math.pi * x / SIDE * across, 2 * math.pi * y / SIDE * down
            swing = math.sin(along + below + phase)
            if one.checks[0]:
                swing = np.sign(math.sin(along)) * np.sign(math.sin(below))
            canvas[y, x] = [g + swing * t for g, t in zip(ground, tint, strict=True)]
    for cell, noun in enumerate(one.cells[0].tolist()):
        if noun == EMPTY:
            continue
        size = SIZES[one.sizes[0, cell]]
        picture = pictures[noun].copy()
        picture[..., :3] = np.round(picture[..., :3] * (picture[..., 3:] / 255))
        channels = [
            Image.fromarray(c).resize((size, size), Image.Resampling.BOX) for c in np.moveaxis(picture, -1, 0)
        ]
        small = np.stack([np.asarray(c) for c in channels], -1) / 255
        small = small[:, ::-1] if one.flips[0, cell] else small
        top = cell // 3 * CELL + int(one.rows[0, cell])
        left = cell % 3 * CELL + int(one.columns[0, cell])
        below = canvas[top : top + size, left : left + size]
        canvas[top : top + size, left : left + size] = below * (1 - small[..., 3:]) + small[..., :3]
    return np.round(np.clip(canvas * float(one.light[0]), 0, 1) * 255)


@pytest.mark.parametrize("holdout", [False, True])
def test_pictures_are_what_a_loop_over_pixels_draws(noise_pictures, holdout):
    rng = np.random.default_rng(7 + holdout)
    cells = rng.integers(0, len(noise_pictures), (1, CELLS))
    cells[0, 4] = EMPTY
    scene = dress(cells, rng, holdout)
    drawn = draw(scene, torch.zeros(1, SIDE, SIDE, 3))[0].numpy()
    assert np.abs(drawn - plainly(scene, noise_pictures)).max() <= 1  # rounding


def test_holdout_pictures_have_sizes_and_grounds_of_their_own():
    cells = np.zeros((200, CELLS), int)
    seen, unseen = (dress(cells, np.random.default_rng(1), holdout) for holdout in (False, True))
    assert {SIZES[n] for n in seen.sizes.flatten().tolist()} == set(SEEN)
    assert {SIZES[n] for n in unseen.sizes.flatten().tolist()} == set(SIZES) - set(SEEN)
    assert not seen.checks.any()
    assert unseen.checks.all()


def test_many_are_drawn_as_one_by_one(noise_pictures):
    rng = np.random.default_rng(3)
    scene = dress(rng.integers(-1, len(noise_pictures), (5, CELLS)), rng)
    noise = torch.randn(5, SIDE, SIDE, 3)
    together = draw(scene, noise)
    for n in range(5):
        alone = type(scene)(**{name: part[n : n + 1] for name, part in vars(scene).items()})
        assert torch.equal(draw(alone, noise[n : n + 1])[0], together[n])


def test_the_same_generator_gives_the_same_pictures(noise_pictures):
    cells = np.arange(2 * CELLS).reshape(2, CELLS)
    first, again = (images(dress(cells, rng), rng) for rng in (np.random.default_rng(5), np.random.default_rng(5)))
    assert [picture.tobytes() for picture in first] == [picture.tobytes() for picture in again]
