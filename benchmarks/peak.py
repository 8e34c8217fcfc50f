"""The most memory that each method holds at once, into docs/CHOOSING.md between its marks.

    python -m benchmarks.peak

`smol` reads one album of eight pictures at 20 %; bytes are those of keys and values, as the report counts them.
"""

from pathlib import Path

import torch

import kvweave
from kvweave import models
from kvweave.evals.run import store
from kvweave.evals.tasks.smol import smol_tasks
from kvweave.methods import list_methods, parse_method
from kvweave.methods.base import Method

PAGE = Path(__file__).parents[1] / "docs" / "CHOOSING.md"
BEGIN, END = (f"<!-- {word}: peak, written by `python -m benchmarks.peak` -->" for word in ("begin", "end"))
BUDGET, PICTURES, TOKENS = 0.2, 8, 12


def waits_for(method: Method) -> str:
    """What a layer's cut waits for, in words."""
    if method.needs.replay:
        return "the context, read again"
    if method.defer:
        return f"{method.defer} decoded tokens"
    return "the last layer" if method.layer_adaptive else "nothing"


def table() -> str:
    """Methods as they come, by the most that they hold, in shares of the full cache."""
    model, processor = models.load("smol")
    (task,) = smol_tasks(["image_needle"], 1, PICTURES)
    inputs = models.encode(processor, task.examples(0)[0].messages)
    alike: dict[tuple[str, str, str], list[str]] = {}
    for name in list_methods():
        method = parse_method(name, budget=BUDGET)
        with kvweave.compress(model, method) as session, torch.inference_mode():
            model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        working = session.working or method
        told = session.report["totals"]
        peak, kept = (f"{told[what] / told['bytes_before']:.0%}" for what in ("peak_bytes", "bytes"))
        alike.setdefault((peak, kept, waits_for(working)), []).append(f"`{name}`")
    length, layers = inputs["input_ids"].shape[1], model.config.get_text_config().num_hidden_layers
    lines = [
        f"`smol`, {layers} layers, a prompt of {length} tokens, in shares of the full cache:",
        "",
        "| at its peak | after the cut | a layer's cut waits for | methods |",
        "|--:|--:|---|---|",
    ]
    ordered = sorted(alike.items(), key=lambda row: int(row[0][0].rstrip("%")))
    lines += [f"| {peak} | {kept} | {wait} | {', '.join(names)} |" for (peak, kept, wait), names in ordered]
    return "\n".join(lines)


def main() -> None:
    """Write the table where it stands."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    store.write_text(PAGE, f"{before}{BEGIN}\n{table()}\n{END}{after}")


if __name__ == "__main__":
    main()
