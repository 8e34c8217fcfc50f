"""Deciding and cutting one layer of a very long prompt, on one thread: seconds, memory, and the exponent of the time.

One KV head and the query heads that share it, of Qwen2.5-VL-7B's size or fewer: all that is measured here works head
by head, so that a layer of four KV heads takes four times as long.

python -m benchmarks.long --heads 2
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import kvweave
from benchmarks import measure
from benchmarks.console import console as terminal
from benchmarks.console import show
from benchmarks.shapes import Shape, layer_of

METHODS = ("snapkv", "flashcache", "weave", "h2o")
LENGTHS = (16384, 32768, 65536, 131072)
BUDGET = 0.1


def measured(spelling: str, shape: Shape, length: int) -> dict[str, float]:
    """CPU seconds of one run, and the most MiB that it holds above its inputs."""
    layer = layer_of(shape, length)
    method, rotary = kvweave.parse_method(spelling, budget=BUDGET), layer.rotary
    started = time.process_time()
    with torch.inference_mode():
        peak = measure.peak_bytes(
            lambda: kvweave.compress_tensors(
                method, [layer.queries], [layer.keys], [layer.values], visual=layer.visual, rotary=rotary
            )
        )
    return {"seconds": time.process_time() - started, "mebibytes": peak / measure.MIB}


def table(figures: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A row a method, a column a length: seconds, MiB; and the exponent of the seconds."""
    rows = []
    for name in dict.fromkeys(figure["what"] for figure in figures):
        mine = [figure for figure in figures if figure["what"] == name]
        fit = measure.exponent([f["length"] for f in mine], [f["seconds"] for f in mine])
        cells = [f"{f['seconds']:.2f} · {f['mebibytes']:.0f}" for f in mine]
        rows.append([name, *cells, "-" if fit is None else f"{fit:.2f}"])
    lengths = dict.fromkeys(figure["length"] for figure in figures)
    return ["", *(f"L={length}" for length in lengths), "exponent"], rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long", description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=7, help="query heads of the one KV head")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD")
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shape, console = Shape(options.heads, 1, 128), terminal()
    measured(options.methods[0], shape, 1024)  # warms up
    figures = [
        {"what": name, "length": n, **measured(name, shape, n)} for name in options.methods for n in options.lengths
    ]
    columns, rows = table(figures)
    note = (
        f"One layer of {shape}, float32, budget {BUDGET:g}. Each cell: seconds of one thread · MiB above the inputs; "
        "one run each, with what the allocator was asked for noted."
    )
    show(console, str(shape), columns, rows)
    text = f"# Very long prompts\n\n{note}\n\n{measure.markdown_table(columns, rows)}"
    data = {"shape": str(shape), "budget": BUDGET, "figures": figures}
    for path in measure.write("long", measure.machine(), data, text, options.out):
        console.print(f"wrote {path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
