"""What prefill statistics and every method cost against one attention call of the same shape: `make bench`.

One row a statistic or method, one column a length: its time, the ratio to scaled-dot-product attention, the most
memory it holds above its inputs, and the exponent of its time in the length. Runs are interleaved, ratios are medians
of ratios within a round. Long prompts take what time is left: dear rows are left out there, and the table says so.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
EXACT = "flowmm:flow_rows=0"
SAMPLED = "meda:entropy_rows=256"
FIRST = ("snapkv", "h2o", "flowmm", EXACT)  # methods that marks speak of
IMPORT = "import kvweave"
EXPONENT_FROM = 2048  # below it what a call costs whatever the length outweighs the rest


@dataclass(frozen=True)
class Figure:
    """One measurement."""

    what: str
    shape: str
    length: int
    milliseconds: float  # median
    ratio: float | None  # to attention, where that was measured
    mebibytes: float  # peak above inputs


@dataclass(frozen=True)
class Mark:
    """A figure to reach: at most `limit`, in `unit` ("x": times attention, "h2o": times h2o, "MiB", "ms"), at given
    places.

    With the unit "exponent" it is that of the time in the length, and there are no lengths.
    """

    what: str
    limit: float
    unit: str
    lengths: tuple[int, ...]
    shapes: tuple[Shape, ...] = (SMALL, QWEN)

    def value(self, figure: Figure, h2o: Figure | None) -> float | None:
        """The figure in this unit; `h2o` is of the same place, None: it was left out."""
        if self.unit == "h2o":
            return None if h2o is None else figure.milliseconds / h2o.milliseconds
        return {"x": figure.ratio, "MiB": figure.mebibytes, "ms": figure.milliseconds}[self.unit]


MARKS = (
    Mark(EXACT, 2.5, "x", (4096,)),
    Mark("h2o", 2.0, "x", (4096,)),
    Mark("flowmm", 100, "MiB", (4096,)),
    Mark(EXACT, 100, "MiB", (4096,)),
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
    Mark(EXACT, 1.4, "x", (4096, 8192)),
    Mark("flowmm", 0.5, "x", (4096, 8192)),
    Mark("weave", 0.5, "x", (4096, 8192)),
    *(Mark(name, 1.5, "h2o", (4096, 8192)) for name in ("madakv", "d2o", "meda", SAMPLED)),
    Mark("flashcache", 1.25, "exponent", ()),  # L log L has 1.10 to 1.13 between 2k and 32k
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

    rotary = layer.rotary

    def compress(name: str) -> Callable[[], object]:
        method = kvweave.parse_method(name, budget=BUDGET)
        return lambda: kvweave.compress_tensors(method, [queries], [keys], [values], visual=visual, rotary=rotary)

    return {
        ATTENTION: attention,
        f"window of {WINDOW} rows": lambda: window_attention(queries, keys, rule, WINDOW),
        "column sums": lambda: column_sums(queries, keys, rule, kinds),
        "flow ratio": flow,
        "matching": lambda: nearest(keys, source, keep, allowed, label),
        "merging": lambda: [merge(x, keep, source, target, *weights) for x in (keys, values)],
        **{name: compress(name) for name in methods},
    }


def measured(
    shape: Shape, lengths: Sequence[int], methods: Sequence[str], patience: float, seconds: float
) -> Iterator[list[Figure]]:
    """Figures of one shape, a length after the other, in about `seconds` altogether.

    A run is left out where, by what it took at the length before and if it grew with the square, it would not fit.

    Args:
        patience: seconds for the rounds of one length where one round does not take longer.
    """
    deadline = time.perf_counter() + seconds
    known: dict[str, tuple[int, float]] = {}  # the last length of each run, and its seconds there
    for length in lengths:
        what = runs(shape, length, methods)
        guess = {name: known[name][1] * (length / known[name][0]) ** 2 if name in known else 0.0 for name in what}
        rank = {name: n if n < len(what) - len(methods) + len(FIRST) else n + guess[name] * 1e6
                for n, name in enumerate(what)}  # fmt: skip
        peaks: dict[str, int] = {}
        took: dict[str, float] = {}
        for name in sorted(what, key=lambda name: rank[name]):
            planned = sum(took.values())  # another round of all that runs already
            if length > lengths[0] and time.perf_counter() + planned + 2.2 * guess[name] > deadline:
                continue
            started = time.perf_counter()
            peaks[name] = measure.peak_bytes(what[name])  # warms up, too
            took[name] = time.perf_counter() - started
        rounds = max(1, min(7, int(patience / max(1e-9, sum(took.values())))))
        times = measure.interleaved({name: what[name] for name in what if name in took}, rounds)
        known |= {name: (length, statistics.median(of)) for name, of in times.items()}
        unit = times.get(ATTENTION)
        yield [
            Figure(
                name,
                str(shape),
                length,
                1e3 * statistics.median(of),
                None if unit is None else measure.median_ratio(of, unit),
                peaks[name] / measure.MIB,
            )
            for name, of in times.items()
        ]


def fitted(figures: Sequence[Figure]) -> float | None:
    """Exponent of the time of one row in the length."""
    from_ = min(EXPONENT_FROM, max((f.length for f in figures), default=0) // 2)
    long = [f for f in figures if f.length >= from_]
    return measure.exponent([f.length for f in long], [f.milliseconds for f in long])


def verdicts(figures: Sequence[Figure]) -> list[tuple[str, str, str]]:
    """(mark, measured, met or not) of every mark on what was measured; those whose place was left out say so."""
    rows = []
    for mark in MARKS:
        for shape in map(str, mark.shapes):
            mine = [f for f in figures if f.what == mark.what and f.shape == shape]
            if mark.unit == "exponent":
                places = {"": fitted(mine)} if len(mine) > 1 else {}
            else:
                h2o = {f.length: f for f in figures if f.what == "h2o" and f.shape == shape}
                at = {f.length: mark.value(f, h2o.get(f.length)) for f in mine}
                reached = {f.length for f in figures if f.shape == shape}
                places = {f" at L={n}": at.get(n) for n in mark.lengths if mine and n in reached}
            for place, value in places.items():
                digits = 1 if mark.unit in ("MiB", "ms") else 2
                rows.append(
                    (
                        f"{mark.what} <= {mark.limit:g} {mark.unit}{place}, {shape}",
                        "left out" if value is None else f"{value:.{digits}f} {mark.unit}",
                        "not measured" if value is None else "met" if value <= mark.limit else "not met",
                    )
                )
    return rows


def cells(figures: Sequence[Figure], shape: Shape, lengths: Sequence[int]) -> list[list[str]]:
    """Rows of the table of one shape: name, one cell a length, fitted exponent."""
    rows = []
    for what in dict.fromkeys(figure.what for figure in figures):
        mine = {f.length: f for f in figures if f.what == what and f.shape == str(shape)}
        fit = fitted(list(mine.values()))
        rows.append([what, *(_cell(mine.get(n)) for n in lengths), "-" if fit is None else f"{fit:.2f}"])
    return rows


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    ratio = "-" if figure.ratio is None else f"{figure.ratio:.2f}"
    return f"{figure.milliseconds:.1f} · {ratio} · {figure.mebibytes:.1f}"


def import_milliseconds(times: int = 5) -> float:
    """Time to import all of kvweave's public names where torch and transformers are there already, the least of some.

    What of transformers they pull in is imported first: it is lazy, and its time is not kvweave's.
    """
    public = "import kvweave; [getattr(kvweave, name) for name in kvweave.__all__]"
    theirs = "print(*(name for name in sys.modules if name.partition('.')[0] == 'transformers'))"  # in order
    listed = _python(f"import sys, torch, transformers\n{public}\n{theirs}").split()
    first = f"import importlib, time, torch\nfor name in {listed!r}: importlib.import_module(name)\n"
    clock = f"started = time.process_time()\n{public}\nprint(1e3 * (time.process_time() - started))"
    return min(float(_python(first + clock)) for _ in range(times))


def _python(code: str) -> str:
    """What a Python of its own prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.statistics", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--lengths", type=int, nargs="+", default=None, help="tokens; given ones are all measured")
    parser.add_argument("--methods", nargs="+", default=None, metavar="METHOD", help="such as snapkv:window=8")
    parser.add_argument("--minutes", type=float, default=4.0, help="for all lengths together (default: 4)")
    parser.add_argument("--patience", type=float, default=3.0, help="seconds for the rounds of one length, roughly")
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    lengths = options.lengths or ((64, 128) if options.quick else LENGTHS)
    minutes = float("inf") if options.lengths else options.minutes
    methods = options.methods or (*FIRST, SAMPLED, *(name for name in kvweave.list_methods() if name not in FIRST))

    torch.set_num_threads(1)
    console = terminal()
    figures: list[Figure] = []
    shares = {SMALL: 0.4, QWEN: 0.6}
    with Progress(console=Console(stderr=True), transient=True) as progress, torch.inference_mode():
        task = progress.add_task("measuring", total=len(lengths) * len(shares))
        for shape, share in shares.items():
            progress.update(task, description=str(shape))
            seconds = 60 * minutes * share
            for found in measured(shape, lengths, methods, 0.0 if options.quick else options.patience, seconds):
                figures += found
                progress.advance(task)

    columns = ["", *(f"L={n}" for n in lengths), "exponent"]
    caption = f"ms · times attention · MiB above inputs; float32, CPU time of 1 thread, methods at budget {BUDGET:g}"
    note = (
        f"Each cell: {caption}. Exponents from L={EXPONENT_FROM} on. A dash: left out, since it would have taken "
        "more than the time that was given (`--minutes`; lengths given by `--lengths` are all measured)."
    )
    text = [f"# Statistics and methods against one attention call\n\n{note}\n"]
    for shape in shares:
        rows = cells(figures, shape, lengths)
        text.append(f"## {shape}\n\n{measure.markdown_table(columns, rows)}")
        show(console, f"{shape}: {caption}", columns, rows)
    imported = import_milliseconds(1 if options.quick else 5)
    verdict = "met" if imported <= 300 else "not met"
    marks = [*verdicts(figures), (f"{IMPORT} <= 300 ms beyond torch and transformers", f"{imported:.0f} ms", verdict)]
    heads = ["mark", "measured", ""]
    text.append(f"## Marks\n\n{measure.markdown_table(heads, marks)}")
    show(console, "Marks", heads, marks)
    facts = measure.machine()
    data = {
        "budget": BUDGET,
        "import_milliseconds": imported,
        "figures": [asdict(figure) for figure in figures],
        "marks": [dict(zip(("mark", "measured", "verdict"), row, strict=True)) for row in marks],
    }
    for path in measure.write("statistics", facts, data, "\n".join(text), options.out):
        console.print(f"wrote {path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
