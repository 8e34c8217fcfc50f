"""Which cell of which image each visual token stands for."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """The visual tokens of one image, row by row.

    Attributes:
        image: index among the images given; None where it cannot be told.
        tokens: their places in the prompt, ascending; the last row of cells may be shorter.
        known: the processor said so; else the grid is a guess, as near to a square as can be.
    """

    image: int | None
    tokens: list[int]
    rows: int
    columns: int
    known: bool


def grids(
    visual: Sequence[bool], images: int, shapes: Sequence[tuple[int, int, int]] | None = None, merge: int = 1
) -> list[Grid]:
    """Lay the visual tokens of a prompt out as images.

    Args:
        visual: for each token of the prompt whether it is visual.
        images: how many were given.
        shapes: the processor's `image_grid_thw`, in patches, where it gives one.
        merge: patches per token in each direction.
    Returns:
        Grids in the prompt's order. Without shapes every run of visual tokens is an image, if there are as many
        runs as images; or equally many runs, or tokens, go to each image; or no image is named at all.
    """
    places = [place for place, is_visual in enumerate(visual) if is_visual]
    if not places:
        return []
    if shapes is not None and len(shapes) == images:
        cells = [(frames * (high // merge), wide // merge) for frames, high, wide in shapes]
        if sum(rows * columns for rows, columns in cells) == len(places):
            laid, start = [], 0
            for image, (rows, columns) in enumerate(cells):
                laid.append(Grid(image, places[start : start + rows * columns], rows, columns, True))
                start += rows * columns
            return laid
    runs = _runs(places)
    if images and len(runs) % images == 0:  # tiles of one image, or its rows, may be runs of their own
        each = len(runs) // images
        pieces = [list(itertools.chain(*runs[n * each : (n + 1) * each])) for n in range(images)]
    elif images and len(places) % images == 0:
        each = len(places) // images
        pieces = [places[n * each : (n + 1) * each] for n in range(images)]
    else:
        return [_squarish(None, run) for run in runs]
    return [_squarish(image, piece) for image, piece in enumerate(pieces)]


def _runs(places: Sequence[int]) -> list[list[int]]:
    """Stretches without a gap."""
    runs = [[places[0]]]
    for before, place in itertools.pairwise(places):
        if place == before + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def _squarish(image: int | None, tokens: list[int]) -> Grid:
    columns = math.ceil(math.sqrt(len(tokens)))
    return Grid(image, tokens, math.ceil(len(tokens) / columns), columns, False)
