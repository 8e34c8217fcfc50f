"""Time on a device: events around repeated runs, CUDA graphs so that launches do not count."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping

import torch

from benchmarks import measure

Run = Callable[[], object]

_ENOUGH = 0.02  # seconds that a timed stretch takes at least
_MOST = 100  # runs in it, at most


def seconds(runs: Mapping[str, Run], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of a run over interleaved rounds; on a GPU back to back, by events."""
    if device.type != "cuda":
        return {name: statistics.median(took) for name, took in measure.interleaved(runs, rounds, device).items()}
    repeats = {}
    for name, run in runs.items():
        run()
        took = _stretch(run, 1, device)
        repeats[name] = max(1, min(_MOST, int(_ENOUGH / took)))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(_stretch(run, repeats[name], device))
    return {name: statistics.median(took) for name, took in found.items()}


def _stretch(run: Run, times: int, device: torch.device) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def behind_work(run: Run, cycles: int, rounds: int, device: torch.device) -> float:
    """Median seconds that `run` adds where the device has still work to do when it is called.

    As in a prefill, whose kernels are queued long before they run: launches do not count, waits for the device do.
    """
    found = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        torch.cuda._sleep(cycles)
        start.record()
        run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return statistics.median(found)


def waits(run: Run) -> int:
    """How often `run` waits for the device."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return sum("synchroniz" in str(warning.message) for warning in said)


def captured(run: Run, device: torch.device) -> Run:
    """`run` as a CUDA graph, so that launches do not count; as it is on a CPU."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def freed() -> None:
    """Give back what earlier parts held."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
