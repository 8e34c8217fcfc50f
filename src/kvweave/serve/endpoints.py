"""What all endpoints have in common: they are counted, and every fault is answered in OpenAI's form."""

import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI
from prometheus_client import Counter
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from kvweave import __version__
from kvweave.serve.errors import Refusal, place_of
from kvweave.serve.keys import Keys

_LOCAL = ("localhost", "127.0.0.1", "[::1]")
_HOST = re.compile(r"([\w.-]+|\[[0-9a-fA-F:.]+\])(?::\d+)?", re.ASCII)
_log = logging.getLogger("kvweave.serve")

Endpoint = Callable[[Request], Awaitable[Response]]


def application(routes: Sequence[tuple[str, str, Endpoint]], *, counted: Counter, keys: Keys, life: Any) -> FastAPI:
    """The ASGI application.

    Args:
        routes: verb, path and what answers.
        counted: requests, by path and status.
        keys: who may ask; none: this machine.
        life: from start to end, as `lifespan` of FastAPI.
    """
    app = FastAPI(title="kvweave", version=__version__, lifespan=life, openapi_url=None, redirect_slashes=False)
    for verb, path, answer in routes:
        app.add_api_route(path, _endpoint(path, answer, counted, keys), methods=[verb], response_model=None)
    app.add_exception_handler(HTTPException, _not_here)
    return app


def _endpoint(path: str, answer: Endpoint, counted: Counter, keys: Keys) -> Any:
    async def endpoint(request: Request) -> Response:
        try:
            _check_host(request, keys)
            response = await answer(request)
        except Refusal as refusal:
            response = refusal.response
        except ClientDisconnect:
            response = Response(status_code=499)
        except Exception as error:
            _log.error("%s: %s", path, place_of(error))
            response = Refusal(500, "the server failed").response
        counted.labels(path, str(response.status_code)).inc()
        return response

    return endpoint


def _check_host(request: Request, keys: Keys) -> None:
    """Without keys, a page of another site must not reach this machine by a name that was made to lead here.

    The header itself is looked at: of one that is no host, `request.url` would say where the server listens.
    """
    host = request.headers.get("host")  # no browser leaves it out
    if keys or host is None:
        return
    found = _HOST.fullmatch(host)
    if found is None or found[1].lower() not in _LOCAL:
        raise Refusal(403, f"Host is not allowed without API keys: allowed is one of {', '.join(_LOCAL)}")


async def _not_here(request: Request, error: Exception) -> Response:
    """Paths that there are none of, in OpenAI's form."""
    status = getattr(error, "status_code", 500)
    return Refusal(status, f"{request.method} {request.url.path} is not here").response
