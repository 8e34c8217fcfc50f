"""Computes a plan's cells, in this process or in several, and resumes where it was interrupted."""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from kvweave import models
from kvweave.evals import store
from kvweave.evals.answering import Answer, Batch, answer, prefill, prepare
from kvweave.evals.metrics import METRICS
from kvweave.evals.plan import FULL, Cell, Evaluation
from kvweave.evals.prefill import Prefill
from kvweave.evals.tasks import Example
from kvweave.methods import Method
from kvweave.ops.budget import entries

_SHARED = 2**31  # bytes of prefills that a worker keeps for the next methods

Result = dict[str, Any]
#: Hears of a cell that is finished: its result, how many are, how many there are, and whether it was read from disk.
Progress = Callable[[Result, int, int, bool], None]


def run(
    evaluation: Evaluation,
    out: Path,
    *,
    batch: int = 50,
    workers: int = 2,
    device: str = "auto",
    command: str = "",
    progress: Progress | None = None,
) -> list[Result]:
    """All cells' results, in the order of `evaluation.cells()`.

    A cell whose file is in `out` is read and not computed again, unless some of its samples failed.

    Args:
        out: the folder of this evaluation, made if it is not there.
        batch: samples that are answered together.
        workers: processes, of one thread each; 1: this process.
        device: "auto": CUDA where there is one.
        command: goes into the result files.

    Raises:
        ValueError: an option that is not allowed, or a folder that holds results of other options.
    """
    for name, value in (("batch", batch), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name}={value} is not allowed: allowed is an int >= 1")
    device = models.pick_device(device)
    evaluation.claim(out)
    cells = evaluation.cells()
    results = {n: done for n, cell in enumerate(cells) if (done := finished(cell, out)) is not None}
    for count, result in enumerate(results.values(), 1):
        if progress:
            progress(result, count, len(cells), True)
    missing = [n for n in range(len(cells)) if n not in results]
    about = {"command": command, "batch": batch, "cpu": store.cpu(), "device": device, "versions": store.versions()}
    worker = Worker(evaluation, out, batch, device, about)
    for n, result in _computed(worker, cells, missing, min(workers, len(missing))):
        results[n] = result
        if progress:
            progress(result, len(results), len(cells), False)
    return [results[n] for n in range(len(cells))]


def finished(cell: Cell, out: Path) -> Result | None:
    """The result of a cell that was computed before, with no sample left to try again."""
    path = cell.path(out)
    if not path.exists():
        return None
    result: Result = store.read_json(path)
    if not isinstance(result, dict) or result.get("cell") != cell.key:
        raise ValueError(f"{path} holds another cell's result; delete it, and it is made again")
    return None if result["failed"] else result


def _computed(
    worker: "Worker", cells: Sequence[Cell], numbers: Sequence[int], workers: int
) -> Iterator[tuple[int, Result]]:
    if workers <= 1:
        for n in numbers:
            yield n, worker(cells[n])
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy PyTorch's threads half alive
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(worker,))
    try:
        futures = {pool.submit(_compute, cells[n]): n for n in numbers}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process was killed, perhaps for want of memory: finished cells are kept; "
            "run again with a smaller batch or fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker: "Worker"  # of a worker process


def _begin(worker: "Worker") -> None:
    global _worker
    _worker = worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and lets the cells at work finish
    torch.set_num_threads(1)


def _compute(cell: Cell) -> Result:
    return _worker(cell)


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """transformers' bars would be drawn through ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class Worker:
    """Computes cells one after the other; loads the model, reads a task's prompts, and prefills them, once."""

    def __init__(self, evaluation: Evaluation, out: Path, batch: int, device: str, about: dict[str, Any]) -> None:
        self.model, self.dtype, self.device = evaluation.model, evaluation.dtype, device
        self.out, self.batch, self.about = out, batch, about
        self._loaded: tuple[Any, Any] | None = None
        self._read: tuple[Any, list[Sequence[Example]], dict[int, Batch]] | None = None
        self._prefills: dict[int, Prefill] = {}

    def __call__(self, cell: Cell) -> Result:
        """The cell's result, written to its file."""
        start = time.perf_counter()
        batches, prepared = self._examples(cell)
        samples, failed = [], []
        for n, examples in enumerate(batches):
            for example, said in zip(examples, self._answers(cell, n, examples, prepared), strict=True):
                if isinstance(said, str):
                    failed.append({"id": example.id, "error": said})
                else:
                    samples.append(_scored(cell.task.metrics, example, said))
        result = {
            "cell": cell.key,
            "method": cell.method.to_dict(),
            "metrics": list(cell.task.metrics),
            "samples": samples,
            "failed": failed,
            **_measured(cell, samples),
            "seconds": round(time.perf_counter() - start, 3),
            **self.about,
        }
        store.write_json(cell.path(self.out), result)
        return result

    def _model(self) -> tuple[Any, Any]:
        if self._loaded is None:
            with _no_loading_bars():
                self._loaded = models.load(self.model, self.dtype, self.device)
            if not models.reads_images(self._loaded[1]):
                raise ValueError(f"model={self.model!r} reads text only: allowed is a model that reads images")
        return self._loaded

    def _examples(self, cell: Cell) -> tuple[list[Sequence[Example]], dict[int, Batch]]:
        """The cell's samples in batches, and the batches that have been read; kept for the next cell."""
        key = cell.protocol, cell.task, cell.seed
        if self._read is None or self._read[0] != key:
            examples = cell.task.examples(cell.seed)
            batches = [examples[at : at + self.batch] for at in range(0, len(examples), self.batch)]
            self._read = key, batches, {}
            self._prefills.clear()
        return self._read[1:]

    def _answers(
        self, cell: Cell, n: int, examples: Sequence[Example], prepared: dict[int, Batch]
    ) -> list[Answer | str]:
        """An answer, or the error in its place, for each sample: one that fails does not take others along."""
        model, processor = self._model()
        try:
            if n not in prepared:
                prepared[n] = prepare(processor, examples, cell.protocol)
            shared = self._prefill(cell, n, prepared[n])
            return [*answer(model, processor, cell.method, prepared[n], cell.task.max_new_tokens, shared)]
        except Exception as error:
            if len(examples) == 1:
                return [f"{type(error).__name__}: {error}"]
        return [said for example in examples for said in self._answers(cell, -1, [example], {})]

    def _prefill(self, cell: Cell, n: int, batch: Batch) -> Prefill | None:
        """The batch's prefill, while there is room for it; a batch that failed as a whole (-1) shares none."""
        if n >= 0 and n not in self._prefills and sum(x.nbytes for x in self._prefills.values()) < _SHARED:
            self._prefills[n] = prefill(self._model()[0], batch, cell.task.max_new_tokens)
        return self._prefills.get(n)


def _scored(metrics: Sequence[str], example: Example, said: Answer) -> dict[str, Any]:
    scores = {name: METRICS[name](said.text, example.answer) for name in metrics}
    measured = asdict(said)
    prediction = measured.pop("text")
    return {"id": example.id, "answer": example.answer, "prediction": prediction, "scores": scores, **measured}


def _measured(cell: Cell, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of what the caches held, and whether it is what the budget allows, to the slot, in every sample."""
    if not samples:
        return {"length": None, "kept": [], "bytes": None, "equal": None}
    count, layers = len(samples), len(samples[0]["kept"])
    return {
        "length": sum(sample["length"] for sample in samples) / count,
        "kept": [sum(sample["kept"][layer] for sample in samples) / count for layer in range(layers)],
        "bytes": sum(sample["bytes"] for sample in samples) / count,
        "equal": all(sum(s["kept"]) == layers * allowed(cell.method, s["length"]) for s in samples),
    }


def allowed(method: Method, length: int) -> int:
    """Entries a layer that a budget comes to; all of them for the full cache."""
    return length if method.name == FULL else entries(method.budget, length, 1)
