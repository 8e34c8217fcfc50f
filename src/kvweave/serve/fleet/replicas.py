"""Which servers there are, which of them answer, and which one is next."""

import asyncio
import hashlib
import json
import random
from collections.abc import AsyncGenerator, Awaitable, Collection, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any, TypeVar

import httpx2

from kvweave.serve.errors import Refusal
from kvweave.serve.events import END

Result = TypeVar("Result")

_PAUSE = 0.5  # seconds between two looks at a replica
_MISSES = 4  # looks after which one that does not answer is given up
_TIMEOUT = httpx2.Timeout(5.0, read=None, write=60.0, pool=None)


class LostError(Exception):
    """A replica went away while it was being asked."""


class Replica:
    """A server that answers as all others do.

    Attributes:
        name: for people and metrics.
        url: where it is.
        inside: requests that it is answering.
        up: it answers.
    """

    def __init__(self, name: str, url: str = "") -> None:
        self.name, self.url = name, url.rstrip("/")
        self.inside, self.up = 0, False
        self._waits: set[asyncio.Timeout] = set()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """A request is inside."""
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def lost(self) -> None:
        """It does not answer: whoever waits for it need not."""
        self.up = False
        waits, self._waits = self._waits, set()  # each ends once
        for wait in waits:
            wait.reschedule(asyncio.get_running_loop().time())

    async def unless_lost(self, work: Awaitable[Result]) -> Result:
        """What `work`, which waits for this replica, comes to.

        Raises:
            LostError: the replica went away.
        """
        try:
            async with asyncio.timeout(None) as wait:
                self._waits.add(wait)
                return await work
        except TimeoutError:
            raise LostError from None
        finally:
            self._waits.discard(wait)


class Replicas:
    """All of them.

    Args:
        replicas: where they are, or will be.
        patience: seconds that a request waits for one that answers.
        transport: how they are reached; None: over HTTP.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        patience: float = 60.0,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self.all, self.patience = list(replicas), patience
        self.client = httpx2.AsyncClient(
            timeout=_TIMEOUT,
            limits=httpx2.Limits(max_connections=None),
            trust_env=False,
            follow_redirects=False,
            transport=transport,
        )
        self._changed = asyncio.Condition()

    @property
    def up(self) -> list[Replica]:
        """Those that answer."""
        return [replica for replica in self.all if replica.up]

    async def watch(self, replica: Replica) -> None:
        """Until it has answered and does not any more."""
        answered, misses = False, 0
        while misses < _MISSES:
            if await self._answers(replica):
                answered, misses = True, 0
                await self._note(replica, True)
            else:
                misses += answered
            await asyncio.sleep(_PAUSE)
        await self._note(replica, False)

    async def lose(self, replica: Replica) -> None:
        """It does not answer."""
        await self._note(replica, False)

    def doubt(self, replica: Replica) -> None:
        """It broke for somebody: it is asked for nothing new until it has been looked at."""
        replica.up = False

    async def _note(self, replica: Replica, up: bool) -> None:
        if not up:
            replica.lost()
        async with self._changed:
            replica.up = up
            self._changed.notify_all()

    async def _answers(self, replica: Replica) -> bool:
        try:
            told = await self.client.get(f"{replica.url}/health", timeout=5.0)
        except httpx2.HTTPError:
            return False
        return told.status_code == 200

    # ---------------------------------------------------------------- which one is next

    async def pick(
        self, among: Sequence[Replica], without: Collection[Replica], end: float, key: str = ""
    ) -> Replica:
        """One of them; one of `without` only where no other answers.

        Args:
            end: until when it is waited for, as `time.monotonic` counts.
            key: the same one for each key, while it answers; empty: the one with least to do.
        Raises:
            Refusal: none answers.
        """
        while True:
            up = [replica for replica in among if replica.up]
            fresh = [replica for replica in up if replica not in without] or up
            if fresh and key:  # rendezvous hashing
                return max(fresh, key=lambda replica: hashlib.sha256(f"{key} {replica.name}".encode()).digest())
            if fresh:
                return min(fresh, key=lambda replica: (replica.inside, random.random()))
            if not await self.change(end):
                raise Refusal(503, "no replica answers: try again later", retry_after=10)

    async def change(self, end: float) -> bool:
        """Until another replica answers, or one does no longer; False: nothing changed until `end`."""
        try:
            async with asyncio.timeout(max(0.0, end - monotonic())), self._changed:
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    # ---------------------------------------------------------------- what one of them says

    async def ask(
        self, replica: Replica, verb: str, path: str, headers: dict[str, str], body: Any = None
    ) -> httpx2.Response:
        """Its whole answer.

        Raises:
            Refusal: it refuses.
        """
        told = await self.client.request(verb, replica.url + path, headers=headers, json=body)
        if told.status_code >= 400:
            raise _refusal(told)
        return told

    async def events(
        self, replica: Replica, path: str, headers: dict[str, str], body: Any
    ) -> AsyncGenerator[dict[str, Any], None]:
        """What it answers in pieces.

        Raises:
            Refusal: it refuses, or fails on the way.
            LostError: it went away before the end.
        """
        request = self.client.build_request("POST", replica.url + path, headers=headers, json=body)
        told = await replica.unless_lost(self.client.send(request, stream=True))
        try:
            if told.status_code != 200:
                await replica.unless_lost(told.aread())
                raise _refusal(told)
            lines = told.aiter_lines()
            while (line := await replica.unless_lost(anext(lines, None))) is not None:
                text = line.removeprefix("data: ")
                if text == END:
                    return
                if text:
                    event = json.loads(text)
                    if "error" in event:
                        raise _worded(event, 500)
                    yield event
            raise LostError
        finally:
            await told.aclose()


def _refusal(told: httpx2.Response) -> Refusal:
    after = told.headers.get("retry-after", "")
    try:
        body = told.json()
    except ValueError:
        body = {}
    return _worded(body, told.status_code, int(after) if after.isdecimal() else None)


def _worded(body: Any, status: int, retry_after: int | None = None) -> Refusal:
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return Refusal(502, f"a replica answered with status {status}")
    return Refusal(
        status, str(error.get("message")), error.get("param"), code=error.get("code"), retry_after=retry_after
    )
