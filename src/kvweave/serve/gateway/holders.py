"""Which replica holds which context."""

from collections import OrderedDict
from collections.abc import Sequence
from urllib.parse import quote

import httpx2

from kvweave.serve.errors import Refusal
from kvweave.serve.fleet.replicas import LostError, Replica, Replicas

_MOST = 100_000  # that are remembered


class Holders:
    """What is known of it; of others all replicas are asked."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._known: OrderedDict[str, Replica] = OrderedDict()

    def note(self, context: str, replica: Replica) -> None:
        """Remember where a context is."""
        self._known[context] = replica
        while len(self._known) > _MOST:
            self._known.popitem(last=False)

    async def of(self, context: str, headers: dict[str, str], end: float) -> Sequence[Replica]:
        """The replica that has this context; all, where none does, so that one of them says so.

        One that does not answer may be the one: it is waited for, and where it has its contexts on disk it has them
        again.

        Args:
            headers: that say who asks.
            end: until when it is waited for, as `time.monotonic` counts.
        """
        replicas = self._replicas
        while context not in self._known:
            for replica in replicas.up:
                if await self._has(replica, context, headers):
                    self.note(context, replica)
                    break
            else:
                if len(replicas.up) == len(replicas.all) or not await replicas.change(end):
                    return replicas.all
        self._known.move_to_end(context)
        return [self._known[context]]

    async def _has(self, replica: Replica, context: str, headers: dict[str, str]) -> bool:
        path = f"/v1/contexts/{quote(context, safe='')}"
        try:
            await replica.unless_lost(self._replicas.ask(replica, "GET", path, headers))
        except (httpx2.HTTPError, LostError, Refusal):
            return False
        return True
