"""HTTP as calls of a function: for servers that are reached by other means than a socket."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import httpx2

#: Who a request is about, for whoever decides where it goes.
CONTEXT_HEADER = "x-kvweave-context"

Pair = tuple[str, str]
#: Of an answer: its status and headers first, then its body piece by piece.
Part = tuple[int, list[Pair]] | bytes


async def respond(app: Any, verb: str, path: str, headers: list[Pair], body: bytes) -> AsyncGenerator[Part, None]:
    """What an ASGI application answers; whoever closes the generator is a client that leaves."""
    parts: asyncio.Queue[Part | None] = asyncio.Queue()
    left, sent = asyncio.Event(), False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            pairs = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in message["headers"]]
            parts.put_nowait((message["status"], pairs))
        elif message.get("body"):
            parts.put_nowait(message["body"])

    async def run() -> None:
        try:
            await app(_scope(verb, path, headers), receive, send)
        finally:
            parts.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while (part := await parts.get()) is not None:
            yield part
        await task  # raises what it raised
    finally:
        left.set()
        await asyncio.gather(task, return_exceptions=True)


def _scope(verb: str, path: str, headers: list[Pair]) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": verb,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers],
        "client": None,
        "server": ("localhost", 80),
    }


class CallTransport(httpx2.AsyncBaseTransport):
    """Sends requests by calls.

    Args:
        call: from verb, path, headers, body and a context's id ("": none) to the parts of an answer.
        failures: what it raises when whoever answers goes away.
    """

    def __init__(
        self,
        call: Callable[[str, str, list[Pair], bytes, str], AsyncGenerator[Part, None]],
        failures: tuple[type[Exception], ...] = (),
    ) -> None:
        self._call, self._failures = call, failures

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        headers, body = list(request.headers.items()), await request.aread()
        parts = self._call(request.method, request.url.path, headers, body, request.headers.get(CONTEXT_HEADER, ""))
        try:
            first = await anext(parts)
        except self._failures as error:
            raise httpx2.ReadError(type(error).__name__) from error
        assert not isinstance(first, bytes)
        status, headers = first
        return httpx2.Response(status, headers=headers, stream=_Body(parts, self._failures))


class _Body(httpx2.AsyncByteStream):
    def __init__(self, parts: AsyncGenerator[Part, None], failures: tuple[type[Exception], ...]) -> None:
        self._parts, self._failures = parts, failures

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async with aclosing(self._parts) as parts:
                async for part in parts:
                    assert isinstance(part, bytes)
                    yield part
        except self._failures as error:
            raise httpx2.ReadError(type(error).__name__) from error

    async def aclose(self) -> None:
        await self._parts.aclose()
