"""Pictures from files that somebody else may have made."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 100_000_000  # 300 MB once they are decoded


class PictureError(ValueError):
    """A file that is no picture, or one too large; the message says which, and what is allowed."""


def open_picture(path: str | Path) -> "Image":
    """A picture in RGB, upright; its size is read, and refused, before it is decoded.

    Raises:
        PictureError: it is not there, cannot be read or has too many pixels.
    """
    from PIL import Image, ImageOps

    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise PictureError(f"{str(path)!r} {what}: allowed is an image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit holds
            opened = Image.open(path)
        with opened as image:
            if image.width * image.height > MOST_PIXELS:
                raise PictureError(
                    f"{str(path)!r} has {image.width} x {image.height} pixels: allowed is at most {MOST_PIXELS:,}"
                )
            return ImageOps.exif_transpose(image).convert("RGB")
    except PictureError:
        raise
    except Image.DecompressionBombError:
        raise PictureError(f"{str(path)!r} has too many pixels: allowed is at most {MOST_PIXELS:,}") from None
    except Exception as error:  # whatever a damaged file makes a decoder raise
        raise PictureError(
            f"{str(path)!r} cannot be read as an image ({type(error).__name__}): "
            "allowed is what Pillow opens, such as PNG, JPEG or WebP"
        ) from error
