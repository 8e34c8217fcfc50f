"""What is asked of replicas, and a stream that outlives the one that began it.

What a client has not seen yet is asked for again elsewhere. A stream that has begun goes on elsewhere: the replica
there is told which tokens are known and decodes them as if it had drawn them; what the client has already is left
out. So a greedy reply, or one with a seed, ends as it would have.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from kvweave.serve.fleet.replicas import Replica, Replicas
from kvweave.serve.fleet.tries import Tries
from kvweave.serve.schema import ReplyOptions


@dataclass(frozen=True)
class Call:
    """What a client asks.

    Attributes:
        headers: that say who asks.
        body: JSON-able; None: there is none.
        context: that it is about; empty: any replica will do.
    """

    verb: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any] | None = None
    context: str = ""

    def knowing(self, replies: list[list[int]]) -> "Call":
        """The same, of whose replies some tokens are known."""
        assert self.body is not None
        own = (self.body.get("kvweave") or {}) | {"return_token_ids": True, "known_token_ids": replies}
        return Call(self.verb, self.path, self.headers, self.body | {"kvweave": own}, self.context)


@dataclass
class Streamed:
    """A chat request whose answer comes in pieces.

    Attributes:
        own: what its body says of its replies.
        tries: where it goes.
        goes_on: called whenever one replica goes on with what another began.
        head: of its chunks, which must not change where another replica goes on.
    """

    replicas: Replicas
    call: Call
    own: ReplyOptions
    tries: Tries
    goes_on: Callable[[], None]
    head: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._known: list[list[int]] = []

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """What the client is to see.

        Raises:
            Refusal: it is refused, or came to nothing.
        """
        async with aclosing(self.tries.pieces(self._of)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _of(self, replica: Replica) -> AsyncGenerator[dict[str, Any], None]:
        """What one replica adds."""
        if self._known:
            self.goes_on()
        seen, none = [0 for _ in self._known], list[int]()
        call = self.call.knowing(
            [max(two, key=len) for two in zip_longest(self._known, self.own.known_token_ids, fillvalue=none)]
        )
        async with aclosing(self.replicas.events(replica, call.path, call.headers, call.body)) as events:
            async for chunk in events:
                if not self.head:
                    self.head = {name: chunk[name] for name in ("id", "created")}
                if all(self._is_new(choice, seen) for choice in chunk["choices"]):
                    yield chunk | self.head

    def _is_new(self, choice: dict[str, Any], seen: list[int]) -> bool:
        """A choice's token has not been seen before; it is noted, and goes out as it was asked for."""
        index, tokens = choice["index"], choice["token_ids"]
        while len(self._known) <= index:
            self._known.append([])
        seen += [0] * (len(self._known) - len(seen))
        seen[index] += len(tokens)
        if seen[index] <= len(self._known[index]):
            return False
        self._known[index] += tokens
        if not self.own.return_token_ids:
            del choice["token_ids"]
        plain = choice["delta"] or choice["finish_reason"] or choice["logprobs"]
        return bool(plain or self.own.return_token_ids)
