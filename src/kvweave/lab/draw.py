"""Pictures: square grids of cells of 16 x 16 pixels, each empty or holding one thing, as RGB bytes.

A small picture has 5 x 5 cells (80 x 80 pixels), a large one 10 x 10 with as few things on it.

What a cell holds is a number: 0 nothing, then 64 objects (a shape in a colour), the robot, 80 digits (a
figure in a colour on black). Every picture has the same faint background: it grows redder downwards and
greener rightwards, and with ``frames`` each cell also has a one-pixel border of random colours, so that the
same place can be recognised in two pictures. There are 25 such borders: a larger picture repeats them like
wallpaper, every five cells.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

from kvweave.lab.words import COLOURS, DIGITS, SHAPES

GRID = 5
CELL = 16
SIDE = GRID * CELL
CELLS = GRID * GRID
PATCH = 8
MERGE = CELL // PATCH  # 2 x 2 patches make one visual token: a cell

EMPTY = 0
ROBOT = 1 + len(SHAPES) * len(COLOURS)
FIRST_DIGIT = ROBOT + 1
THINGS = FIRST_DIGIT + len(DIGITS) * len(COLOURS)

Codes = NDArray[np.int64]
Pixels = NDArray[np.uint8]

_RGB = np.array(  # in [-1, 1], as are all intensities below until they become bytes
    [
        [1, -0.9, -0.9], [-0.9, 0.7, -0.9], [-0.7, -0.4, 1], [1, 1, -0.9],
        [0.3, -0.9, 0.5], [-0.9, 1, 1], [1, 1, 1], [1, 0.2, -0.9],
    ],
    np.float32,
)  # fmt: skip
_FIGURES = (  # 7 rows of 5 dots
    "01110100011001110101110011000101110", "00100011000010000100001000010001110",
    "01110100010000100010001000100011111", "11111000100010000010000011000101110",
    "00010001100101010010111110001000010", "11111100001111000001000011000101110",
    "00110010001000011110100011000101110", "11111000010001000100010000100001000",
    "01110100011000101110100011000101110", "01110100011000101111000010001001100",
)  # fmt: skip
_NOISE = 0.05


def object_code(shape: NDArray[np.int64], colour: NDArray[np.int64]) -> Codes:
    """What a cell holds when it shows ``SHAPES[shape]`` in ``COLOURS[colour]``."""
    return 1 + shape * len(COLOURS) + colour


def digit_code(digit: NDArray[np.int64], colour: NDArray[np.int64]) -> Codes:
    """What a cell holds when it shows ``DIGITS[digit]`` in ``COLOURS[colour]``."""
    return FIRST_DIGIT + digit * len(COLOURS) + colour


def describe(code: int) -> str:
    """The words for what a cell holds: ``""``, ``"red star"``, ``"robot"`` or ``"blue 7"``."""
    if not 0 <= code < THINGS:
        raise ValueError(f"a cell holds a number from 0 to {THINGS - 1}, not {code}")
    if code == EMPTY:
        return ""
    if code == ROBOT:
        return "robot"
    names, first = (SHAPES, 1) if code < ROBOT else (DIGITS, FIRST_DIGIT)
    name, colour = divmod(code - first, len(COLOURS))
    return f"{COLOURS[colour]} {names[name]}"


def render(codes: Codes, rng: np.random.Generator, *, frames: bool = True) -> Pixels:
    """Paint pictures with a little noise: codes [..., cells] -> bytes [..., side, side, 3]."""
    tiles, holes = _tiles()
    noise = _noise()
    grid = math.isqrt(codes.shape[-1])
    shown = tiles[codes]  # [..., cells, 16, 16, 3]
    shown += holes[codes] * _background(frames, grid)
    shown += noise[rng.integers(len(noise), size=codes.shape)]
    shown = np.clip((shown + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)
    board = shown.reshape(*codes.shape[:-1], grid, grid, CELL, CELL, 3)
    return np.swapaxes(board, -4, -3).reshape(*codes.shape[:-1], grid * CELL, grid * CELL, 3)


@cache
def _tiles() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Every thing's paint [things, 16, 16, 3], and where the background shows through [things, 16, 16, 1]."""
    paint = np.zeros((THINGS, CELL, CELL, 3), np.float32)
    holes = np.ones((THINGS, CELL, CELL, 1), np.float32)
    for shape, mask in enumerate(_shape_masks()):
        for colour, rgb in enumerate(_RGB):
            code = 1 + shape * len(COLOURS) + colour
            paint[code][mask] = rgb
            holes[code][mask] = 0

    rows, columns = np.mgrid[0:CELL, 0:CELL]
    body = (rows >= 4) & (rows < 14) & (columns >= 3) & (columns < 13)
    antenna = (rows < 4) & (columns >= 7) & (columns < 9)
    eyes = (rows >= 6) & (rows < 9) & np.isin(columns, (5, 6, 9, 10))
    paint[ROBOT][body | antenna] = 0.1
    paint[ROBOT][eyes] = (1, 0.6, 1)
    holes[ROBOT][body | antenna] = 0

    for digit, dots in enumerate(_FIGURES):
        figure = np.zeros((CELL, CELL), bool)
        figure[1:15, 3:13] = np.array([int(dot) for dot in dots]).reshape(7, 5).repeat(2, 0).repeat(2, 1)
        for colour, rgb in enumerate(_RGB):
            code = FIRST_DIGIT + digit * len(COLOURS) + colour
            paint[code] = -1
            paint[code][figure] = rgb
            holes[code] = 0

    paint[:, _border()] = 0  # whatever a cell holds, its border belongs to the background
    holes[:, _border()] = 1
    return paint, holes


def _shape_masks() -> list[NDArray[np.bool_]]:
    """The pixels [16, 16] that each of ``SHAPES`` covers."""
    y, x = np.mgrid[0:CELL, 0:CELL] + 0.5
    y, x = (y - CELL / 2) / 6, (x - CELL / 2) / 6
    radius = np.sqrt(x * x + y * y)
    turn = np.arctan2(x, -y) / (2 * np.pi) * 5
    return [
        radius < 1,  # circle
        (abs(x) < 0.9) & (abs(y) < 0.9),  # square
        (y < 0.9) & (abs(x) < (y + 1) * 0.55),  # triangle
        radius < 0.45 + 0.65 * (abs(turn % 1 - 0.5) * 2) ** 1.5,  # star
        ((abs(x) < 0.32) & (abs(y) < 1.05)) | ((abs(y) < 0.32) & (abs(x) < 1.05)),  # cross
        abs(x) + abs(y) < 1.05,  # diamond
        (radius < 1.05) & (radius > 0.6),  # ring
        ((abs(x) - 0.45) ** 2 + (y + 0.4) ** 2 < 0.3) | ((y > -0.4) & (abs(x) < 0.95 - (y + 0.4) * 0.7)),  # heart
    ]


@cache
def _background(frames: bool, grid: int) -> NDArray[np.float32]:
    """What empty cells look like: [cells, 16, 16, 3]."""
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    ground = np.full((grid * grid, CELL, CELL, 3), -1, np.float32)
    ground[..., 0] += 1 / grid * rows[:, None, None]
    ground[..., 1] += 1 / grid * columns[:, None, None]
    if frames:
        colours = np.random.default_rng(25).uniform(-1, 1, (CELLS, int(_border().sum()), 3))
        ground[:, _border()] = colours[rows % GRID * GRID + columns % GRID]
    return ground


@cache
def _border() -> NDArray[np.bool_]:
    """The outermost pixels of a cell: [16, 16]."""
    border = np.ones((CELL, CELL), bool)
    border[1:-1, 1:-1] = False
    return border


@cache
def _noise() -> NDArray[np.float32]:
    """A pool of grain to draw from, much faster than new noise for every pixel: [4096, 16, 16, 3]."""
    return _NOISE * np.random.default_rng(7).standard_normal((4096, CELL, CELL, 3), np.float32)
