"""What methods keep of a real model's replies, side by side and quickly: `python -m benchmarks.research.scores`.

One prefill and one reply of the full cache are shared by all methods and budgets. Each method cuts the cache as it
does in `kvweave eval`; then the full cache's reply is read from what is left in one forward pass, which gives the KL
of each next token (as eval's fidelity, which reads it token by token), and whether every one of them is the full
cache's. `--answers` lets the model also answer freely. Results go to a file, a line a sample; what is there already
is not asked again, and the tables are of all that is there of these methods. Needs `kvweave lab fetch smol`.
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import kvweave
from benchmarks import measure
from kvweave import models
from kvweave.evals.answer.answering import Batch, answer, prefill, prepare
from kvweave.evals.answer.fidelity import Fidelity, Reference, compared
from kvweave.evals.answer.prefill import Prefill
from kvweave.evals.scores.metrics import METRICS
from kvweave.evals.tables.intervals import compare, estimate
from kvweave.evals.tasks.smol import smol_tasks
from kvweave.evals.tasks.tasks import Example
from kvweave.evals.tasks.text import text_tasks
from kvweave.lab.smol import FAMILIES
from kvweave.methods import Method

#: What is asked, and of which model: KL is the question of free text, right answers that of the others.
SETS = {
    "prose": ("smol-text", ("prose",)),
    "texts": ("smol-text", ("needle", "reversed", "records", "several", "copy")),
    "albums": ("smol", FAMILIES),
}

#: Of free text a shorter reply tells too little.
SHORTEST = 16


def batches(what: str, count: int, rows: int, seed: int) -> Iterator[tuple[list[Any], list[Example]]]:
    """`count` samples of each task of a set, so many in a batch, tasks with answers of like length together."""
    _, names = SETS[what]
    tasks = smol_tasks(names, count) if what == "albums" else text_tasks(names, count)
    for most in sorted({task.max_new_tokens for task in tasks}):
        alike = [task for task in tasks if task.max_new_tokens == most]
        turns = zip(*([(task, one) for one in task.examples(seed)] for task in alike), strict=True)
        pairs = [pair for turn in turns for pair in turn]
        for start in range(0, len(pairs), rows):
            part = pairs[start : start + rows]
            yield [task for task, _ in part], [one for _, one in part]


@torch.inference_mode()
def expected(model: Any, method: Method, batch: Batch, replies: Sequence[list[int]], shared: Prefill) -> list[Any]:
    """Logits along given replies, all of them read at once from what a method leaves: for each row [tokens - 1,
    vocabulary]."""
    if method.defer:
        method = replace(method, redecode=True)
    inputs = {name: x for name, x in batch.inputs.items() if not name.startswith("pixel_values")}
    width = max(map(len, replies)) - 1
    ids = torch.tensor([reply[:-1] + [0] * (width + 1 - len(reply)) for reply in replies])
    with kvweave.compress(model, method) as session, shared.replayed(model):
        model.generate(**inputs, do_sample=False, max_new_tokens=method.defer + 1)  # of fewer it would not be cut
        cache = session.cache
        assert cache is not None
        cache.crop(shared.start - cache.get_seq_length())
        cache.freeze()
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], 1)
        places = (mask.cumsum(-1) - 1)[:, -width:]
        logits = model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits
    return [row[: len(reply) - 1] for row, reply in zip(logits, replies, strict=True)]


def references(model: Any, batch: Batch, shared: Prefill) -> list[Reference]:
    """What the full cache said to each sample."""
    ends = model.generation_config.eos_token_id
    stops = set(ends if isinstance(ends, list) else [ends])
    replies = [_ended(row, stops) for row in shared.tokens[:, shared.start :].tolist()]
    logits = expected(model, kvweave.parse_method("full"), batch, replies, shared)
    return [Reference.of(reply, 1, rows) for reply, rows in zip(replies, logits, strict=True)]


def _ended(row: list[int], stops: set[int]) -> list[int]:
    """Up to the first token that ends a reply."""
    return row[: next((n + 1 for n, token in enumerate(row) if token in stops), len(row))]


def ask(given: argparse.Namespace) -> None:
    """Append what is not in the file yet."""
    known = {tuple(row["key"]) for row in rows_of(given.file)}
    name, _ = SETS[given.what]
    model, processor = models.load(name, dtype=given.dtype)
    asked = [(text, budget) for text in given.methods for budget in given.budgets]
    for seed in given.seeds:
        for tasks, examples in batches(given.what, given.count, given.rows, seed):
            left = [pair for pair in asked if any((*pair, one.id) not in known for one in examples)]
            if not left:
                continue
            batch = prepare(processor, examples, "seen")
            shared = prefill(model, batch, tasks[0].max_new_tokens)
            whole = references(model, batch, shared)
            texts = processor.batch_decode([one.tokens for one in whole], skip_special_tokens=True)
            full = [_score(*three) for three in zip(tasks, examples, texts, strict=True)]
            for text, budget in left:
                start = time.process_time()
                method = kvweave.parse_method(text, budget=budget)
                found = expected(model, method, batch, [one.tokens for one in whole], shared)
                scores: list[float | None] = [None] * len(examples)
                if given.answers:
                    said = answer(model, processor, method, batch, tasks[0].max_new_tokens, shared)
                    scores = [_score(t, e, one.text) for t, e, one in zip(tasks, examples, said, strict=True)]
                with given.file.open("a", encoding="utf-8") as file:
                    for n, (task, one) in enumerate(zip(tasks, examples, strict=True)):
                        near = _told(compared(whole[n], [], found[n]))
                        row = {"key": [text, budget, one.id], "task": task.name, "full": full[n], "score": scores[n]}
                        file.write(json.dumps(row | near) + "\n")
                print(f"{time.process_time() - start:.1f} s {text} {budget} {examples[0].id}", file=sys.stderr)


def _score(task: Any, example: Example, text: str) -> float:
    return METRICS[task.metrics[0]](text.strip(), example.answer, example.choices)


def _told(near: Fidelity | None) -> dict[str, Any]:
    """How near a reply is, where one came from the cache: `kl`; `same`: no token would have been another."""
    if near is None:
        return {"tokens": 0}
    return {"tokens": near.tokens, "kl": near.kl, "same": float(near.top1 == 1)}


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What was written so far, each sample once."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return list({tuple(row["key"]): row for row in map(json.loads, lines)}.values())


Scores = dict[str, dict[str, float]]  # by task and sample


def table(rows: Sequence[dict[str, Any]], methods: Sequence[str], budgets: Sequence[float], measure_of: str) -> str:
    """A measure by method and budget: its mean over tasks, the median of its samples, and the mean's difference to
    the first method on the same samples with its 95 % interval."""
    found: dict[tuple[str, float], Scores] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        text, budget, sample = row["key"]
        if row.get(measure_of) is not None and (row["task"] != "prose" or row["tokens"] >= SHORTEST - 1):
            found[text, budget][row["task"]][sample] = row[measure_of]
    lines = []
    for text in methods:
        line = [f"`{text}`"]
        for budget in budgets:
            scores, base = found[text, budget], found[methods[0], budget]
            mean = estimate([list(of.values()) for of in scores.values()], shares=measure_of != "kl")
            if mean is None:
                line += ["", ""]
                continue
            middle = statistics.median(x for of in scores.values() for x in of.values())
            shown = f"{mean.mean:.3f} ({middle:.3f})" if measure_of == "kl" else f"{mean.mean:.2f}"
            line.append(f"{shown}, {sum(map(len, scores.values()))}")
            against = compare(scores, base) if text != methods[0] and set(scores) <= set(base) else None
            line.append(
                "" if against is None else f"{against.difference:+.3f} [{against.low:+.3f}, {against.high:+.3f}]"
            )
        lines.append(line)
    heads = ["method", *(head for budget in budgets for head in (f"{100 * budget:g} %, n", "difference"))]
    return measure.markdown_table(heads, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=SETS, default="prose")
    parser.add_argument("--methods", nargs="+", default=["weave"], help="the others are held against the first")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.2, 0.1, 0.05])
    parser.add_argument("--count", type=int, default=12, help="samples of each task and seed")
    parser.add_argument("--rows", type=int, default=6, help="prompts in a batch")
    parser.add_argument("--seeds", type=int, nargs="+", default=[78])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--answers", action="store_true", help="also answer freely, and score it")
    parser.add_argument("--out", type=Path, default=Path("out/research"), help="folder")
    given = parser.parse_args(arguments)
    given.file = given.out / f"scores-{given.what}.jsonl"
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    ask(given)
    rows = rows_of(given.file)
    tables = {"KL to the full cache along its reply, nats: mean (median), samples": "kl"}
    if given.what != "prose":
        tables |= {"No token of the reply another": "same", "Right answers": "score"}
    text = "# What replies keep\n"
    for name, of in tables.items():
        text += f"\n**{name}**\n\n{table(rows, given.methods, given.budgets, of)}"
    print(text)
    measure.write(f"scores-{given.what}", measure.machine(), {"rows": rows}, text, given.out)


if __name__ == "__main__":
    main()
