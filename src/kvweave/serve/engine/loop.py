"""The engine: a thread that owns the model, reads prompts one after the other, and decodes all replies together.

A turn of the loop reads at most one prompt and then gives every reply a token, so that nobody who is answered waits
longer than for one prompt. Replies whose caches agree in their counts are rows of one pool and share a forward pass;
others take one each. A reply whose cut is deferred joins the pool once it has been cut.
"""

from collections.abc import Iterable, Sequence
from time import monotonic
from typing import Any

from kvweave.seam.row_pool import RowPool, refusal
from kvweave.serve.engine.job import Begun, Job, Kept, Live
from kvweave.serve.engine.proof import prove
from kvweave.serve.engine.queue import Queue
from kvweave.serve.engine.reading import Reading, read_on
from kvweave.serve.metrics import Metrics


class Engine(Queue):
    """The model and everything that is decoded; see `Queue`.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, model: Any, tokenizer: Any, *, rows: int, memory: int, metrics: Metrics) -> None:
        super().__init__(model, rows=rows, memory=memory, metrics=metrics)
        try:
            self.proof = prove(model, tokenizer)
        except BaseException:
            self.stop()
            raise
        self._pool = RowPool(self.proof.layers, rows)
        self._together: list[Live] = []  # one for each row of the pool
        self._alone: list[Live] = []

    def needed(self, job: Job) -> int:
        return self._bytes_with(job, RowPool(0, self.rows), [])

    # ---------------------------------------------------------------- the loop

    def _turn(self, job: Job | None) -> None:
        if job is not None:
            self._begin(job)
        if self._together:
            self._step_pool()
        for live in list(self._alone):
            self._step_alone(live)
        self._count()

    @property
    def _busy(self) -> bool:
        return bool(self._together or self._alone)

    def _end(self) -> Iterable[Job]:
        found = [live.job for live in (*self._together, *self._alone)]
        self._together.clear()
        self._alone.clear()
        self._pool.clear()
        return found

    def _forget(self) -> None:
        for row in reversed(range(len(self._together))):
            if self._together[row].job.left:
                self._drop(row)
        self._alone = [live for live in self._alone if not live.job.left]

    def _has_room(self, job: Job) -> bool:
        live = len(self._together) + len(self._alone)
        if live + len(job.replies) > self.rows:
            return False
        return not live or self._bytes_with(job, self._pool, self._alone) <= self.memory

    def _begin(self, job: Job) -> None:
        """Read its prompt and take the first token of each reply."""
        started = monotonic()
        self.metrics.queue_seconds.observe(started - job.born)
        try:
            reading = job.source.read(self.model)
            whole = job.source.tokens * self.proof.token_bytes
            fresh = job.source.fresh
            self.metrics.prompt(fresh, fresh * self.proof.token_bytes, monotonic() - started)
            job.emit(Begun(whole, None if job.replies else reading))
            self._tell(job, reading)
            for reply in job.replies:
                if not self._emit(job, reply.take(reading.logits)):
                    own = reading if reply is job.replies[-1] else reading.fork()
                    self._join(Live(job, reply, own))
        except Exception as error:
            self._fail([job], error)

    def _tell(self, job: Job, reading: Reading) -> None:
        """Say what is kept of the prompt, once it has been cut."""
        if job.told or reading.cache.waits:
            return
        job.told = True
        shares = reading.shares(job.source.tokens) if job.traced else None
        if job.source.fresh == job.source.tokens:  # a question stays whole, and its context was counted before
            self.metrics.kept.inc(reading.nbytes)
        else:
            self.metrics.kept.inc(job.source.fresh * self.proof.token_bytes)
        job.emit(Kept(reading.nbytes, self._alone_because(reading), shares))

    def _alone_because(self, reading: Reading) -> str:
        """Why a reply decodes by itself; empty: as a row of the pool."""
        return self.proof.alone or refusal(self.model, reading.cache)

    def _join(self, live: Live) -> None:
        """Let a reply decode on: in the pool if it can."""
        reading = live.reading
        assert reading is not None
        if self._alone_because(reading):
            self._alone.append(live)
            return
        assert reading.position is not None  # or the proof had said so
        self._pool.admit(reading.cache, live.left, reading.position)
        live.reading = None
        self._together.append(live)

    def _step_pool(self) -> None:
        """A token for each row."""
        try:
            logits = self._pool.decode(self.model, [live.reply.last for live in self._together])
            likeliest = logits.argmax(-1).tolist()
        except Exception as error:
            self._fail([live.job for live in self._together], error)
            return
        for row in reversed(range(len(self._together))):  # a row that is dropped moves only rows behind it
            live = self._together[row]
            try:
                if self._emit(live.job, live.reply.take(logits[row], likeliest[row])):
                    self._drop(row)
            except Exception as error:
                self._fail([live.job], error)

    def _step_alone(self, live: Live) -> None:
        """A token for one reply, by a forward pass of its own."""
        assert live.reading is not None
        self._alone.remove(live)
        try:
            live.reading = read_on(self.model, live.reading.cache, [live.reply.last], live.reading.position)
            self._tell(live.job, live.reading)
            if not self._emit(live.job, live.reply.take(live.reading.logits)):
                self._join(live)
        except Exception as error:
            self._fail([live.job], error)

    def _drop(self, row: int) -> None:
        self._pool.drop(row)
        self._together[row] = self._together[-1]
        self._together.pop()

    # ---------------------------------------------------------------- bytes

    def _bytes_with(self, job: Job, pool: RowPool, alone: Sequence[Live]) -> int:
        """Bytes that a job's replies and those that are there take at most, and its prompt while it is read."""
        source, tokens = job.source, self.proof.token_bytes
        waiting = [live.job for live in alone if live.reading is not None and live.reading.cache.waits]
        rows = [row.source.slots(tokens) + row.most for row in (*waiting, *[job] * len(job.replies))]
        by_themselves = sum(_nbytes(live) + live.left * tokens for live in alone)
        whole = source.peak * (max(1, len(job.replies)) if source.defers else 1)
        return (pool.slots_with(rows) + whole) * tokens + by_themselves

    def _count(self) -> None:
        self.metrics.waiting.set(len(self._waiting))
        self.metrics.together.set(len(self._together))
        self.metrics.alone.set(len(self._alone))
        self.metrics.kv_bytes.set(self._pool.nbytes + sum(map(_nbytes, self._alone)))


def _nbytes(live: Live) -> int:
    return 0 if live.reading is None else live.reading.nbytes
