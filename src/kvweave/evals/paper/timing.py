"""Time: of decoding by budget, and what compressing adds to a prefill, by length.

Both run on a prefill that is computed once (`evals.prefill`), so that only what differs is timed: rounds in which
every candidate runs once, and the median over rounds. On a CPU it is the process' own time, which other work on the
machine hardly touches; on a GPU the clock's, after the device is done.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvweave.evals.answer.answering import prefill, prepare
from kvweave.evals.answer.prefill import Prefill
from kvweave.evals.one.collect import machine
from kvweave.evals.one.generating import Arrivals
from kvweave.evals.paper.printed import read
from kvweave.evals.paper.recipe import Recipe
from kvweave.evals.paper.sheet import Sheet, Table
from kvweave.evals.paper.subject import Subject
from kvweave.evals.tasks.tasks import Example, Task
from kvweave.methods import Method, get_method, list_methods
from kvweave.methods.full import Full
from kvweave.models import LABS
from kvweave.report import charts
from kvweave.seam.entry import compress

BUDGETS = (1.0, 0.5, 0.35, 0.2, 0.05)
ROUNDS = 5
TOKENS = 16  # decoded in each round
ROWS = 8  # prompts decoded together
_BUDGET = 0.2  # at which added time is measured


def clock(device: torch.device) -> float:
    """Seconds of this process, or with a GPU of the clock once it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def rounds(runs: Mapping[str, Callable[[], float]], count: int = ROUNDS) -> dict[str, float]:
    """Median over rounds of the seconds that each run says it took; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(count + 1):
        for name, run in runs.items():
            took = run()
            if turn:
                seconds[name].append(took)
    return {name: statistics.median(times) for name, times in seconds.items()}


# -------------------------------------------------------------------- decoding


def decoding(subject: Subject, tasks: Sequence[Task], methods: Sequence[str]) -> dict[str, Any]:
    """Milliseconds a token and bytes of the cache at each budget, on the longest prompts."""
    model, processor = subject.load()
    examples = [example for task in tasks for example in task.examples(0)[:ROWS]]
    batch = prepare(processor, _longest(processor, examples), "seen")
    shared = prefill(model, batch, 2)
    inputs = _without_pixels(batch.inputs, model)
    sizes: dict[str, Any] = {}
    runs = {}
    for name in methods:
        for budget in BUDGETS:
            method = Full() if budget == 1 else get_method(name, budget=budget)
            runs[f"{name} {budget:g}"] = partial(_decode, model, inputs, shared, method, sizes, f"{name} {budget:g}")
    medians = rounds(runs)
    rows = []
    for name in methods:
        rows += [
            {
                "method": name,
                "budget": budget,
                "milliseconds": 1e3 * medians[f"{name} {budget:g}"],
                "bytes": sizes[f"{name} {budget:g}"],
            }
            for budget in BUDGETS
        ]
    return {
        "rows": rows,
        "prompts": len(batch.examples),
        "length": shared.start,
        "machine": machine(str(model.device)),
        "rounds": ROUNDS,
    }


def _longest(processor: Any, examples: Sequence[Example]) -> list[Example]:
    """The examples with most images, one batch of them."""
    return sorted(examples, key=_images)[-ROWS:]


def _images(example: Example) -> int:
    return sum(piece["type"] == "image" for message in example.messages for piece in message["content"])


def _decode(
    model: Any, inputs: dict[str, Tensor], shared: Prefill, method: Method, sizes: dict[str, Any], name: str
) -> float:
    """Median seconds from one token to the next."""
    steps = Arrivals(partial(clock, model.device))
    lengths = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    with torch.inference_mode(), compress(model, method) as session, shared.replayed(model):
        model.generate(**inputs, do_sample=False, streamer=steps, **lengths)
    sizes[name] = session.report["totals"]["bytes"]
    times = steps.times[2:]  # the prompt, the token of the prefill
    return statistics.median(after - before for before, after in itertools.pairwise(times))


def decode_sheet(recipe: Recipe, subject: Subject, measured: dict[str, Any]) -> Sheet:
    """Budgets down; time, memory, and their shares of the full cache's."""
    rows = measured["rows"]
    full = {row["method"]: row for row in rows if row["budget"] == 1}
    table = Table(
        f"{measured['prompts']} prompts of up to {measured['length']} tokens decoded together",
        ["kept", "ms a token", "of full", "KV MiB", "of full"],
        [
            [
                f"{100 * row['budget']:g} %",
                f"{row['milliseconds']:.2f}",
                f"{row['milliseconds'] / full[row['method']]['milliseconds']:.0%}",
                f"{row['bytes'] / 2**20:.2f}",
                f"{row['bytes'] / full[row['method']]['bytes']:.0%}",
            ]
            for row in rows
        ],
    )
    own = read("table2")
    paper = ", ".join(
        f"{100 * budget:g} %: {ms:g} ms and {gib:g} GiB"
        for budget, ms, gib in zip(own["budget"], own["decode_ms_per_token"], own["kv_gib"], strict=True)
    )
    notes = [
        f"Median of {measured['rounds']} interleaved rounds of {TOKENS} tokens. {measured['machine']}.",
        f"The paper, {own['model']} on an {own['gpu']}, another machine and not comparable: {paper}.",
    ]
    if subject.model in LABS:
        notes.append(
            "The lab model is so small that a token's time is Python's, not the cache's: see `make bench-decode`."
        )
    budgets = [100 * row["budget"] for row in rows]
    draw = partial(
        charts.pair,
        ("share of the cache kept, %", budgets),
        [
            ("ms a token", [row["milliseconds"] for row in rows]),
            ("KV cache, MiB", [row["bytes"] / 2**20 for row in rows]),
        ],
    )
    return Sheet(recipe.name, recipe.title, recipe.shows, [table], notes, measured, draw, _about(subject))


# -------------------------------------------------------------------- what compressing adds


def added(subject: Subject, tasks: Sequence[Task], methods: Sequence[str]) -> dict[str, Any]:
    """Seconds that each method's cut takes, and the prefill's own, by length.

    A cut that waits for decoded tokens is counted where it is made: against a full cache that decodes as many.
    """
    model, processor = subject.load()
    rows: list[dict[str, Any]] = []
    for example in _spread([example for task in tasks for example in task.examples(0)[:1]]):
        batch = prepare(processor, [example], "seen")
        shared = prefill(model, batch, 1)
        inputs = {name: tensor.to(model.device) for name, tensor in batch.inputs.items()}
        chosen = {name: get_method(name, budget=_BUDGET) for name in list_methods() if name != "full"}
        runs: dict[str, Callable[[], float]] = {"prefill": partial(_prefill, model, inputs)}
        waits = {method.defer for method in chosen.values()}
        runs |= {f"full, {n}": partial(_cut, model, inputs, shared, Full(), n) for n in waits}
        runs |= {name: partial(_cut, model, inputs, shared, m, m.defer) for name, m in chosen.items()}
        medians = rounds(runs)
        rows.append(
            {
                "length": shared.start,
                "prefill": medians["prefill"],
                "added": {
                    name: max(0.0, medians[name] - medians[f"full, {method.defer}"])
                    for name, method in chosen.items()
                },
            }
        )
    rows.sort(key=lambda row: row["length"])
    return {"rows": rows, "budget": _BUDGET, "machine": machine(str(model.device)), "rounds": ROUNDS}


def _spread(examples: Sequence[Example], count: int = 5) -> list[Example]:
    """Examples of few and of many images."""
    ordered = sorted(examples, key=_images)
    places = [round(n * (len(ordered) - 1) / max(1, count - 1)) for n in range(count)]
    return [ordered[place] for place in dict.fromkeys(places)]


def _prefill(model: Any, inputs: dict[str, Tensor]) -> float:
    start = clock(model.device)
    with torch.inference_mode():
        model(**inputs, logits_to_keep=1)
    return clock(model.device) - start


def _cut(model: Any, inputs: dict[str, Tensor], shared: Prefill, method: Method, tokens: int) -> float:
    """Seconds to fill a cache with a known prefill and cut it, with its statistics and what tokens it waits for."""
    shared.memo.clear()
    lengths = {"max_new_tokens": tokens + 1, "min_new_tokens": tokens + 1}  # the first is the prefill's
    with torch.inference_mode(), compress(model, method), shared.replayed(model):
        start = clock(model.device)
        if tokens:
            model.generate(**_without_pixels(inputs, model), do_sample=False, **lengths)
        else:
            model(**_without_pixels(inputs, model), logits_to_keep=1, use_cache=True)
        return clock(model.device) - start


def _without_pixels(inputs: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    return {name: x.to(model.device) for name, x in inputs.items() if not name.startswith("pixel_values")}


def added_sheet(recipe: Recipe, subject: Subject, measured: dict[str, Any]) -> Sheet:
    """Methods down, lengths across: milliseconds added, and the share of the longest prefill."""
    rows = measured["rows"]
    names = sorted(rows[-1]["added"], key=lambda name: rows[-1]["added"][name])
    last = rows[-1]
    table = Table(
        f"Milliseconds added to a prefill at {100 * measured['budget']:g} %, one prompt",
        ["method", *(f"{row['length']} tokens" for row in rows), "of the longest prefill"],
        [["(prefill itself)", *(f"{1e3 * row['prefill']:.1f}" for row in rows), "100 %"]]
        + [
            [
                name,
                *(f"{1e3 * row['added'][name]:.1f}" for row in rows),
                f"{last['added'][name] / last['prefill']:.0%}",
            ]
            for name in names
        ],
    )
    notes = [
        f"Median of {measured['rounds']} interleaved rounds; each method computes its own statistics. A cut that "
        "waits for decoded tokens is counted and those tokens are not: the difference of two runs that decode, and "
        f"less sure. {measured['machine']}.",
        "The paper's picture is of other models and other GPUs: no numbers of it stand here.",
    ]
    marked = {"flashcache", "flowmm", "lookm", "snapkv"}
    lengths = [row["length"] for row in rows]
    lines = [charts.Curve(n, lengths, [1e3 * row["added"][n] for row in rows], marked=n in marked) for n in names]
    lines.append(charts.Curve("prefill", lengths, [1e3 * row["prefill"] for row in rows], limit=True))
    draw = partial(charts.lengths, lines)
    return Sheet(recipe.name, recipe.title, recipe.shows, [table], notes, measured, draw, _about(subject))


def _about(subject: Subject) -> list[str]:
    return [f"Command: `{subject.command}`", f"Model `{subject.model}`."]
