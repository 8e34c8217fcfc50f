"""The engine that decodes nothing: its thread reads and cuts prompts, and stock engines go on from what is kept."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
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
from kvweave.serve.engine.reading import Reading
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
    """A job whose replies are decoded elsewhere."""

    job: Job
    handoff: Handoff
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
            if method.defer:
                raise ValueError(f"{name} is not allowed: vLLM goes on from what has been cut; allowed is defer=0")
            reading = text_reading(self.model, tokenizer, _LENGTH, method)
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
        return job.source.peak * self.proof.token_bytes

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
        if not behind:
            self.metrics.kept.inc(reading.nbytes)
        if not job.replies:
            return
        flight = Flight(job, self._files.take(reading.cache, keep=bool(behind)))
        shares = reading.shares(job.source.tokens) if job.traced else None
        job.emit(Kept(reading.nbytes + len(behind) * self.proof.token_bytes, "", shares))
        rest = [reply for reply in job.replies if not self._has_ended(job, reply, reading, behind)]
        self._flights[job] = flight
        flight.replies += [
            asyncio.run_coroutine_threadsafe(self._decode(flight, behind, reply), self._loop) for reply in rest
        ]
        for reply in flight.replies:
            reply.add_done_callback(lambda done: self._landed(flight))
        if not rest:
            self._landed(flight)
        if job.left:  # before it could be seen that it had begun
            self.leave(job)

    def _has_ended(self, job: Job, reply: Reply, reading: Reading, behind: Sequence[int]) -> bool:
        """Take what is known of a reply: its first token, and those that a client knows."""
        if not behind and self._emit(job, reply.take(reading.logits)):
            return True
        return any(self._emit(job, piece) for piece in reply.replay())

    # ---------------------------------------------------------------- in the loop

    async def _decode(self, flight: Flight, behind: Sequence[int], reply: Reply) -> None:
        """One reply, to its end."""
        try:
            async with aclosing(self._decoders.tokens(flight.handoff, self._files.name, behind, reply)) as tokens:
                async for token, logprob in tokens:
                    if self._emit(flight.job, reply.put(token, logprob)):
                        return
        except Exception as error:
            self._fail([flight.job], error)

    def _landed(self, flight: Flight) -> None:
        """One of its replies has ended; the file goes with the last."""
        with self._awake:
            if flight.job in self._flights and all(reply.done() for reply in flight.replies):
                del self._flights[flight.job]
                flight.replies.clear()  # whose callbacks hold it
                self._files.drop(flight.handoff)
            self._count()
            self._awake.notify()

    def _count(self) -> None:
        self.metrics.waiting.set(len(self._waiting))
        self.metrics.together.set(sum(len(flight.replies) for flight in list(self._flights.values())))
        self.metrics.kv_bytes.set(self._files.nbytes)
