"""Servers on this machine, each a process group of its own: started, watched, and started anew where one breaks."""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import monotonic

import httpx2

from kvweave.serve.fleet.replicas import Replica, Replicas

_GUARD = Path(__file__).with_name("guard.py")
_STEADY = 60.0  # seconds after which a server that breaks is started at once
_LONGEST = 30.0  # between two starts
_log = logging.getLogger("kvweave.serve")

#: From a port to the command that serves there.
Command = Callable[[int], Sequence[str]]


class Fleet(Replicas):
    """Servers here, which are kept alive, and elsewhere.

    Args:
        servers: what starts each of them, or where it is.
        what: they are, in logs.
        restarted: called whenever one is started anew.
        patience, transport: as of `Replicas`.
    """

    def __init__(
        self,
        servers: Sequence[Command | str],
        what: str,
        *,
        patience: float = 60.0,
        restarted: Callable[[], None] = lambda: None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._what, self._restarted = what, restarted
        self._commands = [None if isinstance(server, str) else server for server in servers]
        places = [one if isinstance(one, str) else f"http://127.0.0.1:{free_port()}" for one in servers]
        super().__init__([Replica(str(n), place) for n, place in enumerate(places)], patience, transport)

    @asynccontextmanager
    async def alive(self) -> AsyncIterator[None]:
        """All are kept alive in here, and none of those on this machine afterwards."""
        tasks = [asyncio.create_task(self._keep(*pair)) for pair in zip(self.all, self._commands, strict=True)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.client.aclose()

    async def _keep(self, replica: Replica, command: Command | None) -> None:
        pause = 0.0
        while True:
            if command is None:
                await self.watch(replica)
                continue
            started = monotonic()
            try:
                await self._run(replica, command)
            except OSError as error:
                _log.error("%s %s cannot be started (%s)", self._what, replica.name, type(error).__name__)
            await self.lose(replica)
            pause = 0.0 if monotonic() - started > _STEADY else min(max(1.0, 2 * pause), _LONGEST)
            _log.error("%s %s has ended: it is started anew in %g s", self._what, replica.name, pause)
            self._restarted()
            await asyncio.sleep(pause)

    async def _run(self, replica: Replica, command: Command) -> None:
        """Until it has ended, or does not answer any more and is ended."""
        async with group(command(int(replica.url.rpartition(":")[2]))) as guard:
            watch = asyncio.create_task(self.watch(replica))
            end = asyncio.create_task(guard.wait())
            try:
                await asyncio.wait({watch, end}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                watch.cancel()
                end.cancel()


@asynccontextmanager
async def group(command: Sequence[str]) -> AsyncIterator[asyncio.subprocess.Process]:
    """A command in a process group of its own, of which nothing is left behind; what runs as long is its guard."""
    guard = await asyncio.create_subprocess_exec(
        sys.executable, str(_GUARD), *command, stdin=asyncio.subprocess.PIPE, start_new_session=True
    )
    assert guard.stdin is not None
    try:
        yield guard
    finally:
        guard.stdin.close()
        try:
            await guard.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(guard.pid, signal.SIGKILL)  # where the guard itself was killed


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
