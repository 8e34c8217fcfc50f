"""An answer in pieces, as server-sent events."""

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvweave.serve.body import unless_gone
from kvweave.serve.errors import Refusal

#: What follows the last event.
END = "[DONE]"


class EventStream(Response):
    """Chunks as they come; a client that leaves takes its request away.

    Args:
        chunks: JSON-able, each an event; a `Refusal` among them ends the stream.
        done: called once, when it is over.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[dict[str, Any], None], done: Callable[[], None]) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._chunks, self._done = chunks, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(Request(scope, receive), self._send(send))
        except ClientDisconnect:
            pass
        finally:
            self._done()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    await _write(send, json.dumps(chunk, ensure_ascii=False))
            await _write(send, END)
        except Refusal as refusal:
            await _write(send, json.dumps(refusal.body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _write(send: Send, text: str) -> None:
    body = f"data: {text}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})
