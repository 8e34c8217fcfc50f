"""Time and memory of tensor functions, and the tables they go into. Needs nothing but torch and transformers."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is chatty

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).parent / "results"
MIB = 2**20

Run = Callable[[], Any]


def synchronize(device: torch.device) -> None:
    """Wait for what was started."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(runs: Mapping[str, Run], rounds: int, device: torch.device | None = None) -> dict[str, list[float]]:
    """Seconds of each function in each round; a round calls all of them once, so that they meet the same load.

    On a CPU these are seconds of this process' own work (of all its threads together): what else runs on the machine
    slows it a little through the shared cache, but is not counted. On a GPU they are the clock's.
    """
    device = device or torch.device("cpu")
    now = time.perf_counter if device.type == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            synchronize(device)
            started = now()
            run()
            synchronize(device)
            seconds[name].append(now() - started)
    return seconds


def median_ratio(seconds: Sequence[float], to: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds, to, strict=True))


def peak_bytes(run: Run, device: torch.device | None = None) -> int:
    """Most bytes of tensors that `run` holds at a time, beyond those that were there before, its result included.

    On a CPU this replays what torch's allocator was asked for (`profile_memory`): exact to the byte and the same
    in every run. The process' resident size would depend on the C allocator, on page faults of earlier calls and on
    what a first call loads; what it sees and the allocator does not, the packing buffers of a matrix product, is
    a few MiB whatever the length.
    """
    if device is not None and device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = run()
    events = trace.profiler.kineto_results.events()  # type: ignore[union-attr]
    del result
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def copy_bandwidth(copied: int, device: torch.device | None = None) -> float:
    """Bytes read and written per second by a copy of `copied` bytes."""
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, 9, device)["copy"]
    return 2 * copied / statistics.median(seconds)


def exponent(lengths: Sequence[int], seconds: Sequence[float]) -> float | None:
    """`b` of the least-squares fit `seconds ~ length ** b`; None for fewer than two lengths."""
    if len(lengths) < 2:
        return None
    x, y = [math.log(n) for n in lengths], [math.log(s) for s in seconds]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """What the figures depend on."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", _module(), *sys.argv[1:]]),
    }
    if device is not None and device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec is not None else Path(sys.argv[0]).stem


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def write(name: str, facts: Mapping[str, Any], data: Mapping[str, Any], markdown: str, folder: Path) -> list[Path]:
    """Write `name`-<machine>.json and .md into `folder`; returns the paths."""
    model = str(facts["gpu"] or f"{facts['cpu']}-{facts['cores']}-cores")
    stem = f"{name}-{re.sub(r'[^a-z0-9]+', '-', model.lower()).strip('-')}"
    folder.mkdir(parents=True, exist_ok=True)
    title, _, body = markdown.partition("\n")
    head = [
        title,
        "",
        f"`{facts['command']}` · {facts['date']} · {facts['gpu'] or facts['cpu']}"
        f" ({facts['cores']} CPU cores, {facts['threads']} used)"
        f" · torch {facts['torch']} · transformers {facts['transformers']}",
    ]
    paths = [folder / f"{stem}.json", folder / f"{stem}.md"]
    paths[0].write_text(json.dumps({"machine": facts, **data}, indent=1) + "\n")
    paths[1].write_text("\n".join(head) + "\n" + body.rstrip() + "\n")
    return paths


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """First column to the left, the others to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
