"""The page at `/`: one file, whose own script and style are all that a browser lets it run."""

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import HTMLResponse, Response

_PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def _hashed(tag: str) -> str:
    """What a content security policy calls the page's one element of this kind."""
    (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", _PAGE, re.DOTALL)
    return "'sha256-" + base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode() + "'"


_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src {_hashed('script')}; style-src {_hashed('style')}; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def page() -> Response:
    """The page."""
    return HTMLResponse(_PAGE, headers=_HEADERS)
