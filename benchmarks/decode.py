"""What decoding costs over a compressed cache: `make bench-decode`.

One token through the cache and the attention of a model, nothing else: kvweave's layers (`update`) and its reader of
transformers' SDPA, as a model calls them, at the attention shape of Qwen2.5-VL-7B with random queries, keys and
values. Projections and MLPs are left out: they cost the same at any budget, and their weights (28 GiB in float32)
would hide what is measured. The full cache goes through the same layer and the same kernel.

Every cache but transformers' own goes through kvweave's attention of one token: the query heads of a KV head are the
rows of one SDPA call, with the mass bias or without. transformers without a mask passes `enable_gqa` instead, and
torch reads each key for every query head.

A layer is compressed once and copied, so that every layer has memory of its own; there are as many layers as fill
448 MiB when nothing is dropped, that is 28 at 4,096 tokens. Compiled steps run on reserved room, as in `generate`
with a `compile_config`. What does not fit into --minutes is left out and said so.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kvweave
from benchmarks import measure
from benchmarks.console import console as terminal
from benchmarks.console import show
from benchmarks.shapes import QWEN, Layer, Shape, layer_of
from kvweave.memory.heads import block_of, stored
from kvweave.memory.packed import PackedSlots, packed
from kvweave.memory.slots import Slots
from kvweave.ops.quantize import Quantization
from kvweave.seam.layer import CompressedLayer
from kvweave.seam.reader import Reader
from kvweave.seam.shared import Shared

Blocks = Sequence[Slots | PackedSlots]

LAYERS = 28  # what tokens/s are stated for
BUDGETS = (1.0, 0.6, 0.4, 0.2, 0.1, 0.05)
COMPILED = 0.2  # budget at which compiled decoding is measured
QUANTIZED = "snapkv in 4 bits"
METHODS = ("snapkv", "adakv", "flowmm", "flowmm mass_bias", QUANTIZED)
FULL, PLAIN = "full", "transformers' DynamicCache"
BIASED = " mass_bias"
BIAS_LIMIT = 1.05
LENGTHS, BATCHED = (4096, 8192, 16384, 32768), 8
ROOM = 64  # tokens that a compiled run may decode

Step = Callable[[], object]
Attend = Callable[..., tuple[Tensor, Tensor | None]]
SDPA: Attend = Reader("sdpa").function


@dataclass(frozen=True)
class Figure:
    """One measurement; `milliseconds` (median) and `mebibytes` are those of 28 layers."""

    what: str
    length: int
    batch: int
    budget: float
    milliseconds: float
    mebibytes: float  # of keys and values, read for one token of each row
    roofline: float  # milliseconds that reading them takes at the bandwidth of a copy
    ratio: float  # full cache's time over this one's, median within a round

    @property
    def rate(self) -> float:
        """Tokens per second, of all rows."""
        return 1e3 * self.batch / self.milliseconds


class Attention(nn.Module):
    """What transformers' attention functions ask of a module."""

    is_causal = True

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_key_value_groups = shape.heads // shape.kv_heads


@dataclass(frozen=True)
class Token:
    """A decoded token's queries, keys and values, [batch, heads, 1, dim]."""

    queries: Tensor
    keys: Tensor
    values: Tensor


def kept(layer: Layer, name: str, budget: float) -> list[Slots]:
    """What `name` keeps of the layer; "flowmm mass_bias" with its bias."""
    bare, _, option = name.partition(" ")
    method = kvweave.get_method(bare, budget=budget, **({option: True} if option else {}))
    inputs = [layer.queries], [layer.keys], [layer.values]
    return stored(kvweave.compress_tensors(method, *inputs, visual=layer.visual, rotary=layer.rotary)[0])


def layers_with(layer: Layer, blocks: Blocks, batch: int, count: int) -> list[CompressedLayer]:
    """`count` layers that hold copies of `blocks`, at the point where decoding starts."""
    visual = layer.visual.expand(batch, -1)
    shared = Shared(kvweave.get_method("full"), layers=count, attached=True)
    shared.turn.begin(kvweave.Prompt(visual, torch.ones_like(visual)), layer.length, 0)
    rows = torch.zeros(batch, dtype=torch.int64)
    made = []
    for index in range(count):
        one = CompressedLayer(index, shared)
        one.lazy_initialization(layer.keys, layer.values)
        one.hold(block_of([block.rows(rows) for block in blocks]), layer.length)  # copies
        made.append(one)
    return made


def forward(layers: Sequence[CompressedLayer], module: Attention, token: Token) -> list[Tensor]:
    """One token through all layers, as a model's attention modules do it; each layer's output."""
    outs = []
    for layer in layers:
        keys, values = layer.update(token.keys, token.values)
        scaling = token.queries.shape[-1] ** -0.5
        outs.append(SDPA(module, token.queries, keys, values, None, dropout=0.0, scaling=scaling)[0])
    return outs


def plain(layer: Layer, module: Attention, token: Token, count: int) -> Step:
    """The full cache as transformers keeps it, with its own SDPA."""
    batch = token.keys.shape[0]
    cache = DynamicCache()
    for index in range(count):
        cache.update(*(x.repeat(batch, 1, 1, 1) for x in (layer.keys, layer.values)), index)
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def step() -> None:
        for index in range(count):
            keys, values = cache.update(token.keys, token.values, index)
            sdpa(module, token.queries, keys, values, None, dropout=0.0, scaling=token.queries.shape[-1] ** -0.5)

    return step


@dataclass(frozen=True)
class Bench:
    """What is measured, and how much of it."""

    shape: Shape = QWEN
    budgets: tuple[float, ...] = BUDGETS
    methods: tuple[str, ...] = METHODS
    held: int = LAYERS * 4096  # layers times rows times tokens
    rounds: int = 5
    bandwidth: float = 1e10

    @functools.cached_property
    def module(self) -> Attention:
        return Attention(self.shape)

    def token(self, batch: int) -> Token:
        generator = torch.Generator().manual_seed(0)
        heads = self.shape.heads, self.shape.kv_heads, self.shape.kv_heads
        return Token(*(torch.randn(batch, n, 1, self.shape.dim, generator=generator) for n in heads))

    def decoding(self, layers: list[CompressedLayer], token: Token) -> Step:
        return lambda: forward(layers, self.module, token)

    def contents(self, layer: Layer, budget: float) -> dict[str, Blocks]:
        """What each method keeps of the layer; those that differ in how it is stored or read decide once."""
        if budget >= 1:
            columns = torch.arange(layer.length).expand(*layer.keys.shape[:3])
            return {FULL: [Slots(layer.keys, layer.values, columns, torch.ones_like(columns, dtype=torch.float32))]}
        done: dict[str, Blocks] = {}
        for name in self.methods:
            if name == QUANTIZED:
                done[name] = [packed(block, Quantization(4, 32, 32)) for block in kept(layer, "snapkv", budget)]
            elif name + BIASED in self.methods:
                done[name + BIASED] = biased = kept(layer, name + BIASED, budget)
                done[name] = [replace(block, bias=None) for block in biased]
            elif name not in done:
                done[name] = kept(layer, name, budget)
        return {name: done[name] for name in self.methods}

    def measured(self, length: int, batch: int, advance: Callable[[str], None] = lambda _: None) -> list[Figure]:
        """All budgets and methods at one prompt length and batch; each budget in rounds with the full cache."""
        count = max(1, self.held // (length * batch))
        layer, token = layer_of(self.shape, length), self.token(batch)
        whole = layers_with(layer, self.contents(layer, 1.0)[FULL], batch, count)
        figures = []
        for budget in self.budgets:
            advance(f"{length} tokens, batch {batch}, {100 * budget:g} %")
            caches = {FULL: whole}
            if budget < 1:
                for name, blocks in self.contents(layer, budget).items():
                    caches[name] = layers_with(layer, blocks, batch, count)
            runs = {name: self.decoding(layers, token) for name, layers in caches.items()}
            if budget >= 1:
                runs[PLAIN] = plain(layer, self.module, token, count)
            seconds = timed(runs, self.rounds)
            for name in runs:
                if name == FULL and budget < 1:
                    continue
                held = sum(x.nbytes for x in caches.get(name, whole)) * LAYERS / count
                figures.append(
                    Figure(
                        name,
                        length,
                        batch,
                        budget,
                        1e3 * statistics.median(seconds[name]) * LAYERS / count,
                        held / measure.MIB,
                        1e3 * held / self.bandwidth,
                        measure.median_ratio(seconds[FULL], seconds[name]),
                    )
                )
        return figures

    def compiled(self, length: int, advance: Callable[[str], None] = lambda _: None) -> list[dict[str, object]]:
        """Decode of two layers, batch 1: as it is, and compiled on reserved room; what the compiler made of it."""
        layer, token = layer_of(self.shape, length), self.token(1)
        contents = {FULL: self.contents(layer, 1.0)[FULL]} | self.contents(layer, COMPILED)
        contents.pop(QUANTIZED, None)
        rows: list[dict[str, object]] = []
        for name, blocks in contents.items():
            advance(f"compiling {name}")
            torch._dynamo.reset()
            counters = torch._dynamo.utils.counters
            counters.clear()
            two = layers_with(layer, blocks, 1, 2)
            for one in two:
                one.reserve(ROOM)
            row: dict[str, object] = {"what": name, "length": length, "budget": 1.0 if FULL in name else COMPILED}
            fast = torch.compile(forward)

            def step(two: list[CompressedLayer] = two, fast: Callable[..., object] = fast) -> object:
                return fast(two, self.module, token)

            try:
                for _ in range(3):
                    step()
                runs = {"eager": self.decoding(layers_with(layer, blocks, 1, 2), token)}
                seconds = timed(runs | {"compiled": step}, 4 * self.rounds)
            except Exception as error:  # what the compiler refuses is a result
                rows.append(row | {"error": f"{type(error).__name__}: {error}".splitlines()[0]})
                continue
            rows.append(
                row
                | {
                    "eager": 1e3 * statistics.median(seconds["eager"]) * LAYERS / 2,
                    "compiled": 1e3 * statistics.median(seconds["compiled"]) * LAYERS / 2,
                    "ratio": measure.median_ratio(seconds["eager"], seconds["compiled"]),
                    "breaks": sum(counters["graph_break"].values()),
                    "graphs": counters["stats"]["unique_graphs"],
                }
            )
        return rows


def timed(runs: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of interleaved rounds, after the caches have made room for new tokens."""
    measure.interleaved(runs, 2)
    return measure.interleaved(runs, rounds)


def cells(figure: Figure) -> list[str]:
    """A row of the table."""
    return [
        figure.what,
        f"{100 * figure.budget:g} %",
        f"{figure.milliseconds:.2f}",
        f"{figure.rate:.1f}",
        f"{figure.mebibytes:.1f}",
        f"{figure.roofline:.2f}",
        f"{100 * figure.roofline / figure.milliseconds:.0f} %",
        f"{figure.ratio:.2f}x",
    ]


def verdicts(figures: Sequence[Figure]) -> list[tuple[str, str, str]]:
    """(mark, measured, met or not): the mass bias against none, median within a round."""
    by_place = {(f.what, f.length, f.batch, f.budget): f for f in figures}
    rows = []
    for figure in figures:
        if not figure.what.endswith(BIASED):
            continue
        name = figure.what.removesuffix(BIASED)
        cost = by_place[name, figure.length, figure.batch, figure.budget].ratio / figure.ratio
        where = f"L={figure.length}, batch {figure.batch}, {100 * figure.budget:g} %"
        mark = f"{figure.what} <= {BIAS_LIMIT:g}x {name}, {where}"
        rows.append((mark, f"{cost:.2f}x", "met" if cost <= BIAS_LIMIT else "not met"))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small prompts, to see that it runs")
    parser.add_argument("--lengths", type=int, nargs="+", default=None, help="tokens of the prompt, batch 1")
    parser.add_argument("--batched", type=int, nargs="*", default=None, help=f"tokens of the prompt, batch {BATCHED}")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--minutes", type=float, default=4.0, help="after which no further prompt length is begun")
    parser.add_argument("--all", action="store_true", help="every length at both batches, however long it takes")
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    lengths = options.lengths or ([128] if options.quick else LENGTHS)
    batched = options.batched if options.batched is not None else ([64] if options.quick else LENGTHS)
    places = sorted(
        [(n, 1) for n in lengths] + [(n, BATCHED) for n in batched]
    )  # cut short, it has seen both batches
    deadline = math.inf if options.all else time.perf_counter() + 60 * options.minutes

    torch.set_num_threads(1)
    console = terminal()
    bandwidth = measure.copy_bandwidth(2**20 if options.quick else 2**28)
    bench = Bench(bandwidth=bandwidth)
    if options.quick:
        bench = replace(bench, held=512, rounds=2, budgets=(1.0, 0.2))
    figures: list[Figure] = []
    compiled: list[dict[str, object]] = []
    left_out: list[tuple[int, int]] = []
    longest = 0.0
    with Progress(console=terminal(stderr=True), transient=True) as progress, torch.inference_mode():
        task = progress.add_task("measuring", total=len(places) * len(bench.budgets) + len(METHODS))

        def advance(what: str) -> None:
            progress.update(task, description=what, advance=1)

        for length, batch in places:
            started = time.perf_counter()
            if started + longest > deadline:
                left_out.append((length, batch))
                continue
            figures += bench.measured(length, batch, advance)
            longest = max(longest, time.perf_counter() - started)
        if not (options.quick or options.no_compile):
            compiled = bench.compiled(lengths[0], advance)
    places = [place for place in places if place not in left_out]

    note = (
        f"Attention and cache of {LAYERS} layers of {QWEN}, float32, CPU time of 1 thread, a token for each row; no "
        f"projections, no MLP. Roofline: bytes of kept keys and values at {bandwidth / 1e9:.1f} GB/s, what a copy "
        "reads and writes a second; above 100 % where the CPU's cache holds them or reading is faster than copying. "
        "Faster than full: than the full cache through the same kernel."
    )
    if left_out:
        missing = ", ".join(f"{length} tokens at batch {batch}" for length, batch in left_out)
        note += f"\n\nLeft out, for time: {missing}. `--all` measures them too."
    columns = ["", "budget", "ms", "tokens/s", "KV MiB", "roofline ms", "of roofline", "faster than full"]
    text = [f"# Decode over a compressed cache\n\n{note}\n"]
    for length, batch in places:
        rows = [cells(f) for f in figures if (f.length, f.batch) == (length, batch)]
        title = f"{length} tokens, batch {batch}"
        text.append(f"## {title}\n\n{measure.markdown_table(columns, rows)}")
        show(console, title, columns, rows)
    if compiled:
        columns = ["", "budget", "eager ms", "compiled ms", "faster", "graph breaks", "graphs"]
        rows = [_compiled_cells(row) for row in compiled]
        title = f"torch.compile, {lengths[0]} tokens, batch 1, measured on 2 layers"
        text.append(f"## {title}\n\n{measure.markdown_table(columns, rows)}")
        show(console, title, columns, rows)
    marks = verdicts(figures)
    heads = ["mark", "measured", ""]
    text.append(f"## Marks\n\n{measure.markdown_table(heads, marks)}")
    show(console, "Marks", heads, marks)
    data = {
        "bandwidth": bandwidth,
        "left_out": left_out,
        "figures": [asdict(figure) | {"rate": figure.rate} for figure in figures],
        "compiled": compiled,
        "marks": [dict(zip(("mark", "measured", "verdict"), row, strict=True)) for row in marks],
    }
    for path in measure.write("decode", measure.machine(), data, "\n".join(text), options.out):
        console.print(f"wrote {path}", soft_wrap=True)
    return 0


def _compiled_cells(row: Mapping[str, object]) -> list[str]:
    head = [str(row["what"]), f"{100 * float(str(row['budget'])):g} %"]
    if "error" in row:
        return [*head, "-", str(row["error"])[:60], "-", "-", "-"]
    times = [f"{row['eager']:.2f}", f"{row['compiled']:.2f}", f"{row['ratio']:.2f}x"]
    return [*head, *times, str(row["breaks"]), str(row["graphs"])]


if __name__ == "__main__":
    sys.exit(main())
