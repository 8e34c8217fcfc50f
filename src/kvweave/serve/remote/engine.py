"""The engine whose thread reads and cuts prompts; stock engines decode on from what is kept.

Where a method waits for the first tokens of a reply before it cuts, they are decoded here.
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from kvweave.methods.base import Method
from kvweave.serve.engine.job import Begun, Job, Kept
from kvweave.serve.engine.proof import Proof, text_reading
from kvweave.serve.engine.queue import Queue
from kvweave.serve.engine.reading import Reading, read_on
from kvweave.serve.engine.reply import Reply
from kvweave.serve.metrics import Metrics
from kvweave.serve.remote.decoders import Decoders
from kvweave.serve.remote.files import Handoff, Handoffs

_LENGTH = 96  # tokens of the text that each method is tried on


@dataclass(frozen=True)
class Remote:
    """Who decodes.

    Attributes:
        decoders: URLs of vLLM servers.
        root: the folder that their connector knows; compressed prompts are put there, in a folder of this process.
        key: that they ask for; empty: none.
    """

    decoders: Sequence[str]
    root: Path
    key: str = ""


@dataclass(eq=False)
class Flight:
    """A job whose replies are decoded elsewhere.

    Attributes:
        handoffs: one for all its replies, or one for each where a deferred cut goes by the reply's own first tokens.
    """

    job: Job
    handoffs: list[Handoff] = field(default_factory=list)
    replies: list[Future[None]] = field(default_factory=list)


class RemoteEngine(Queue):
    """See the module, and `Queue`.

    Args:
        tokenizer: the model's.
        methods: that requests may name, by their names.
        remote: who decodes.
    Raises:
        ValueError: a method that stock engines cannot go on from.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        methods: Mapping[str, Method],
        remote: Remote,
        *,
        rows: int,
        memory: int,
        metrics: Metrics,
    ) -> None:
        super().__init__(model, rows=rows, memory=memory, metrics=metrics)
        self._files = Handoffs(remote.root, model)
        self._decoders = Decoders(remote.decoders, remote.key, again=metrics.again.inc)
        self._flights: dict[Job, Flight] = {}
        self._answered = False
        try:
            self.proof = self._prove(tokenizer, methods)
        except BaseException:
            super().stop()
            self._files.close()
            raise

    def _prove(self, tokenizer: Any, methods: Mapping[str, Method]) -> Proof:
        """Try each method on a text, as far as its file."""
        for name, method in methods.items():
            reading = text_reading(self.model, tokenizer, _LENGTH, method)
            while reading.cache.waits:
                reading = read_on(self.model, reading.cache, [int(reading.logits.argmax())], reading.position)
            try:
                self._files.drop(self._files.take(reading.cache))
            except ValueError as error:
                raise ValueError(f"{name} is not allowed: vLLM cannot go on from it ({error})") from error
        return Proof.of(text_reading(self.model, tokenizer, _LENGTH), "")

    # ---------------------------------------------------------------- from other threads

    def start(self) -> None:
        """In the thread of the loop that asks the decoders."""
        self._loop = asyncio.get_running_loop()
        self._stack = AsyncExitStack()
        self._entered = self._loop.create_task(self._stack.enter_async_context(self._decoders.alive()))
        super().start()

    def stop(self) -> None:
        super().stop()
        asyncio.run_coroutine_threadsafe(self._stack.aclose(), self._loop).result()
        self._files.close()

    def leave(self, job: Job) -> None:
        super().leave(job)
        flight = self._flights.get(job)
        if flight is not None:
            for reply in flight.replies:
                reply.cancel()

    @property
    def alive(self) -> bool:
        """Once a decoder has answered; where none does any more, requests wait for one."""
        self._answered = self._answered or bool(self._decoders.up)
        return super().alive and self._answered

    def needed(self, job: Job) -> int:
        forks = 2 if job.source.defers and len(job.replies) > 1 else 1
        return job.source.peak * self.proof.token_bytes * forks

    # ---------------------------------------------------------------- in the thread

    @property
    def _busy(self) -> bool:
        return False

    def _has_room(self, job: Job) -> bool:
        flights = list(self._flights.values())
        live = sum(len(flight.replies) for flight in flights)
        if live + len(job.replies) > self.rows:
            return False
        return not live or self.needed(job) + self._files.nbytes <= self.memory

    def _forget(self) -> None:
        """`leave` does."""

    def _end(self) -> Iterable[Job]:
        found = list(self._flights.values())
        for flight in found:
            self.leave(flight.job)
        return [flight.job for flight in found]

    def _turn(self, job: Job | None) -> None:
        if job is not None:
            started = monotonic()
            self.metrics.queue_seconds.observe(started - job.born)
            try:
                self._begin(job, started)
            except Exception as error:
                self._fail([job], error)
        self._count()

    def _begin(self, job: Job, started: float) -> None:
        """Read its prompt, put what is kept where the decoders find it, and let them go on."""
        reading, behind = job.source.split(self.model)
        read = 0 if behind else job.source.tokens
        self.metrics.prompt(read, read * self.proof.token_bytes, monotonic() - started)
        job.emit(Begun(job.source.tokens * self.proof.token_bytes, None if job.replies else reading))
        self._tell(job, reading, behind)
        flight = Flight(job)
        try:
            going = list(self._going_on(flight, reading, behind))
        except BaseException:
            self._drop(flight)
            raise
        self._flights[job] = flight
        flight.replies += [
            asyncio.run_coroutine_threadsafe(self._decode(flight, handoff, behind, reply, held), self._loop)
            for reply, handoff, held in going
        ]
        for reply in flight.replies:
            reply.add_done_callback(lambda done: self._landed(flight))
        if not going:
            self._landed(flight)
        if job.left:  # before it could be seen that it had begun
            self.leave(job)

    def _tell(self, job: Job, reading: Reading, behind: Sequence[int]) -> None:
        """Say what is kept of the prompt, once it has been cut."""
        if job.told or reading.cache.waits:
            return
        job.told = True
        if not behind:
            self.metrics.kept.inc(reading.nbytes)
        shares = reading.shares(job.source.tokens) if job.traced else None
        job.emit(Kept(reading.nbytes + len(behind) * self.proof.token_bytes, "", shares))

    def _going_on(
        self, flight: Flight, reading: Reading, behind: Sequence[int]
    ) -> Iterator[tuple[Reply, Handoff, int]]:
        """Replies that go on elsewhere, what from, and how many of their tokens that holds."""
        replies, deferred = flight.job.replies, reading.cache.waits
        for reply in replies:
            own = reading.fork() if deferred and reply is not replies[-1] else reading
            if self._until_cut(flight.job, reply, own, behind):
                held = len(reply.tokens) - 1 if deferred else 0  # the last one has not been read
                if deferred or not flight.handoffs:
                    flight.handoffs.append(self._files.take(own.cache, keep=bool(behind)))
                if not any(self._emit(flight.job, piece) for piece in reply.replay()):
                    yield reply, flight.handoffs[-1], held

    def _until_cut(self, job: Job, reply: Reply, reading: Reading, behind: Sequence[int]) -> bool:
        """Take a reply's first token, and those that a deferred cut waits for; whether the reply goes on.

        A question, `behind` a context, has not been read: all of its reply's tokens are drawn elsewhere.
        """
        if behind:
            return True
        goes_on = not self._emit(job, reply.take(reading.logits))
        while goes_on and not job.left and reading.cache.waits:
            reading = read_on(self.model, reading.cache, [reply.last], reading.position)
            self._tell(job, reading, behind)
            goes_on = not self._emit(job, reply.take(reading.logits))
        return goes_on and not job.left

    def _drop(self, flight: Flight) -> None:
        """What its replies went on from is not used any more."""
        for handoff in flight.handoffs:
            self._files.drop(handoff)
        flight.handoffs.clear()

    # ---------------------------------------------------------------- in the loop

    async def _decode(self, flight: Flight, handoff: Handoff, behind: Sequence[int], reply: Reply, held: int) -> None:
        """One reply, to its end."""
        found = self._decoders.tokens(handoff, self._files.name, behind, reply, held)
        try:
            async with aclosing(found) as tokens:
                async for token, logprob in tokens:
                    if self._emit(flight.job, reply.put(token, logprob)):
                        return
        except Exception as error:
            self._fail([flight.job], error)

    def _landed(self, flight: Flight) -> None:
        """One of its replies has ended; the files go with the last."""
        with self._awake:
            if flight.job in self._flights and all(reply.done() for reply in flight.replies):
                del self._flights[flight.job]
                flight.replies.clear()  # whose callbacks hold it
                self._drop(flight)
            self._count()
            self._awake.notify()

    def _count(self) -> None:
        self.metrics.waiting.set(len(self._waiting))
        self.metrics.together.set(sum(len(flight.replies) for flight in list(self._flights.values())))
        self.metrics.kv_bytes.set(self._files.nbytes)
