"""Who asks: API keys, and the owners that they stand for."""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.requests import Request

from kvweave.serve.errors import Refusal

#: Who asks where no keys are set.
ANYBODY = "anybody"


class Keys:
    """The keys that open the server; none: it is open.

    Args:
        keys: of at least 16 characters each.
    """

    def __init__(self, keys: Sequence[str] = ()) -> None:
        for key in keys:
            if len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError("an API key is not allowed: allowed are 16 or more printable characters, no space")
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, request: Request) -> str:
        """Whose request it is: a name that does not tell the key.

        All keys are compared whatever is found, in a time that does not depend on them.
        """
        if not self._digests:
            return ANYBODY
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        digest = _digest(given.strip())
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(found):
            raise Refusal(
                401, "no API key that is known: allowed is Authorization: Bearer KEY", code="invalid_api_key"
            )
        return hashlib.sha256(b"kvweave owner" + digest).hexdigest()[:32]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
