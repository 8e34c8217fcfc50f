"""A cache over endless input: time a token and memory, up to 100,000 tokens, beside a cache that keeps everything.

    python -m benchmarks.stream

A decoder of two layers with random weights reads random tokens in passes of `--every` tokens, bounded by `every`; at
ten lengths it also decodes some tokens one at a time. Beside it, as far as `--unbounded`, the same passes folded into
a cache that keeps everything (KV-Fold, 2605.12471). Seconds are the process' own work. "All" is everything that the
bounded cache holds, as `pickle` writes it: entries, and masks of three bytes a token, which are all that grows.
"""

from __future__ import annotations

import argparse
import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import kvweave
from benchmarks import measure
from benchmarks.console import console, show

_VOCABULARY = 256
COLUMNS = ("tokens", "µs/token", "decoded", "entries", "all", "unbounded µs/token", "decoded", "entries")


@dataclass(frozen=True)
class Mark:
    """A cache at some length.

    Attributes:
        tokens: seen.
        reading: µs a token since the mark before, in passes of many; decoding: µs a token, one at a time.
        entries: bytes of keys and values; held: bytes of all that the cache holds.
    """

    tokens: int
    reading: float
    decoding: float
    entries: int
    held: int


def decoder(layers: int) -> PreTrainedModel:
    """A decoder that reads a token quickly."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2**24,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def marks(
    model: PreTrainedModel, cache: kvweave.CompressedCache, total: int, step: int, chunk: int, tokens: int
) -> Iterator[Mark]:
    """Read `total` tokens in passes of `chunk`; after each `step` decode `tokens`, which are then forgotten."""
    generator = torch.Generator().manual_seed(0)
    step = step // chunk * chunk

    def read(new: int) -> None:
        ids = torch.randint(0, _VOCABULARY, (1, new), generator=generator)
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)

    cache.declare_prompt(2**30)  # passes are cut as `every` says, and no prompt ends
    for number in range(total // step):
        started = time.process_time()
        for _ in range(step // chunk):
            read(chunk)
        reading = (time.process_time() - started) / step
        entries, held = sum(layer.nbytes for layer in cache.compressed_layers), len(pickle.dumps(cache))
        started = time.process_time()
        for _ in range(tokens):
            read(1)
        decoding = (time.process_time() - started) / tokens
        cache.crop(-tokens)
        yield Mark((number + 1) * step, 1e6 * reading, 1e6 * decoding, entries, held)


def rows(bounded: list[Mark], full: list[Mark]) -> list[list[str]]:
    """A row for each length; memory in MiB."""
    table = []
    for number, mark in enumerate(bounded):
        cells = [
            f"{mark.tokens:,}",
            f"{mark.reading:.0f}",
            f"{mark.decoding:.0f}",
            *map(_mib, (mark.entries, mark.held)),
        ]
        other = full[number] if number < len(full) else None
        cells += (
            ["", "", ""] if other is None else [f"{other.reading:.0f}", f"{other.decoding:.0f}", _mib(other.entries)]
        )
        table.append(cells)
    return table


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total", type=int, default=100_000, help="tokens")
    parser.add_argument("--unbounded", type=int, default=20_000, help="tokens that the unbounded cache reads at most")
    parser.add_argument("--every", type=int, default=256, help="tokens after which the cache is cut, and of a pass")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--method", default="snapkv:budget=1024", help="with a budget in tokens or bytes")
    parser.add_argument(
        "--decoded", type=int, default=128, help="tokens that are decoded one at a time at each length"
    )
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = arguments.total // 10, arguments.every, arguments.decoded
    model, method = decoder(arguments.layers), kvweave.parse_method(arguments.method)
    caches = (
        kvweave.CompressedCache(model.config, method, every=arguments.every),
        kvweave.CompressedCache(model.config, kvweave.Full()),
    )
    with kvweave.attach(model):
        bounded, full = (
            list(marks(model, cache, most, *settings))
            for cache, most in zip(caches, (arguments.total, arguments.unbounded), strict=True)
        )
    table = rows(bounded, full)
    title = f"{arguments.method} every {arguments.every} tokens, {arguments.layers} layers"
    show(console(), title, COLUMNS, table)
    text = (
        f"# Over endless input\n\n{(__doc__ or '').strip()}\n\n{title}.\n\n{measure.markdown_table(COLUMNS, table)}"
    )
    data = {"bounded": [vars(mark) for mark in bounded], "full": [vars(mark) for mark in full]}
    for path in measure.write("stream", measure.machine(), data, text, arguments.out):
        console(stderr=True).print(f"wrote {path}")


if __name__ == "__main__":
    main()
