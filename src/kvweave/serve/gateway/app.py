"""The gateway's endpoints: those of one server, answered by several.

It looks at who asks, at how much is sent and at the field `kvweave`; all else about a request its replicas look at.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from urllib.parse import quote

import httpx2
from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.requests import Request
from starlette.responses import Response

from kvweave.serve.body import read_json, unless_gone
from kvweave.serve.calls import CONTEXT_HEADER
from kvweave.serve.endpoints import Endpoint, application
from kvweave.serve.errors import Refusal
from kvweave.serve.events import EventStream
from kvweave.serve.fleet.processes import Command, Fleet
from kvweave.serve.fleet.replicas import LostError, Replica
from kvweave.serve.fleet.tries import Tries
from kvweave.serve.gate import Gate
from kvweave.serve.gateway.forward import Call, Streamed
from kvweave.serve.gateway.holders import Holders
from kvweave.serve.gateway.metrics import GatewayMetrics
from kvweave.serve.keys import Keys
from kvweave.serve.limits import Limits
from kvweave.serve.page import page
from kvweave.serve.schema import Own, ReplyOptions, parsed


class Gateway:
    """Several servers of one model, at one address.

    Args:
        replicas: what starts each of them, or where it is.
        limits: what one of them takes.
        keys: who may ask; the replicas know the same ones.
        patience: seconds that a request waits where no replica answers.
        decoders: that the replicas hand prompts over to; they are kept alive here, for all of them.
        transport: how replicas are reached; None: over HTTP.
    """

    def __init__(
        self,
        replicas: Sequence[Command | str],
        *,
        limits: Limits,
        keys: Keys,
        patience: float = 60.0,
        decoders: Fleet | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self.limits, self.keys = limits, keys
        self.metrics = GatewayMetrics()
        self.replicas = Fleet(
            replicas, "replica", patience=patience, restarted=self.metrics.restarts.inc, transport=transport
        )
        self.decoders = decoders or Fleet([], "decoder")
        self.holders = Holders(self.replicas)
        self.gate = Gate(len(replicas) * (limits.rows + limits.queue))
        self.metrics.open.set_function(lambda: self.gate.inside)
        self.metrics.up.set_function(lambda: len(self.replicas.up))
        self.metrics.decoders.set_function(lambda: len(self.decoders.up))

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        self.keys.owner(request)
        self.gate.enter()
        streamed: EventStream | None = None
        try:
            body = await read_json(request, self.limits)
            own = parsed(Own, {"kvweave": body.get("kvweave")}).kvweave or ReplyOptions()
            call = _call(request, body, own.context or "")
            if body.get("stream") is not True:
                return await unless_gone(request, self._whole(call))
            chunks = Streamed(self.replicas, call, own, self._tries(call), self.metrics.goes_on.inc).chunks()
            first = await unless_gone(request, anext(chunks))
            streamed = EventStream(_behind(first, chunks), self.gate.leave)
            return streamed
        finally:
            if streamed is None:
                self.gate.leave()

    async def any(self, request: Request) -> Response:
        """What each replica answers alike."""
        self.keys.owner(request)
        return await self._whole(_call(request))

    async def read(self, request: Request) -> Response:
        """`POST /v1/contexts`."""
        self.keys.owner(request)
        self.gate.enter()
        try:
            call = _call(request, await read_json(request, self.limits))
            told, replica = await unless_gone(request, self._answer(call))
            self.holders.note(told.json()["id"], replica)
            return _response(told)
        finally:
            self.gate.leave()

    async def list_contexts(self, request: Request) -> Response:
        """`GET /v1/contexts`: of all replicas that answer, the one used last at the end."""
        self.keys.owner(request)
        found = [context for told in (await self._each(request)).values() for context in told.json()["data"]]
        return JSONResponse({"object": "list", "data": sorted(found, key=lambda context: context["expires"])})

    async def context(self, request: Request) -> Response:
        """`GET` and `DELETE /v1/contexts/ID`."""
        self.keys.owner(request)
        return await self._whole(_call(request, context=request.path_params["id"]))

    async def home(self, request: Request) -> Response:
        """`GET /`."""
        return page()

    async def health(self, request: Request) -> Response:
        """`GET /health`."""
        return PlainTextResponse("", 200 if self.replicas.up else 503)

    async def told(self, request: Request) -> Response:
        """`GET /metrics`."""
        self.keys.owner(request)
        found = {name: told.text for name, told in (await self._each(request)).items()}
        return Response(self.metrics.text(found), media_type="text/plain; version=0.0.4; charset=utf-8")

    # ---------------------------------------------------------------- what the replicas say

    def _tries(self, call: Call) -> Tries:
        again = self.metrics.again.inc
        if not call.context:
            return Tries(self.replicas, again)
        return Tries(self.replicas, again, among=partial(self.holders.of, call.context, call.headers))

    async def _answer(self, call: Call) -> tuple[httpx2.Response, Replica]:
        """The whole answer, and who gave it."""

        def ask(replica: Replica) -> Coroutine[Any, Any, httpx2.Response]:
            return self.replicas.ask(replica, call.verb, call.path, call.headers, call.body)

        return await self._tries(call).whole(ask)

    async def _whole(self, call: Call) -> Response:
        return _response((await self._answer(call))[0])

    async def _each(self, request: Request) -> dict[str, httpx2.Response]:
        """What all replicas that answer, answer to it, by their names."""
        call, up = _call(request), self.replicas.up

        async def one(replica: Replica) -> httpx2.Response | None:
            try:
                return await replica.unless_lost(self.replicas.ask(replica, call.verb, call.path, call.headers))
            except (httpx2.HTTPError, LostError, Refusal):
                return None

        found = zip(up, await asyncio.gather(*map(one, up)), strict=True)
        return {replica.name: told for replica, told in found if told is not None}

    # ---------------------------------------------------------------- the application

    @asynccontextmanager
    async def _life(self, app: FastAPI) -> AsyncIterator[None]:
        async with self.decoders.alive(), self.replicas.alive():
            yield

    def application(self) -> FastAPI:
        """The ASGI application."""
        routes: list[tuple[str, str, Endpoint]] = [
            ("GET", "/", self.home),
            ("POST", "/v1/chat/completions", self.chat),
            ("POST", "/v1/contexts", self.read),
            ("GET", "/v1/contexts", self.list_contexts),
            ("GET", "/v1/contexts/{id}", self.context),
            ("DELETE", "/v1/contexts/{id}", self.context),
            ("GET", "/v1/models", self.any),
            ("GET", "/v1/models/{name:path}", self.any),
            ("GET", "/health", self.health),
            ("GET", "/metrics", self.told),
        ]
        return application(routes, counted=self.metrics.requests, keys=self.keys, life=self._life)


def _call(request: Request, body: dict[str, Any] | None = None, context: str = "") -> Call:
    """What is passed on of a request: of headers, who asks."""
    who = request.headers.get("authorization")
    headers = {} if who is None else {"Authorization": who}
    if context.isascii() and context.isprintable():
        headers[CONTEXT_HEADER] = context
    return Call(request.method, quote(request.url.path), headers, body, context)


def _response(told: httpx2.Response) -> Response:
    return Response(told.content, told.status_code, media_type=told.headers.get("content-type"))


async def _behind(
    first: dict[str, Any], rest: AsyncGenerator[dict[str, Any], None]
) -> AsyncGenerator[dict[str, Any], None]:
    try:
        yield first
        async for chunk in rest:
            yield chunk
    finally:
        await rest.aclose()
