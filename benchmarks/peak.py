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
BUDGETS = (0.2, 0.1, 0.05)
COARSE = ("weave", "weave:coarse=2", "weave:coarse=1", "weave:form=even,coarse=2")


def waits_for(method: Method) -> str:
    """What a layer's cut waits for, in words."""
    if method.needs.replay:
        return "the context, read again"
    if method.defer:
        first = method.coarse_cut is not None and not method.coarse_refusal
        return f"{method.defer} decoded tokens" + (", a first cut meanwhile" if first else "")
    return "the last layer" if method.layer_adaptive else "nothing"


class Album:
    """`smol` and what it reads."""

    def __init__(self) -> None:
        self.model, processor = models.load("smol")
        (task,) = smol_tasks(["image_needle"], 1, PICTURES)
        self.inputs = models.encode(processor, task.examples(0)[0].messages)
        self.length = self.inputs["input_ids"].shape[1]
        self.layers = self.model.config.get_text_config().num_hidden_layers

    def shares(self, method: Method) -> tuple[str, str, Method]:
        """Of the full cache, what the method has at its peak and what is left after its cut; and how it works."""
        with kvweave.compress(self.model, method) as session, torch.inference_mode():
            self.model.generate(**self.inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        totals = session.report["totals"]
        peak, kept = (f"{totals[what] / totals['bytes_before']:.0%}" for what in ("peak_bytes", "bytes"))
        return peak, kept, session.working or method


def by_method(album: Album) -> list[str]:
    """Methods as they come, by the most that they hold."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for name in list_methods():
        peak, kept, working = album.shares(parse_method(name, budget=BUDGET))
        alike.setdefault((peak, kept, waits_for(working)), []).append(f"`{name}`")
    ordered = sorted(alike.items(), key=lambda row: int(row[0][0].rstrip("%")))
    return [
        f"`smol`, {album.layers} layers, a prompt of {album.length} tokens, in shares of the full cache:",
        "",
        "| at its peak | after the cut | a layer's cut waits for | methods |",
        "|--:|--:|---|---|",
        *(f"| {peak} | {kept} | {wait} | {', '.join(names)} |" for (peak, kept, wait), names in ordered),
    ]


def by_budget(album: Album) -> list[str]:
    """The peak of `weave` with a first cut and without."""
    rows = [
        [f"`{spelled}`", *(album.shares(parse_method(spelled, budget=budget))[0] for budget in BUDGETS)]
        for spelled in COARSE
    ]
    return [
        "The peak of `weave` with a first cut and without:",
        "",
        "| | " + " | ".join(f"{budget:.0%}" for budget in BUDGETS) + " |",
        "|---|" + "--:|" * len(BUDGETS),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def table() -> str:
    """All of it, in shares of the full cache."""
    album = Album()
    return "\n".join([*by_method(album), "", *by_budget(album)])


def main() -> None:
    """Write the table where it stands."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    store.write_text(PAGE, f"{before}{BEGIN}\n{table()}\n{END}{after}")


if __name__ == "__main__":
    main()
