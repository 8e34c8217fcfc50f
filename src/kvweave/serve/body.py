"""A request's body, no more of it than is allowed, and a client that leaves."""

import asyncio
import json
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from kvweave.serve.errors import Refusal
from kvweave.serve.limits import Limits

Result = TypeVar("Result")


async def read_json(request: Request, limits: Limits) -> dict[str, Any]:
    """The body as a JSON object; its size is looked at before it is read, and while.

    Raises:
        Refusal: it is too large, too slow, or no JSON object.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a page of another site may not send unasked
        raise Refusal(415, "Content-Type is not allowed: allowed is application/json")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limits.body_bytes:
        raise _too_large(limits)
    try:
        async with asyncio.timeout(limits.body_seconds):
            raw = await _read(request, limits)
    except TimeoutError:
        raise Refusal(408, f"the body has not arrived in {limits.body_seconds:g} s") from None
    try:
        data = json.loads(raw, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise Refusal(400, "the body is no JSON") from None
    if not isinstance(data, dict):
        raise Refusal(400, "the body is not allowed: allowed is a JSON object")
    return data


async def _read(request: Request, limits: Limits) -> bytearray:
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > limits.body_bytes:
            raise _too_large(limits)
    return raw


def _too_large(limits: Limits) -> Refusal:
    return Refusal(413, f"the body is too large: allowed is at most {limits.body_bytes:,} bytes")


def _no_number(name: str) -> None:
    raise ValueError(name)


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves.

    Raises:
        ClientDisconnect: it did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
