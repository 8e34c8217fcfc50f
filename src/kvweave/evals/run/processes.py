"""One plan, several processes: of this machine, or of a Ray cluster's machines that share the plan's folder."""

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from kvweave.evals.run.plan import Cell
    from kvweave.evals.run.worker import Worker

Result = dict[str, Any]
Phases = Sequence["dict[int, Cell]"]


def here(worker: "Worker", phases: Phases, workers: int) -> Iterator[tuple[int, Result]]:
    """Cells by number, as processes of one thread each finish them.

    Args:
        phases: cells by number; none of a phase begins before those of the phase before it are done.
    Raises:
        RuntimeError: a process was killed.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy PyTorch's threads half alive
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(worker,))
    try:
        for cells in phases:
            futures = {pool.submit(_compute, cell): n for n, cell in cells.items()}
            for future in as_completed(futures):
                yield futures[future], future.result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process was killed, perhaps for want of memory: what was answered is kept; "
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

    def compute(self, n: int, cell: "Cell") -> tuple[int, Result]:
        return n, self.worker(cell)


def on_ray(worker: "Worker", phases: Phases, workers: int, address: str) -> Iterator[tuple[int, Result]]:
    """Cells by number, as a Ray cluster's actors finish them, with a CPU each, and a GPU where the device is one.

    Raises:
        ValueError: Ray is not installed, or there is no cluster at this address.
    """
    try:
        import ray
        from ray.util import ActorPool
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
        pool = ActorPool(actors)
        for cells in phases:
            yield from pool.map_unordered(lambda actor, job: actor.compute.remote(*job), list(cells.items()))
    finally:
        for actor in actors:
            ray.kill(actor)
