"""Images of a request: everything about one is looked at before it is decoded."""

import base64
import binascii
import io
import re
import warnings
from typing import TYPE_CHECKING

from kvweave.serve.errors import Refusal
from kvweave.serve.fetch import Fetcher
from kvweave.serve.limits import Limits

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP")
_DATA = re.compile(r"data:image/(png|jpeg|jpg|webp);base64,", re.IGNORECASE)


class Album:
    """The images of one request, as they come.

    Args:
        limits: of each and of all together.
        fetcher: for addresses; None: they are refused.
    """

    def __init__(self, limits: Limits, fetcher: Fetcher | None) -> None:
        self.limits, self._fetcher = limits, fetcher
        self._pixels = 0

    def add(self, url: str, field: str) -> "Image":
        """The image of a data URL, or of an address that may be fetched, in RGB.

        Raises:
            Refusal: it is none, or too large.
        """
        return self._decoded(self._raw(url, field), field)

    def _raw(self, url: str, field: str) -> bytes:
        most = self.limits.image_bytes
        start = _DATA.match(url)
        if start is None:
            if self._fetcher is not None and url[:8].lower().startswith(("http://", "https://")):
                return self._fetcher.get(url, most, field)
            allowed = "a data: URL of a PNG, JPEG or WebP in base64"
            if self._fetcher is not None:
                allowed += f", or an address of {', '.join(self._fetcher.hosts)}"
            raise Refusal(400, f"{field} is not allowed: allowed is {allowed}", field)
        if (len(url) - start.end()) * 3 // 4 > most + 2:
            raise Refusal(400, f"{field} is too large: allowed are at most {most:,} bytes", field)
        try:
            return base64.b64decode(url[start.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise Refusal(400, f"{field} is no base64", field) from None

    def _decoded(self, raw: bytes, field: str) -> "Image":
        from PIL import Image, ImageOps

        most, together = self.limits.image_pixels, self.limits.pixels
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit holds
                opened = Image.open(io.BytesIO(raw), formats=FORMATS)  # reads the header alone
        except Image.DecompressionBombError:
            raise Refusal(400, f"{field} has too many pixels: allowed are at most {most:,}", field) from None
        except Exception:  # whatever a file that is none makes a decoder raise
            raise Refusal(400, f"{field} is not allowed: allowed are {', '.join(FORMATS)}", field) from None
        with opened as image:
            size = image.width * image.height
            if size > most:
                raise Refusal(
                    400,
                    f"{field} has {image.width} x {image.height} pixels: allowed are at most {most:,}",
                    field,
                )
            self._pixels += size
            if self._pixels > together:
                raise Refusal(400, f"{field}: the images have more than {together:,} pixels together", field)
            try:
                return ImageOps.exif_transpose(image).convert("RGB")
            except Exception as error:  # a damaged file
                raise Refusal(400, f"{field} cannot be decoded ({type(error).__name__})", field) from None
