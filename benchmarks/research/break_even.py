"""After how many tokens of a reply a deferred cut has paid for itself: `python -m benchmarks.research.break_even`.

At the attention shape of Qwen2.5-VL-7B, float32, seconds of one thread's own work, random tensors. A method costs its
plan and cut, once for each of 28 layers; from then on a token reads less. Until the cut, `defer` tokens read the
whole cache, as they would without compression, and what they attend to is one window of as many rows. So a reply has
paid for the cut after `defer + cost / (full - kept)` tokens. Projections and MLPs are alike either way and left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

import kvweave
from benchmarks import measure
from benchmarks.console import console, show
from benchmarks.decode import FULL, LAYERS, Attention, Bench, forward, layers_with
from benchmarks.shapes import QWEN, layer_of
from kvweave.memory.heads import stored
from kvweave.methods import parse_method
from kvweave.ops.statistics import AttentionRule, window_attention

SOFT = "weave:defer=4,temperature=2,recent=1,merge_rule=importance,mass_kind=entropy"
METHODS = {"snapkv": "snapkv", "flowmm": "flowmm", "weave": "weave", "weave, softened": SOFT}
_HELD = 4  # layers that a token passes through while it is measured


@dataclass(frozen=True)
class Figure:
    """One method at one budget; milliseconds and MiB of all 28 layers."""

    method: str
    length: int
    budget: float
    defer: int
    prefill: float  # attention of the prefill itself
    cut: float  # statistics, plan and cut
    token: float  # decoded from what is kept
    whole: float  # decoded from the full cache
    before: float  # MiB of keys and values until the cut
    peak: float  # MiB that the cut of one layer takes on top
    after: float  # MiB of keys and values

    @property
    def pays_after(self) -> float:
        """Tokens of a reply."""
        return self.defer + self.cut / (self.whole - self.token) if self.whole > self.token else float("inf")


def measured(length: int, budgets: Sequence[float], rounds: int) -> list[Figure]:
    """All methods at one prompt length."""
    layer, module, token = layer_of(QWEN, length), Attention(QWEN), Bench().token(1)
    inputs = [layer.queries], [layer.keys], [layer.values]
    rule = AttentionRule(QWEN.dim**-0.5)

    def prefill() -> object:
        return F.scaled_dot_product_attention(*(x[0] for x in inputs), is_causal=True, enable_gqa=True)

    figures = []
    for budget in budgets:
        cuts, caches = {}, {FULL: layers_with(layer, Bench().contents(layer, 1.0)[FULL], 1, _HELD)}
        defers = {}
        for name, text in METHODS.items():
            given = parse_method(text, budget=budget)
            defers[name] = given.defer

            def cut(method: kvweave.Method = given) -> object:
                if method.defer:
                    window_attention(layer.queries, layer.keys, rule, method.defer)
                return kvweave.compress_tensors(method, *inputs, visual=layer.visual)

            cuts[name] = cut
            kept = stored(kvweave.compress_tensors(given, *inputs, visual=layer.visual)[0])
            caches[name] = layers_with(layer, kept, 1, _HELD)
        peaks = {name: measure.peak_bytes(cut) / measure.MIB for name, cut in cuts.items()}
        cutting = measure.interleaved({**cuts, "prefill": prefill}, rounds)
        steps = {name: (lambda c=cache: forward(c, module, token)) for name, cache in caches.items()}
        measure.interleaved(steps, 2)
        decoding = measure.interleaved(steps, 4 * rounds)
        cost = {name: 1e3 * LAYERS * statistics.median(found) for name, found in cutting.items()}
        tick = {name: 1e3 * LAYERS / _HELD * statistics.median(found) for name, found in decoding.items()}
        held = {name: LAYERS / _HELD * sum(x.nbytes for x in cache) / measure.MIB for name, cache in caches.items()}
        figures += [
            Figure(
                name,
                length,
                budget,
                defers[name],
                cost["prefill"],
                cost[name],
                tick[name],
                tick[FULL],
                held[FULL],
                peaks[name],
                held[name],
            )
            for name in METHODS
        ]
    return figures


def cells(figure: Figure) -> list[str]:
    """A row of the table."""
    numbers = (figure.prefill, figure.cut, figure.whole, figure.token, figure.before, figure.peak, figure.after)
    share = f"{100 * figure.cut / figure.prefill:.0f} %"
    head = [figure.method, f"{figure.length}", f"{100 * figure.budget:g} %"]
    times, rest = ([f"{x:.0f}" for x in numbers[:2]], [f"{x:.1f}" for x in numbers[2:]])
    return [*head, *times, share, *rest, f"{figure.pays_after:.0f}"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.research.break_even", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.2, 0.1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with torch.inference_mode():
        figures = [f for length in options.lengths for f in measured(length, options.budgets, options.rounds)]
    columns = ["", "tokens", "kept", "prefill ms", "cut ms", "of prefill", "full ms", "kept ms", "until cut MiB"]
    columns += ["cut of a layer MiB", "after MiB", "pays after tokens"]
    rows = [cells(figure) for figure in figures]
    show(console(), "What a cut costs and when it has paid", columns, rows)
    text = f"# What a cut costs and when it has paid\n\n{__doc__}\n{measure.markdown_table(columns, rows)}"
    data = {"figures": [{**asdict(figure), "pays_after": figure.pays_after} for figure in figures]}
    for path in measure.write("break-even", measure.machine(), data, text, options.out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
