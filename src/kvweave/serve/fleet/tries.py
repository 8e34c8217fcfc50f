"""One request to one replica after the other, until one has answered it whole."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from time import monotonic
from typing import TypeVar

import httpx2

from kvweave.serve.errors import STOPPED, Refusal
from kvweave.serve.fleet.replicas import LostError, Replica, Replicas

Result = TypeVar("Result")

_TRIES = 3  # replicas that a request may break, or that break beside it
_AGAIN = (429, 503)  # another replica may have room


class Tries:
    """Which replica a request goes to next, and whether it does.

    Args:
        again: called whenever it goes to another one.
        key: what it is about: requests of one key go to one replica, as long as that one answers; empty: to the one
            with least to do.
        among: those that can answer it, waited for until a time as `time.monotonic` counts; None: all.
    """

    def __init__(
        self,
        replicas: Replicas,
        again: Callable[[], None],
        *,
        key: str = "",
        among: Callable[[float], Awaitable[Sequence[Replica]]] | None = None,
    ) -> None:
        self._replicas, self._again, self._key, self._among = replicas, again, key, among
        self._without: set[Replica] = set()
        self._broken = 0
        self._end = monotonic() + replicas.patience

    async def whole(self, ask: Callable[[Replica], Awaitable[Result]]) -> tuple[Result, Replica]:
        """What `ask` comes to, which raises a `Refusal` where it is refused, and by whom.

        Raises:
            Refusal: none answers, or it is at fault itself.
        """
        while True:
            replica = await self._next()
            try:
                with replica.taken():
                    return await replica.unless_lost(ask(replica)), replica
            except Refusal as refusal:
                self._refused(replica, refusal)
            except (httpx2.HTTPError, LostError) as error:
                self._broke(replica, error)

    async def pieces(self, ask: Callable[[Replica], AsyncGenerator[Result, None]]) -> AsyncGenerator[Result, None]:
        """All that `ask` yields, which goes on behind what it has yielded before; raises as `whole` does."""
        while True:
            replica = await self._next()
            try:
                with replica.taken():
                    async with aclosing(ask(replica)) as found:
                        async for piece in found:
                            yield piece
                return
            except Refusal as refusal:
                self._refused(replica, refusal)
            except (httpx2.HTTPError, LostError) as error:
                self._broke(replica, error)

    async def _next(self) -> Replica:
        among = self._replicas.all if self._among is None else await self._among(self._end)
        return await self._replicas.pick(among, self._without, self._end, self._key)

    def _broke(self, replica: Replica, error: Exception) -> None:
        """A replica broke; raises if others did, too."""
        self._without.add(replica)
        self._replicas.doubt(replica)
        if not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            self._broken += 1
            self._end = monotonic() + self._replicas.patience
        if self._broken >= _TRIES:
            raise Refusal(503, f"{_TRIES} replicas broke while they answered", retry_after=10)
        self._again()

    def _refused(self, replica: Replica, refusal: Refusal) -> None:
        """A replica does not answer this one now; raises if no other does."""
        if refusal.code == STOPPED:
            self._broke(replica, LostError())
            return
        self._without.add(replica)
        if refusal.status not in _AGAIN or self._without.issuperset(self._replicas.up):
            raise refusal
        self._again()
