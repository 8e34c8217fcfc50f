"""What a compressed prompt costs the host: `python -m benchmarks.launches`.

On a GPU a prompt of some two thousand tokens takes no longer than its launches, so that what a method adds to it is
how many launches it makes. Counted here, where nothing else weighs: a tiny model of Qwen2's architecture, a prompt
of 64 tokens and ten decoded ones, with a method and without; a layer's share is the difference between a model of
more layers and one of fewer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import kvweave
from benchmarks import measure
from benchmarks.console import console as terminal
from benchmarks.console import show
from benchmarks.guard import counted

METHODS = (
    "streaming_llm",
    "snapkv",
    "weave",
    "weave:form=even",
    "mixkv",
    "flashcache",
    "adakv",
    "h2o",
    "lookm",
    "flowmm",
)
LENGTH, DECODED, LAYERS, BUDGET = 64, 10, (8, 24), 0.2
FULL = "the model itself"


@dataclass(frozen=True)
class Cost:
    """Of a prompt and its reply: launches, waits for the device, and seconds of the host."""

    launches: float
    waits: float
    seconds: float

    def minus(self, other: Cost, layers: int = 1) -> Cost:
        """What this has more, a layer's share of it."""
        of = zip(vars(self).values(), vars(other).values(), strict=True)
        return Cost(*((one - two) / layers for one, two in of))


def model_of(layers: int) -> Qwen2ForCausalLM:
    """A model of so many layers that compute next to nothing."""
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        vocab_size=100,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config).eval()


def reply(model: Qwen2ForCausalLM, spelling: str) -> Callable[[], object]:
    """A prompt and its reply by one method."""
    ids = torch.arange(1, LENGTH + 1)[None]

    def run() -> object:
        return model.generate(ids, max_new_tokens=DECODED, min_new_tokens=DECODED, do_sample=False)

    def compressed() -> object:
        method = kvweave.parse_method(spelling, budget=BUDGET)
        with kvweave.compress(model, method):
            return run()

    return run if spelling == FULL else compressed


def costs(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, Cost]:
    """Of each, its seconds the least of so many rounds, all by turns."""
    found = {}
    for name, run in runs.items():
        run()  # what is made once
        with counted() as operations:
            run()
        found[name] = operations.launches, operations.waits
    taken = measure.interleaved(runs, rounds)
    return {name: Cost(*found[name], min(taken[name])) for name in runs}


def table(figures: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A row a method."""
    columns = ["", "launches a layer", "waits a layer", "host, microseconds a layer"]
    return columns, [[f["what"], f"{f['launches']:.0f}", f"{f['waits']:.1f}", f"{f['host']:.0f}"] for f in figures]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=15, help="of which the quickest counts")
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    few, many = (
        costs({name: reply(model, name) for name in (FULL, *options.methods)}, options.rounds)
        for model in map(model_of, LAYERS)
    )
    each = {name: many[name].minus(few[name], LAYERS[1] - LAYERS[0]) for name in many}
    figures = []
    for name, own in each.items():
        layer = own if name == FULL else own.minus(each[FULL])
        figures.append({"what": name, "launches": layer.launches, "waits": layer.waits, "host": 1e6 * layer.seconds})
    columns, rows = table(figures)
    note = (
        f"A prompt of {LENGTH} tokens and {DECODED} decoded ones, {BUDGET:g} kept of 4 KV heads of 8 channels, one "
        "thread: what a layer takes in the model itself, and what a method adds, its cut and the reading of what is "
        "left included. Launches: calls that make or change a tensor. Waits: for a number that a device computes."
    )
    console = terminal()
    show(console, "What a prompt costs the host", columns, rows)
    text = f"# What a compressed prompt costs the host\n\n{note}\n\n{measure.markdown_table(columns, rows)}"
    for path in measure.write("launches", measure.machine(), {"figures": figures}, text, options.out):
        console.print(f"wrote {path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
