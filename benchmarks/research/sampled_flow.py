"""How far FlowMM's sampled flow ratio lies from the exact one, and how often that changes a layer's mode.

Two sources of attention: the lab's own prompts (`kvweave.lab`), and attention layers of Qwen2.5-VL-7B's shape with
random weights over prompts of random modalities. Every layer's ratio is computed from all rows and estimated from 32
to 512 of them, with several seeds. Writes benchmarks/results/sampled-flow-<machine>.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

import kvweave
from benchmarks import measure
from benchmarks.console import console as terminal
from benchmarks.console import show
from benchmarks.shapes import QWEN
from kvweave.methods.flowmm import FlowMM
from kvweave.ops.budget import LEAST
from kvweave.ops.rotary import rotate
from kvweave.ops.statistics import AttentionRule
from kvweave.view import LayerView

THETA = FlowMM().theta
THETAS = tuple(n / 100 for n in range(10, 91, 5))  # thresholds that are tried beside FlowMM's own
ROWS = (32, 64, 128, 256, 512)


@dataclass
class Sample:
    """One layer of one prompt: its ratio, and the estimates of it by number of rows."""

    length: int
    exact: float
    estimates: dict[int, list[float]]


def sampled(view: LayerView, rows: Sequence[int], seeds: int) -> list[Sample]:
    """The layer's exact and estimated ratios, for each row of its batch."""
    exact = view.flow().literal.tolist()
    drawn = {n: [view.flow(n, seed).literal.tolist() for seed in range(seeds)] for n in rows if n < view.length}
    return [
        Sample(view.length, exact[b], {n: [flows[b] for flows in of] for n, of in drawn.items()})
        for b in range(view.batch)
    ]


@dataclass(frozen=True)
class Watching(FlowMM):
    """FlowMM that also keeps what it sees."""

    rows: tuple[int, ...] = ROWS
    seeds: int = 1
    seen: list[Sample] = field(default_factory=list, compare=False)

    def plan(self, view: LayerView, budget: int) -> Any:
        self.seen.extend(sampled(view, self.rows, self.seeds))
        return super().plan(view, budget)


def lab(prompts: int, images: int, seeds: int) -> Iterator[Sample]:
    """Layers of the embedded model over prompts of all its families."""
    from kvweave import models
    from kvweave.lab import TASKS, samples

    model, processor = models.load("lab")
    for task in TASKS:
        for sample in samples(task, prompts, images, seed=0):
            inputs = processor.apply_chat_template(
                sample.messages(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            method = Watching(budget=LEAST, seeds=seeds)
            with kvweave.compress(model, method):
                model.generate(**inputs, max_new_tokens=1, do_sample=False)
            yield from method.seen


def random_weights(prompts: int, length: int, sharpness: float, seeds: int) -> Iterator[Sample]:
    """Attention layers of Qwen2.5-VL-7B's shape with random weights, over runs of text and images of random sizes.

    Args:
        sharpness: standard deviation of the logits, roughly; transformers' initialisation gives far below 1.
    """
    width = QWEN.heads * QWEN.dim
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for layer in range(prompts):
        visual, position = _prompt(length, generator)
        kinds = 2 * normal(2, width) / 3  # a mean of its own for each modality
        hidden = normal(1, length, width) + kinds[visual.long()]
        hidden = hidden / hidden.square().mean(-1, keepdim=True).sqrt()
        queries, keys = (
            (hidden @ (normal(width, heads * QWEN.dim) / width**0.5)).unflatten(-1, (heads, -1)).transpose(1, 2)
            for heads in (QWEN.heads, QWEN.kv_heads)
        )
        tables = _tables(position)
        queries, keys = (rotate(x, *tables) for x in (queries, keys))
        yield from sampled(
            LayerView(
                keys=keys,
                values=keys,
                queries=queries * sharpness,
                positions=torch.arange(length).expand(1, QWEN.kv_heads, -1),
                mass=torch.ones(1, QWEN.kv_heads, length),
                visual=visual.expand(1, QWEN.kv_heads, -1),
                rule=AttentionRule(QWEN.dim**-0.5),
                layer=layer,
            ),
            ROWS,
            seeds,
        )


def _tables(position: Tensor) -> tuple[Tensor, Tensor]:
    """Qwen2.5-VL's cos and sin, [length, dim]: the channels are shared out among time, height and width."""
    axis = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor([16, 24, 24]))
    rate = 1e6 ** -(torch.arange(0, QWEN.dim, 2) / QWEN.dim)
    angle = (position[axis].T * rate).repeat(1, 2)
    return angle.cos(), angle.sin()


def _prompt(length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Runs of text and square images: visual, bool [length], and multi-axis positions, [3, length]."""
    visual = torch.zeros(length, dtype=torch.bool)
    position = torch.zeros(3, length, dtype=torch.long)
    at = now = 0
    share = float(torch.rand((), generator=generator))
    while at < length:
        image = at > 0 and float(torch.rand((), generator=generator)) < share
        side = int(torch.randint(8, 24, (), generator=generator))
        size = min(side**2 if image else int(torch.randint(16, 400, (), generator=generator)), length - at)
        step = torch.arange(size)
        visual[at : at + size] = image
        axes = [torch.zeros_like(step), step // side, step % side] if image else [step] * 3
        position[:, at : at + size] = now + torch.stack(axes)
        at, now = at + size, int(position[:, at : at + size].max()) + 1
    return visual, position


def row(name: str, samples: Sequence[Sample], rows: int) -> list[str] | None:
    """Errors and changed decisions of one source at one number of rows; None where no prompt has more."""
    pairs = [(s.exact, e) for s in samples for e in s.estimates.get(rows, [])]
    if not pairs:
        return None
    errors = sorted(abs(a - b) for a, b in pairs)

    def changed(theta: float) -> float:
        return 100 * statistics.fmean((a > theta) != (b > theta) for a, b in pairs)

    worst = max(THETAS, key=changed)
    near = 100 * statistics.fmean(abs(a - THETA) < 0.05 for a, _ in pairs)
    return [
        name, str(rows), str(len(pairs)), f"{statistics.fmean(errors):.4f}", f"{errors[int(0.95 * len(errors))]:.4f}",
        f"{errors[-1]:.4f}", f"{near:.0f} %", f"{changed(THETA):.2f} %", f"{changed(worst):.2f} % ({worst:g})",
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.research.sampled_flow", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--prompts", type=int, default=40, help="of each lab family, and of each random shape")
    parser.add_argument("--seeds", type=int, default=5, help="draws of each number of rows")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048], help="tokens of random prompts")
    parser.add_argument("--images", type=int, nargs="+", default=[4, 12], help="of the lab's prompts")
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    sources = {f"lab, {n} images": lab(options.prompts, n, options.seeds) for n in options.images}
    for length in options.lengths:
        for sharpness in (1.0, 4.0):
            name = f"random weights, L={length}, logits of {sharpness:g}"
            sources[name] = random_weights(options.prompts, length, sharpness, options.seeds)
    rows: list[list[str]] = []
    samples: dict[str, list[Sample]] = {}
    console = terminal()
    with torch.inference_mode(), Progress(console=terminal(stderr=True), transient=True) as progress:
        for name, source in sources.items():
            samples[name] = list(progress.track(source, description=name))
            rows += filter(None, (row(name, samples[name], n) for n in ROWS))
    columns = [
        "", "rows", "estimates", "mean error", "95 %", "largest", "near theta", "changed", "at the worst theta"
    ]  # fmt: skip
    note = (
        f"|estimated - exact| of the literal flow ratio; changed: how often that turns the layer's mode at theta "
        f"{THETA:g}, FlowMM's own (near: within 0.05 of it), and at the worst of {THETAS[0]:g} to {THETAS[-1]:g}. "
        f"{options.seeds} draws of each number of rows, prompts of more tokens than rows only."
    )
    show(console, note, columns, rows)
    text = f"# FlowMM's flow ratio from some of the rows\n\n{note}\n\n{measure.markdown_table(columns, rows)}"
    data = {
        "theta": THETA,
        "table": [dict(zip(columns, line, strict=True)) for line in rows],
        "samples": {name: [[s.length, round(s.exact, 5)] for s in of] for name, of in samples.items()},
    }
    for path in measure.write("sampled-flow", measure.machine(), data, text, options.out):
        console.print(f"wrote {path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
