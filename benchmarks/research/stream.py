"""What a prefill in chunks with cuts in between costs in answers: smol-text, texts of some hundred tokens.

    python -m benchmarks.research.stream --count 4

The prompt, question at its end, is cut once when it is complete, or again and again while it is read: in chunks of
as many tokens as `every`, so that the cache never holds more than its budget and a chunk. The budget is the same
share of the prompt. What was evicted before the question came cannot return: this is the price. Development seeds;
needs `kvweave lab fetch smol`.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

import kvweave
from benchmarks import measure
from benchmarks.console import console, show
from benchmarks.research.smol import TASKS, TOKENS
from kvweave import models
from kvweave.evals.scores.metrics import METRICS
from kvweave.evals.tasks.text import text_tasks

METHODS = ("streaming_llm", "snapkv", "h2o", "keydiff", "snapkv:window=32,ahead=8,rows_by=max,heads_by=max")
WHOLE = 0  # the prompt is cut once


def scores(
    methods: Sequence[str], count: int, tokens: int, seed: int, share: float, everys: tuple[int, ...]
) -> dict[tuple[str, int], list[float]]:
    """Scores of all samples by method and `every`; of the full cache under ("full", 0)."""
    torch.set_num_threads(1)
    model, processor = models.load("smol-text", dtype="bfloat16")
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for task in text_tasks(TASKS, count, tokens):
        for example in task.examples(seed):
            inputs = dict(models.encode(processor, example.messages))
            length = inputs["input_ids"].shape[1]
            for spelled, every in [("full", WHOLE), *((name, n) for name in methods for n in everys)]:
                method = kvweave.parse_method(spelled, budget=1.0 if spelled == "full" else int(share * length))
                bounds = {"every": every} if every else {}
                chunks = {"prefill_chunk_size": every} if every else {}
                with kvweave.compress(model, method, **bounds):
                    out = model.generate(**inputs, max_new_tokens=TOKENS[task.name], do_sample=False, **chunks)
                text = processor.decode(out[0, length:], skip_special_tokens=True)
                found[spelled, every].append(METRICS[task.metrics[0]](text, example.answer, example.choices))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4, help="samples of each of five tasks")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD")
    parser.add_argument("--tokens", type=int, default=600, help="of a text, about")
    parser.add_argument("--share", type=float, default=0.3, help="of a prompt that is its budget")
    parser.add_argument("--every", type=int, nargs="+", default=[256, 64])
    parser.add_argument("--seed", type=int, default=5001)
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    given = parser.parse_args()
    everys = (WHOLE, *given.every)
    found = scores(given.methods, given.count, given.tokens, given.seed, given.share, everys)
    columns = ["method", "cut once", *(f"every {n}" for n in given.every)]
    full = found["full", WHOLE]
    rows = [["full cache", f"{sum(full) / len(full):.2f}", *("" for _ in given.every)]]
    rows += [[name, *(f"{sum(found[name, n]) / len(full):.2f}" for n in everys)] for name in given.methods]
    title = f"{len(full)} samples, texts of {given.tokens} tokens, {given.share:.0%} of the prompt kept"
    show(console(), title, columns, rows)
    table = measure.markdown_table(columns, rows)
    text = f"# A prefill with cuts in between\n\n{(__doc__ or '').strip()}\n\n{title}.\n\n{table}"
    data = {"scores": [{"method": name, "every": every, "scores": each} for (name, every), each in found.items()]}
    for path in measure.write("stream-smol-text", measure.machine(), data, text, given.out):
        console(stderr=True).print(f"wrote {path}")


if __name__ == "__main__":
    main()
