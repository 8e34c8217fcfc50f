"""One plan, several processes: of this machine, or of a Ray cluster's machines that share the plan's folder."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from kvweave.evals.run.plan import Cell
    from kvweave.evals.run.worker import Worker

Result = dict[str, Any]
Phases = Sequence["dict[int, Cell]"]


class Turns:
    """Which cell a worker computes next: one of the place it is at, whose prompts it has read, while there is any;
    then of a place where nobody is; then of the one where most is left."""

    def __init__(self, cells: "Mapping[int, Cell]") -> None:
        self.left: dict[Hashable, deque[tuple[int, Cell]]] = {}
        for n, cell in cells.items():
            self.left.setdefault(cell.place, deque()).append((n, cell))
        self.at: dict[int, Hashable] = {}

    def next(self, worker: int) -> "tuple[int, Cell] | None":
        """A cell with its number, or None where all are given out."""
        if not self.left:
            return None
        if self.at.get(worker) not in self.left:
            taken = set(self.at.values())
            self.at[worker] = max(self.left, key=lambda place: (place not in taken, len(self.left[place])))
        place = self.at[worker]
        cell = self.left[place].popleft()
        if not self.left[place]:
            del self.left[place]
        return cell


def _shared_out(
    phases: Phases,
    workers: int,
    submit: "Callable[[int, Cell], Any]",
    first: Callable[[list[Any]], Any],
    result: Callable[[Any], Result],
) -> Iterator[tuple[int, Result]]:
    """Cells by number, as workers finish them.

    Args:
        submit: gives a worker a cell; returns what stands for its result.
        first: of several such, one that is finished; result: what it stands for.
    """
    for cells in phases:
        turns, running = Turns(cells), dict[Any, tuple[int, int]]()
        free = list(range(workers))
        while free or running:
            for worker in free:
                if job := turns.next(worker):
                    running[submit(worker, job[1])] = worker, job[0]
            if not running:
                break
            done = first(list(running))
            worker, n = running.pop(done)
            free = [worker]
            yield n, result(done)


def here(worker: "Worker", phases: Phases, workers: int) -> Iterator[tuple[int, Result]]:
    """Cells by number, as processes of one thread each finish them.

    Args:
        phases: cells by number; none of a phase begins before those of the phase before it are done.
    Raises:
        RuntimeError: a process was killed.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy PyTorch's threads half alive
    pools = [ProcessPoolExecutor(1, context, initializer=_begin, initargs=(worker,)) for _ in range(workers)]
    try:
        yield from _shared_out(
            phases,
            workers,
            lambda at, cell: pools[at].submit(_compute, cell),
            lambda futures: next(iter(wait(futures, return_when=FIRST_COMPLETED).done)),
            lambda future: dict(future.result()),
        )
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process was killed, perhaps for want of memory: what was answered is kept; "
            "run again with a smaller batch or fewer workers"
        ) from None
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


_worker: "Worker"  # of a worker process


def _begin(worker: "Worker") -> None:
    global _worker
    _worker = worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and lets the cells at work finish
    torch.set_num_threads(1)


def _compute(cell: "Cell") -> Result:
    return _worker(cell)


class Remote:
    """A worker on some machine of a Ray cluster."""

    def __init__(self, worker: "Worker") -> None:
        if not (worker.out / "plan.json").is_file():
            raise FileNotFoundError(
                f"{worker.out} is not the plan's folder on every machine: workers need one that all of them share"
            )
        self.worker = worker

    def compute(self, cell: "Cell") -> Result:
        return self.worker(cell)


def on_ray(worker: "Worker", phases: Phases, workers: int, address: str) -> Iterator[tuple[int, Result]]:
    """Cells by number, as a Ray cluster's actors finish them, with a CPU each, and a GPU where the device is one.

    Raises:
        ValueError: Ray is not installed, or there is no cluster at this address.
    """
    try:
        import ray
    except ImportError:
        raise ValueError(f"ray={address!r} needs Ray: pip install 'kvweave[ray]'") from None

    worker.out = worker.out.resolve()
    if not ray.is_initialized():
        try:
            ray.init(address=None if address == "local" else address, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ValueError(f"ray={address!r} is no cluster that can be joined: {error}") from None
    needs = {"num_cpus": 1, "num_gpus": int(worker.device.startswith("cuda"))}
    kind = ray.remote(**needs)(Remote)
    actors = [kind.remote(worker) for _ in range(workers)]
    try:
        yield from _shared_out(
            phases,
            workers,
            lambda at, cell: actors[at].compute.remote(cell),
            lambda references: ray.wait(references, num_returns=1)[0][0],
            ray.get,
        )
    finally:
        for actor in actors:
            ray.kill(actor)
