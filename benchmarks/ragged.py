"""What a decoded token costs where heads keep different counts, against equal counts of as many bytes.

    python -m benchmarks.ragged

Attention alone: one token through kvweave's layers and its reader of transformers' SDPA, as in `benchmarks.decode`,
one thread, float32: all layers of `smol`'s shape with the counts of its shipped profile, and eight of Qwen2.5-VL-7B's
with heads drawn from it. The whole token: the same layers in a cache of `smol-text`, read by the model, weights and
all, which is what a user waits for. The first of `--steps` tokens makes room.
"""

import argparse
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import kvweave
from benchmarks import measure
from benchmarks.decode import Attention, Token, forward
from benchmarks.shapes import QWEN, Shape
from kvweave.memory.heads import block_of
from kvweave.memory.slots import Slots
from kvweave.methods.allocation import Profile, Quota, profile_counts
from kvweave.methods.full import Full
from kvweave.prompt import Prompt
from kvweave.seam.layer import CompressedLayer
from kvweave.seam.shared import Shared

SMOL = Shape(heads=9, kv_heads=3, dim=64)
SHAPES = (("smol, 9/3 heads of 64", SMOL, 30), ("Qwen2.5-VL-7B, 28/4 heads of 128", QWEN, 8))
WHOLE = "smol-text, the whole model"
Counts = Sequence[Sequence[int]]


def counts_of(shape: Shape, layers: int, tokens: int, budget: float) -> Counts:
    """Entries of each KV head of each layer, by `smol`'s profile: its own, or drawn from them for another shape."""
    quota = Quota(int(budget * tokens), recent=8)
    own = profile_counts("smol", Profile.read("smol").shape[0], quota, tokens)
    if len(own[0]) == shape.kv_heads:
        return own[:layers]
    flat, draw = [count for layer in own for count in layer], random.Random(0)
    drawn = [[draw.choice(flat) for _ in range(shape.kv_heads)] for _ in range(layers)]
    total = sum(map(sum, drawn)) / (layers * shape.kv_heads)
    return [[max(8, round(count * quota.budget / total)) for count in layer] for layer in drawn]


def both_counts(shape: Shape, layers: int, tokens: int, budget: float) -> dict[str, Counts]:
    """The same entries, equally many in each head, and not."""
    unequal = counts_of(shape, layers, tokens, budget)
    mean = round(sum(map(sum, unequal)) / (layers * shape.kv_heads))
    return {"equal": [[mean] * shape.kv_heads] * layers, "unequal": unequal}


def fill(shared: Shared, layers: Sequence[CompressedLayer], shape: Shape, counts: Counts, tokens: int) -> None:
    """Let the layers hold so many entries by head, where decoding starts."""
    visual = torch.zeros(1, tokens, dtype=torch.bool)
    shared.turn.begin(Prompt(visual, ~visual), tokens, 0)
    for layer, own in zip(layers, counts, strict=True):
        alike = len(set(own)) == 1
        parts = [
            Slots(
                torch.randn(1, heads, count, shape.dim),
                torch.randn(1, heads, count, shape.dim),
                torch.arange(count).expand(1, heads, -1),
                torch.ones(1, heads, count),
            )
            for heads, count in ([(len(own), own[0])] if alike else [(1, count) for count in own])
        ]
        layer.lazy_initialization(parts[0].keys, parts[0].values)
        layer.hold(block_of(parts), tokens)


def layers_of(shape: Shape, counts: Counts, tokens: int) -> list[CompressedLayer]:
    """Layers of no model that hold so many entries by head."""
    shared = Shared(Full(), layers=len(counts), attached=True)
    layers = [CompressedLayer(index, shared) for index in range(len(counts))]
    fill(shared, layers, shape, counts, tokens)
    return layers


def cache_of(model: Any, counts: Counts, tokens: int) -> kvweave.CompressedCache:
    """A cache of the model that holds so many entries by head."""
    cache = kvweave.CompressedCache(model.config, Full())
    fill(cache.shared, cache.compressed_layers, SMOL, counts, tokens)
    return cache


def token_of(shape: Shape) -> Token:
    """Queries, keys and values of one."""
    return Token(*(torch.randn(1, heads, 1, shape.dim) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)))


def measured(runs: Mapping[str, Callable[[], Any]], steps: int) -> tuple[float, float, float]:
    """Milliseconds of a token with equal counts and with unequal ones, and the median of their ratios."""
    measure.interleaved(runs, 3)
    seconds = measure.interleaved(runs, steps)
    ratio = measure.median_ratio(seconds["unequal"], seconds["equal"])
    return 1e3 * statistics.median(seconds["equal"]), 1e3 * statistics.median(seconds["unequal"]), ratio


def attention(shape: Shape, layers: int, tokens: int, budget: float) -> dict[str, Callable[[], Any]]:
    """One token's attention in all layers."""
    module, token = Attention(shape), token_of(shape)
    held = {name: layers_of(shape, own, tokens) for name, own in both_counts(shape, layers, tokens, budget).items()}
    return {name: (lambda own=own: forward(own, module, token)) for name, own in held.items()}


def whole(model: Any, tokens: int, budget: float) -> dict[str, Callable[[], Any]]:
    """One token of the model."""
    held = {name: cache_of(model, own, tokens) for name, own in both_counts(SMOL, 30, tokens, budget).items()}
    ids = torch.tensor([[5]])
    return {name: (lambda own=own: model(input_ids=ids, past_key_values=own)) for name, own in held.items()}


@torch.no_grad()
def main() -> None:
    """Measure all shapes, lengths and budgets, print, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=41, help="tokens, of which the median counts")
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[list[str]] = []
    places = [(tokens, budget) for tokens in (1024, 4096, 16384) for budget in (0.2, 0.1)]

    def note(name: str, layers: int, runs: Mapping[str, Callable[[], Any]]) -> None:
        equal, unequal, ratio = measured(runs, options.steps)
        rows.append([name, str(layers), f"{tokens:,}", f"{budget:.0%}"])
        rows[-1] += [f"{equal:.2f}", f"{unequal:.2f}", f"{ratio:.2f}x"]
        print(*rows[-1], flush=True)

    for name, shape, layers in SHAPES:
        for tokens, budget in places:
            note(name, layers, attention(shape, layers, tokens, budget))
    model, _ = kvweave.models.load("smol-text", dtype="float32")
    with kvweave.attach(model):
        for tokens, budget in places:
            note(WHOLE, 30, whole(model, tokens, budget))
    columns = ["shape", "layers", "tokens", "kept", "equal counts, ms", "unequal, ms", "ratio"]
    text = (
        f"# Heads of unlike counts\n\nMedians of {options.steps} tokens; attention alone, but for the whole model's "
        f"rows.\n\n{measure.markdown_table(columns, rows)}"
    )
    measure.write("ragged", measure.machine(), {"columns": columns, "rows": rows}, text, options.out)


if __name__ == "__main__":
    main()
