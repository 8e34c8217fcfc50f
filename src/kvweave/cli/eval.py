"""`kvweave eval`: methods x budgets x tasks, measured, as tables with intervals; resumable."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvweave.cli import options
from kvweave.cli.console import bad_input, check_out, command_line, err, print_json, quiet_libraries
from kvweave.cli.console import out as stdout
from kvweave.cli.tables import fitted

if TYPE_CHECKING:
    from kvweave.evals import Evaluation, Task
    from kvweave.evals.run.plan import Cell
    from kvweave.evals.run.results import Result
    from kvweave.evals.tasks.sources import Source


_Data = Annotated[
    Path | None, typer.Option(help="Folder in MileBench's layout.", show_default="the lab's questions, drawn")
]
_Tasks = Annotated[list[str] | None, typer.Option(help="Separated by commas.", show_default="all")]
_Methods = Annotated[
    list[str] | None, typer.Option(help="Such as snapkv,flowmm:theta=0.3.", show_default="all registered")
]
_Budgets = Annotated[str, typer.Option(help="Shares in (0, 1] or tokens, separated by commas.")]
_Count = Annotated[
    int | None, typer.Option(help="Samples a task.", show_default="100 of the lab's, all of a folder's")
]
_Images = Annotated[int | None, typer.Option(help="Images an album, of generated ones.", show_default="8")]
_Tokens = Annotated[int | None, typer.Option(help="Of the texts that smol-text is asked about.", show_default="600")]
_Seeds = Annotated[str, typer.Option("--seeds", "--seed", help="Of samples and random draws, separated by commas.")]
_Protocol = Annotated[
    str,
    typer.Option(
        help="seen: the question is part of what is compressed; unseen: it comes after; probed: after the "
        "processor's own probes; or several."
    ),
]
_Combined = Annotated[int | None, typer.Option(help="Ask about each sample's images combined into so many (1, ...).")]
_Adversarial = Annotated[bool, typer.Option("--adversarial", help="The folder's -adv.json questions.")]
_Scoring = Annotated[str, typer.Option(help="official: MileBench's metrics; strict: without their quirks.")]
_Truncation = Annotated[str, typer.Option(help="ours: none; official: MileBench's, from the left.")]
_MaxContextLen = Annotated[int, typer.Option(help="Tokens left by the official truncation.")]
_TokensPerImage = Annotated[int, typer.Option(help="As the official truncation counts an image.")]
_MaxNewTokens = Annotated[
    int | None,
    typer.Option(help="Where an answer is cut off.", show_default="what the task says, 512 in MileBench"),
]
_Baseline = Annotated[
    str | None,
    typer.Option(help="Method that others are tested against.", show_default="snapkv, if it is evaluated"),
]
_Fidelity = Annotated[
    bool, typer.Option("--fidelity/--no-fidelity", help="Compare with the full cache token by token.")
]
_Batch = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        "--batch",
        help="Prompts answered together.",
        show_default="50 for lab, 20 for smol, 8 for smol-text, else 1",
    ),
]
_Workers = Annotated[int, typer.Option(help="Processes.")]
_Ray = Annotated[
    str | None,
    typer.Option(help="Share the plan over a Ray cluster: its address, auto or local; --workers of it."),
]
_Out = Annotated[Path, typer.Option(help="Folder of the results; resumes if it holds some.")]
_Pictures = Annotated[
    int,
    typer.Option(**options.NUMBER, help="Samples that the page shows kept tokens, speed and flow of; 0: none."),
]
_Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no tables.")]


def evaluate(
    model: options.ModelName = "lab",
    data: _Data = None,
    tasks: _Tasks = None,
    methods: _Methods = None,
    budgets: _Budgets = "0.5,0.2,0.1,0.05",
    count: _Count = None,
    images: _Images = None,
    tokens: _Tokens = None,
    questions: options.Questions = None,
    seeds: _Seeds = "0",
    protocol: _Protocol = "seen",
    combined: _Combined = None,
    adversarial: _Adversarial = False,
    scoring: _Scoring = "official",
    truncation: _Truncation = "ours",
    max_context_len: _MaxContextLen = 4096,
    tokens_per_image: _TokensPerImage = 576,
    max_new_tokens: _MaxNewTokens = None,
    baseline: _Baseline = None,
    fidelity: _Fidelity = True,
    batch: _Batch = None,
    workers: _Workers = 1,
    ray: _Ray = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    out: _Out = Path("out/eval"),
    json: options.Json = False,
    pictures: _Pictures = 2,
    quiet: _Quiet = False,
) -> None:
    """Evaluate methods at equal budgets; interrupted anywhere, the same command resumes.

    Writes a file for each cell under OUT/cells, table.md, table.csv and table.json, and a page, index.html; of a
    folder in MileBench's layout also OUT/outputs, which its own scorer reads. Exits with 1 if samples failed: they
    are listed, not scored.
    """
    from kvweave.evals import Evaluation, summarise
    from kvweave.evals.run.plan import parse_budgets, parse_methods

    check_out(out)
    quiet_libraries()
    reading: dict[str, Any] = {"count": count, "combined": combined, "adversarial": adversarial}
    reading |= {"scoring": scoring, "max_new_tokens": max_new_tokens, "tokens_per_image": tokens_per_image}
    reading |= {"truncation": truncation, "max_context_len": max_context_len}
    with bad_input(), options.model_errors():
        asked = _asked(model, data, questions, _pieces(*tasks or []), {"images": images, "tokens": tokens}, reading)
        named, shares, drawn = parse_methods(methods or []), parse_budgets([budgets]), _seeds(seeds)
        protocols = tuple(dict.fromkeys(_pieces(protocol)))
        evaluation = Evaluation(model, asked, named, shares, drawn, protocols, dtype, fidelity, trust_remote_code)
        baseline = _baseline(baseline, evaluation.labels)
        results, seconds = _measured(evaluation, out, batch, workers, ray, device, quiet)
    summary = summarise(evaluation, results, baseline=baseline, command=command_line(), seconds=seconds)
    page, layout = _written(evaluation, results, summary, out, pictures, device)
    if json:
        print_json(summary)
    elif not quiet:
        _print(summary, page, layout)
    _refuse_gaps(summary, out)


def _asked(
    model: str,
    data: Path | None,
    questions: str | None,
    names: list[str],
    sizes: dict[str, int | None],
    reading: dict[str, Any],
) -> "tuple[Task, ...]":
    """The tasks: those of a folder, or generated ones."""
    if data is not None:
        reading |= {"tokenizer": model if reading["truncation"] == "official" else ""}
        return _milebench(data, names, reading, sizes | {"questions": questions})
    return _generated(options.source(model, questions), names, reading["count"], sizes, reading)


def _measured(
    evaluation: "Evaluation", out: Path, batch: int | None, workers: int, ray: str | None, device: str, quiet: bool
) -> "tuple[list[Result], float]":
    """All cells, a progress bar running, and the seconds that they took."""
    from kvweave.evals import run

    start = time.perf_counter()
    batch = options.batch_size(evaluation.model) if batch is None else batch
    with CellProgress(quiet) as progress:
        shown: dict[str, Any] = {"progress": progress, "tick": progress.tick, "command": command_line()}
        results = run(evaluation, out, batch=batch, workers=workers, ray=ray, device=device, **shown)
    return results, round(time.perf_counter() - start, 1)


def _written(
    evaluation: "Evaluation",
    results: "list[Result]",
    summary: dict[str, Any],
    out: Path,
    pictures: int,
    device: str,
) -> tuple[Path, Path | None]:
    """The page, and the folder that MileBench's scorer reads, where there is one; tables beside them."""
    from kvweave.evals import write_tables
    from kvweave.evals.tables.outputs import write_outputs
    from kvweave.evals.tables.page import write_page

    write_tables(summary, out)
    layout = write_outputs(evaluation, results, out)
    return write_page(evaluation, summary, out, samples=pictures, device=device), layout


def _generated(
    source: "Source", names: list[str], count: int | None, sizes: dict[str, int | None], reading: dict[str, Any]
) -> "tuple[Task, ...]":
    """Generated tasks; refuses what `reading` says of a folder's samples."""
    from kvweave.evals.tasks.sources import make_tasks

    foreign = {option: reading[option] for option in ("combined", "adversarial", "max_new_tokens")}
    foreign |= {"scoring": reading["scoring"] != "official", "truncation": reading["truncation"] != "ours"}
    for option, value in foreign.items():
        if value:
            raise ValueError(f"--{option.replace('_', '-')} is for a folder of data: allowed is --data with it")
    return make_tasks(source, names, count, **sizes)


def _milebench(data: Path, names: list[str], reading: dict[str, Any], foreign: dict[str, Any]) -> "tuple[Task, ...]":
    """A folder's tasks; refuses what only generated questions have."""
    from kvweave.evals import Options, milebench_tasks

    for option, size in foreign.items():
        if size is not None:
            raise ValueError(f"--{option} {size} is for generated questions: a folder's samples have theirs")
    return milebench_tasks(data, names, Options(**reading))


def _print(summary: dict[str, Any], page: Path, layout: Path | None) -> None:
    """The tables and notes, and where they were written."""
    from kvweave.evals.tables.tables import notes, tables

    screen = stdout()
    for title, head, rows in tables(summary):
        for table in fitted(title, head, rows):
            screen.print(table)
    for note, items in notes(summary):
        screen.print("\n  ".join([note, *items]), markup=False)
    screen.print(f"written: [bold]{page}[/bold], table.md, table.csv, table.json")
    if layout is not None:
        screen.print(f"written: [bold]{layout}[/bold], as MileBench's scorer reads it")


def _refuse_gaps(summary: dict[str, Any], out: Path) -> None:
    """Exit with 1 where answers are missing."""
    if summary["failed"]:
        err().print(f"{len(summary['failed'])} answers are missing: {out / 'table.md'} lists them", markup=False)
        raise typer.Exit(1)


def _baseline(name: str | None, labels: list[str]) -> str | None:
    if name is None:
        return "snapkv" if "snapkv" in labels else None
    if name not in labels:
        raise ValueError(f"baseline={name!r} is not evaluated: allowed is one of {', '.join(labels)}")
    return name


class CellProgress:
    """A bar on stderr: share of the cells done, time left, and which cell is at work or was the last."""

    def __init__(self, quiet: bool) -> None:
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            BarColumn(20),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self.done = 0
        self.bar = Progress(*columns, console=err(), disable=quiet, speed_estimate_period=120)
        self.line = self.bar.add_task("starting", total=None)

    def __enter__(self) -> "CellProgress":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, result: "Result", done: int, total: int, was_there: bool) -> None:
        self.done = done
        if was_there:  # does not count for the speed
            self.bar.reset(self.line, completed=done, total=total, description="resumed")
        else:
            what = _named(result["cell"])
            self.bar.update(self.line, completed=done, total=total, description=f"{done} of {total} cells, {what}")

    def tick(self, cell: "Cell", done: int, total: int) -> None:
        """Hear of samples that are done of the cell at work."""
        what = f"{_named(cell.key)}: {done} of {total} samples"
        self.bar.update(self.line, completed=self.done + done / total, description=what)


def _named(cell: dict[str, Any]) -> str:
    return f"{cell['task']}, {cell['method']} at {cell['budget']:g}, {cell['protocol']}"


def _pieces(*texts: str) -> list[str]:
    return [piece.strip() for text in texts for piece in text.split(",") if piece.strip()]


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(piece) for piece in _pieces(text)))
    except ValueError:
        raise ValueError(f"seeds={text!r} is not allowed: allowed is ints >= 0, separated by commas") from None
