"""kvweave beside kvpress on the same tensors: `make bench-peers`.

kvpress pins a transformers of its own, so it lives in a virtual environment of its own (.venv-peers, made here) and
runs in a process of its own; so does kvweave. Both processes make the same tensors and take turns. Of kvpress the
work of its hook is counted: scores, selection and gather; where a press reads attention weights, also the eager
attention that makes them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from benchmarks import measure
from benchmarks.console import console as terminal
from benchmarks.console import show
from benchmarks.shapes import QWEN, SMALL, Shape
from benchmarks.statistics import ATTENTION, EXACT

ROOT = Path(__file__).parents[1]
VENV = ROOT / ".venv-peers"
KVPRESS = "0.5.5"
SNAPKV, DEFAULT, MERGING = "SnapKVPress", "SnapKVPress, its default of 64 rows", "MergingPress(SnapKVPress)"
OBSERVED = "ObservedAttentionPress + eager attention"


@dataclass(frozen=True)
class Figure:
    """One measurement; `seconds` of each round."""

    side: str
    what: str
    shape: str
    length: int
    seconds: list[float]
    mebibytes: float  # peak above inputs

    @property
    def milliseconds(self) -> float:
        return 1e3 * statistics.median(self.seconds)


@dataclass(frozen=True)
class Mark:
    """The median of `what` is at most `limit` times the median of `to`; without a limit it is only shown."""

    what: tuple[str, ...]  # more than one: their sum
    to: tuple[str, ...]
    limit: float | None = None


MARKS = (
    Mark(("snapkv",), (SNAPKV,), 0.6),
    Mark(("snapkv",), (DEFAULT,)),
    Mark(("snapkv",), (ATTENTION,), 0.1),
    Mark(("h2o",), (OBSERVED,), 0.25),
    Mark(("h2o", ATTENTION), (OBSERVED,)),  # what a layer's prefill takes altogether: eager is an attention as well
    Mark(("column sums",), (ATTENTION,), 1.0),
    Mark(("flow ratio",), (ATTENTION,), 1.0),
    Mark(("matching",), (ATTENTION,), 0.25),
    Mark((EXACT,), (ATTENTION,), 1.4),
    Mark(("flowmm",), (ATTENTION,), 0.5),
    Mark((EXACT,), (MERGING,)),
    Mark(("flowmm",), (MERGING,)),
    Mark(("matching", "merging", "snapkv"), (MERGING,)),  # the same work: SnapKV's choice, nearest, merged
)


class Worker:
    """A process that measures one side."""

    def __init__(self, side: str, python: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        if side == "kvpress":
            environment.pop("PYTHONPATH", None)
        command = [str(python), "-m", "benchmarks.peer_worker", side]
        self.side = side
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request: see `peer_worker`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self.side} process ended with {self._process.wait()}; its message is above")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def peers_python() -> Path:
    """The Python of the environment that holds kvpress, made where it is missing."""
    python, ready = VENV / "bin" / "python", VENV / ".ready"
    if not ready.exists():
        print(f"making {VENV} with kvpress {KVPRESS}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        (VENV / ".gitignore").write_text("*\n")
        own_torch = f"torch=={torch.__version__.partition('+')[0]}"
        for package in (own_torch, f"kvpress=={KVPRESS}"):
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", package], check=True)
        ready.touch()
    return python


def measured(workers: Sequence[Worker], shape: Shape, length: int, rounds: int, progress: Progress) -> list[Figure]:
    """Every run of both sides at one shape, a round after the other."""
    size = {"shape": [shape.heads, shape.kv_heads, shape.dim], "length": length}
    made = [worker.ask(**size) for worker in workers]
    if made[0]["checksum"] != made[1]["checksum"]:
        raise RuntimeError(f"the two sides made different tensors: {made[0]} and {made[1]}")
    runs = [(worker, name) for worker, answer in zip(workers, made, strict=True) for name in answer["runs"]]
    task = progress.add_task(f"{shape} L={length}", total=len(runs) * (rounds + 1))
    peaks: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for _, name in runs}
    for worker, name in runs:  # warms up, too
        peaks[name] = worker.ask(run=name, measure="bytes")["value"] / measure.MIB
        progress.advance(task)
    for _ in range(rounds):
        for worker, name in runs:
            seconds[name].append(worker.ask(run=name, measure="seconds")["value"])
            progress.advance(task)
    return [Figure(w.side, name, str(shape), length, seconds[name], peaks[name]) for w, name in runs]


def verdicts(figures: Sequence[Figure]) -> list[tuple[str, str, str]]:
    """(mark, measured ratio, met or not) at every shape."""
    rows = []
    for shape in dict.fromkeys(figure.shape for figure in figures):
        mine = {figure.what: figure.milliseconds for figure in figures if figure.shape == shape}
        for mark in MARKS:
            ratio = sum(mine[name] for name in mark.what) / sum(mine[name] for name in mark.to)
            what = f"{' + '.join(mark.what)} {'to' if mark.limit is None else f'<= {mark.limit:g}x'} {mark.to[0]}"
            verdict = "" if mark.limit is None else "met" if ratio <= mark.limit else "not met"
            rows.append((f"{what}, {shape}", f"{ratio:.2f}x", verdict))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each")
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    console = terminal()
    workers = [Worker("kvpress", peers_python()), Worker("kvweave", Path(sys.executable))]
    figures: list[Figure] = []
    with Progress(console=terminal(stderr=True), transient=True) as progress:
        for shape in (SMALL, QWEN):
            figures += measured(workers, shape, options.length, options.rounds, progress)
    versions = workers[0].ask(shape=[1, 1, 2], length=8)
    for worker in workers:
        worker.close()

    note = (
        f"One layer, {options.length} tokens, 80 % removed, float32, CPU time of 1 thread, medians of "
        f"{options.rounds} interleaved rounds; MiB above the inputs. kvpress {KVPRESS} on torch {versions['torch']} "
        f"and transformers {versions['transformers']}; SnapKV votes with 32 rows on both sides where nothing else is "
        f"said. `{ATTENTION}` is one SDPA call. kvpress' merging press merges values only, kvweave keys as well."
    )
    columns = ["", "", "ms", "times attention", "MiB"]
    text = [f"# kvweave beside kvpress\n\n{note}\n"]
    for shape in (SMALL, QWEN):
        mine = [figure for figure in figures if figure.shape == str(shape)]
        unit = next(figure.milliseconds for figure in mine if figure.what == ATTENTION)
        rows = [
            [f.what, f.side, f"{f.milliseconds:.1f}", f"{f.milliseconds / unit:.2f}", f"{f.mebibytes:.1f}"]
            for f in mine
        ]
        text.append(f"## {shape}\n\n{measure.markdown_table(columns, rows)}")
        show(console, str(shape), columns, rows)
    marks = verdicts(figures)
    heads = ["mark, or ratio to know", "measured", ""]
    text.append(f"## Marks\n\n{measure.markdown_table(heads, marks)}")
    show(console, "Marks", heads, marks)
    data = {
        "kvpress": {"version": KVPRESS, "torch": versions["torch"], "transformers": versions["transformers"]},
        "figures": [asdict(figure) | {"milliseconds": figure.milliseconds} for figure in figures],
        "marks": [dict(zip(("mark", "measured", "verdict"), row, strict=True)) for row in marks],
    }
    for path in measure.write("peers", measure.machine(), data, "\n".join(text), options.out):
        console.print(f"wrote {path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
