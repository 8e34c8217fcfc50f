"""A thread that owns the model and takes jobs in the order of arrival."""

import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from kvweave.seam.entry import attach
from kvweave.serve.engine.job import Failed, Job
from kvweave.serve.engine.proof import Proof
from kvweave.serve.engine.reply import Piece
from kvweave.serve.errors import Refusal, place_of
from kvweave.serve.metrics import Metrics

_log = logging.getLogger("kvweave.serve")


class Queue(ABC):
    """Jobs that wait for a model, and the thread that works on them.

    Args:
        model: to which kvweave is attached as long as this is there.
        rows: replies that are decoded at a time.
        memory: bytes of keys and values that they may take, and a prompt that is read.
        metrics: what is counted.
    """

    proof: Proof

    def __init__(self, model: Any, *, rows: int, memory: int, metrics: Metrics) -> None:
        self.model, self.rows, self.memory, self.metrics = model, rows, memory, metrics
        self._session = attach(model)
        self._waiting: deque[Job] = deque()
        self._awake = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="kvweave-engine", daemon=True)

    # ---------------------------------------------------------------- from other threads

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Let everybody who waits know, and end."""
        with self._awake:
            self._stopped = True
            self._awake.notify()
        if self._thread.is_alive():
            self._thread.join()
        self._session.detach()

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue."""
        with self._awake:
            if self._stopped:
                job.emit(Failed("Stopped"))
                return
            self._waiting.append(job)
            self.metrics.waiting.set(len(self._waiting))
            self._awake.notify()

    def leave(self, job: Job) -> None:
        """Nobody waits for it any more: what it holds is given back before the next token."""
        with self._awake:
            job.left = True
            self._awake.notify()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopped

    @abstractmethod
    def needed(self, job: Job) -> int:
        """Bytes that a job takes when nothing else is there."""

    # ---------------------------------------------------------------- in the thread

    @abstractmethod
    def _turn(self, job: Job | None) -> None:
        """Begin a job, if there is one for which there is room, and do what else there is to do."""

    @property
    @abstractmethod
    def _busy(self) -> bool:
        """There is something to do though no job waits."""

    @abstractmethod
    def _has_room(self, job: Job) -> bool:
        """A job can begin now."""

    @abstractmethod
    def _forget(self) -> None:
        """Drop what nobody waits for, of the jobs that have begun."""

    @abstractmethod
    def _end(self) -> Iterable[Job]:
        """Drop all jobs that have begun; returns them."""

    def _run(self) -> None:
        while self._wait():
            self._forget()
            self._turn(self._next())
        for job in {*self._waiting, *self._end()}:
            job.emit(Failed("Stopped"))
        self._waiting.clear()

    def _wait(self) -> bool:
        """Until there is something to do; False: the engine is stopped."""
        with self._awake:
            while not (self._stopped or self._busy or (self._waiting and self._has_room(self._waiting[0]))):
                self._awake.wait()
            return not self._stopped

    def _next(self) -> Job | None:
        """The first job of the queue, if there is room for it now; nobody overtakes it."""
        with self._awake:
            if any(job.left for job in self._waiting):
                self._waiting = deque(job for job in self._waiting if not job.left)
            if not self._waiting or not self._has_room(self._waiting[0]):
                return None
            return self._waiting.popleft()

    def _emit(self, job: Job, piece: Piece) -> bool:
        """Hand out what a token adds; whether the reply has ended."""
        self.metrics.tokens.inc()
        job.emit(piece)
        return bool(piece.finish)

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        """Let go of these jobs before the next token; the others go on. What was raised may quote a prompt, so only
        its class and its place are told."""
        _log.error("%d requests failed: %s", len(set(jobs)), place_of(error))
        refusal = error if isinstance(error, Refusal) else None
        for job in set(jobs):
            job.left = True
            job.emit(Failed(type(error).__name__, refusal))
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
