"""Images from other hosts: only from those that are listed, at the address that was looked at, no redirects."""

import http.client
import ipaddress
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from urllib.parse import urlsplit

from kvweave.serve.errors import Refusal

_SECONDS = 10.0
_PORTS = {"http": 80, "https": 443}
_CHUNK = 64 << 10

#: From a host and a port to addresses.
Resolver = Callable[[str, int], Sequence[str]]


def resolve(host: str, port: int) -> list[str]:
    """Addresses of a host."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


@dataclass(frozen=True)
class Host:
    """A host that images may come from.

    Attributes:
        name: as URLs have it; port: None: that of http or https.
        address: where it is; None: it is resolved, and must be public.
    """

    name: str
    port: int | None = None
    address: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Host":
        """From HOST, HOST:PORT, HOST=ADDRESS or HOST:PORT=ADDRESS."""
        where, pinned, address = text.partition("=")
        name, _, port = where.partition(":")
        known = name and not any(letter in name for letter in "/@ *?#") and (not port or port.isdecimal())
        try:
            if not known or (pinned and not ipaddress.ip_address(address)):
                raise ValueError(text)
        except ValueError:
            raise ValueError(
                f"image host {text!r} is not allowed: allowed is HOST or HOST:PORT, either with =ADDRESS"
            ) from None
        return cls(name.lower(), int(port) if port else None, address if pinned else None)


class Fetcher:
    """Gets images from the hosts that are listed.

    Args:
        hosts: as the operator wrote them.
        resolver: for tests.
    """

    def __init__(self, hosts: Sequence[str], resolver: Resolver = resolve) -> None:
        self._hosts = [Host.parse(host) for host in hosts]
        self._resolver = resolver

    @property
    def hosts(self) -> list[str]:
        return [host.name for host in self._hosts]

    def get(self, url: str, most: int, field: str) -> bytes:
        """What lies at `url`, at most `most` bytes.

        Raises:
            Refusal: its host is not listed or not public, it redirects, is too large or too slow.
        """
        try:
            parts = urlsplit(url)
            name, port = (parts.hostname or "").lower(), parts.port
        except ValueError:
            raise Refusal(400, f"{field} is no address", field) from None
        standard = _PORTS[parts.scheme]
        found = [h for h in self._hosts if h.name == name and (h.port or standard) == (port or standard)]
        if not found or parts.username is not None or parts.password is not None:
            raise Refusal(400, f"{field} is not allowed: allowed is a host of {', '.join(self.hosts)}", field)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not path.isascii() or not path.isprintable() or " " in path:
            raise Refusal(400, f"{field} is no address", field)
        try:
            address = found[0].address or self._public(name, port or standard, field)
            return _get(parts.scheme, name, address, port or standard, path, most, field)
        except (OSError, http.client.HTTPException) as error:
            raise Refusal(400, f"{field} cannot be fetched ({type(error).__name__})", field) from None

    def _public(self, name: str, port: int, field: str) -> str:
        """The host's address, looked at before it is connected to; no name is resolved a second time."""
        addresses = self._resolver(name, port)
        if not addresses or not all(_is_public(address) for address in addresses):
            raise Refusal(400, f"{field} is not allowed: its host has an address that is not public", field)
        return addresses[0]


def _is_public(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_global and not (mapped or found).is_multicast


def _get(scheme: str, name: str, address: str, port: int, path: str, most: int, field: str) -> bytes:
    end = monotonic() + _SECONDS
    connection = http.client.HTTPConnection(name, port, timeout=_SECONDS)
    try:
        connection.sock = socket.create_connection((address, port), timeout=_SECONDS)
        if scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=name)
        connection.request("GET", path, headers={"Accept": "image/png, image/jpeg, image/webp"})
        answer = connection.getresponse()
        if answer.status != 200:  # a redirect is not followed
            raise Refusal(400, f"{field} cannot be fetched (status {answer.status})", field)
        raw = bytearray()
        while part := answer.read1(_CHUNK):
            raw += part
            if len(raw) > most:
                raise Refusal(400, f"{field} is too large: allowed are at most {most:,} bytes", field)
            if monotonic() > end:
                raise Refusal(400, f"{field} cannot be fetched in {_SECONDS:g} s", field)
        return bytes(raw)
    finally:
        connection.close()
