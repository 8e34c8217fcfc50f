"""What prefill statistics and whole methods cost against one attention call of the same shape: `make bench`.

One row a statistic or method, one column a length: the ratio of its time to that of scaled-dot-product attention,
and the most memory it holds above its inputs. Runs are interleaved, ratios are medians of ratios within a round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

import kvweave
from benchmarks import measure
from benchmarks.console import console as terminal
from benchmarks.console import show
from benchmarks.shapes import QWEN, SMALL, Shape, layer_of
from kvweave.ops.match import nearest
from kvweave.ops.merge import merge, merge_weights
from kvweave.ops.select import complement
from kvweave.ops.statistics import AttentionRule, column_sums, flow_ratio, window_attention

BUDGET = 0.2
WINDOW = 32
ATTENTION = "attention"  # the row that all others are held against
LENGTHS = (1024, 2048, 4096, 8192)
METHODS = ("snapkv", "h2o", "flowmm")


@dataclass(frozen=True)
class Figure:
    """One measurement."""

    what: str
    shape: str
    length: int
    milliseconds: float  # median
    ratio: float  # to attention
    mebibytes: float  # peak above inputs


@dataclass(frozen=True)
class Mark:
    """A figure to reach: at most `limit`, in `unit` ("x": times attention, "MiB", "ms"), at given places."""

    what: str
    limit: float
    unit: str
    lengths: tuple[int, ...]
    shapes: tuple[Shape, ...] = (SMALL, QWEN)

    def value(self, figure: Figure) -> float:
        return {"x": figure.ratio, "MiB": figure.mebibytes, "ms": figure.milliseconds}[self.unit]


MARKS = (
    Mark("flowmm", 2.5, "x", (4096,)),
    Mark("h2o", 2.0, "x", (4096,)),
    Mark("flowmm", 100, "MiB", (4096,)),
    Mark("h2o", 100, "MiB", (4096,)),
    Mark("snapkv", 100, "MiB", (4096,)),
    Mark("column sums", 1.0, "x", (4096,), (SMALL,)),
    Mark("column sums", 50, "MiB", (4096,), (SMALL,)),
    Mark("flow ratio", 1.0, "x", (4096,), (SMALL,)),
    Mark("snapkv", 0.1, "x", (4096,)),
    Mark("snapkv", 100, "ms", (4096,), (QWEN,)),
    Mark("snapkv", 45, "MiB", (4096,), (QWEN,)),
    Mark("matching", 0.25, "x", (4096, 8192)),
    Mark("merging", 60, "MiB", (8192,)),
    Mark("flowmm", 1.4, "x", (4096, 8192)),
)


def runs(shape: Shape, length: int, methods: Sequence[str]) -> dict[str, Callable[[], object]]:
    """What is measured, by name; attention first."""
    layer = layer_of(shape, length)
    queries, keys, values, visual = layer.queries, layer.keys, layer.values, layer.visual
    kinds = torch.stack([~visual, visual], 1)
    rule = AttentionRule(shape.dim**-0.5)

    importance = torch.rand(1, shape.kv_heads, length, generator=torch.Generator().manual_seed(length))
    keep = importance.argsort(-1)[..., : int(BUDGET * length)].sort(-1).values
    source = complement(keep, length)
    allowed = torch.ones(1, shape.kv_heads, 2, keep.shape[-1], dtype=torch.bool)
    label = visual[:, None].expand(-1, shape.kv_heads, -1).gather(-1, source).long()
    target, cosine = nearest(keys, source, keep)
    weights = merge_weights("similarity", target, cosine, torch.ones_like(cosine), torch.ones(keep.shape))

    def attention() -> Tensor:
        gqa = shape.heads != shape.kv_heads
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=gqa)

    def flow() -> object:
        sums = column_sums(queries, keys, rule, kinds)
        return flow_ratio(sums, visual[:, None].expand(-1, shape.kv_heads, -1), visual)

    def compress(name: str) -> Callable[[], object]:
        method = kvweave.get_method(name, budget=BUDGET)
        return lambda: kvweave.compress_tensors(method, [queries], [keys], [values], visual=visual)

    return {
        ATTENTION: attention,
        f"window of {WINDOW} rows": lambda: window_attention(queries, keys, rule, WINDOW),
        "column sums": lambda: column_sums(queries, keys, rule, kinds),
        "flow ratio": flow,
        "matching": lambda: nearest(keys, source, keep, allowed, label),
        "merging": lambda: [merge(x, keep, source, target, *weights) for x in (keys, values)],
        **{name: compress(name) for name in methods},
    }


def measured(shape: Shape, length: int, methods: Sequence[str], patience: float) -> list[Figure]:
    """Figures of one shape and length; about `patience` seconds where two rounds do not take longer."""
    what = runs(shape, length, methods)
    started = time.process_time()
    peaks = {name: measure.peak_bytes(run) for name, run in what.items()}  # warms up, too
    rounds = max(2, min(9, int(patience / (time.process_time() - started))))
    seconds = measure.interleaved(what, rounds)
    return [
        Figure(
            name,
            str(shape),
            length,
            1e3 * statistics.median(seconds[name]),
            measure.median_ratio(seconds[name], seconds[ATTENTION]),
            peaks[name] / measure.MIB,
        )
        for name in what
    ]


def verdicts(figures: Sequence[Figure]) -> list[tuple[str, str, str]]:
    """(mark, measured, met or not) of every mark whose place was measured."""
    rows = []
    for mark in MARKS:
        for figure in figures:
            place = figure.length in mark.lengths and figure.shape in map(str, mark.shapes)
            if figure.what == mark.what and place:
                value = mark.value(figure)
                rows.append(
                    (
                        f"{mark.what} <= {mark.limit:g} {mark.unit} at L={figure.length}, {figure.shape}",
                        f"{value:.2f} {mark.unit}" if mark.unit == "x" else f"{value:.1f} {mark.unit}",
                        "met" if value <= mark.limit else "not met",
                    )
                )
    return rows


def cells(figures: Sequence[Figure], shape: Shape, lengths: Sequence[int]) -> list[list[str]]:
    """Rows of the table of one shape: name, one cell a length, fitted exponent."""
    rows = []
    for what in dict.fromkeys(figure.what for figure in figures):
        mine = {f.length: f for f in figures if f.what == what and f.shape == str(shape)}
        fit = measure.exponent(lengths, [mine[n].milliseconds for n in lengths])
        line = [f"{mine[n].milliseconds:.1f} · {mine[n].ratio:.2f} · {mine[n].mebibytes:.1f}" for n in lengths]
        rows.append([what, *line, "-" if fit is None else f"{fit:.2f}"])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.statistics", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--lengths", type=int, nargs="+", default=None, help="tokens (default: 1k, 2k, 4k, 8k)")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=kvweave.list_methods(), metavar="METHOD")
    parser.add_argument("--patience", type=float, default=8.0, help="seconds for each shape and length, roughly")
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    lengths = options.lengths or ((64, 128) if options.quick else LENGTHS)
    patience = 0.0 if options.quick else options.patience

    torch.set_num_threads(1)
    console = terminal()
    figures: list[Figure] = []
    with Progress(console=Console(stderr=True), transient=True) as progress, torch.inference_mode():
        task = progress.add_task("measuring", total=len(lengths) * 2)
        for shape in (SMALL, QWEN):
            for length in lengths:
                progress.update(task, description=f"{shape} L={length}")
                figures += measured(shape, length, options.methods, patience)
                progress.advance(task)

    columns = ["", *(f"L={n}" for n in lengths), "exponent"]
    caption = f"ms · times attention · MiB above inputs; float32, CPU time of 1 thread, methods at budget {BUDGET:g}"
    text = [f"# Statistics and methods against one attention call\n\nEach cell: {caption}.\n"]
    for shape in (SMALL, QWEN):
        rows = cells(figures, shape, lengths)
        text.append(f"## {shape}\n\n{measure.markdown_table(columns, rows)}")
        show(console, f"{shape}: {caption}", columns, rows)
    marks = verdicts(figures)
    if marks:
        heads = ["mark", "measured", ""]
        text.append(f"## Marks\n\n{measure.markdown_table(heads, marks)}")
        show(console, "Marks", heads, marks)
    facts = measure.machine()
    data = {
        "budget": BUDGET,
        "figures": [asdict(figure) for figure in figures],
        "marks": [dict(zip(("mark", "measured", "verdict"), row, strict=True)) for row in marks],
    }
    for path in measure.write("statistics", facts, data, "\n".join(text), options.out):
        console.print(f"wrote {path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
