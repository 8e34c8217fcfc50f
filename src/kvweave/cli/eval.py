"""`kvweave eval`: methods x budgets x tasks, measured, as tables with intervals; resumable."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvweave.cli import options
from kvweave.cli.console import bad_input, check_out, command_line, err, print_json, quiet_libraries
from kvweave.cli.console import out as stdout

if TYPE_CHECKING:
    from kvweave.evals import Evaluation
    from kvweave.evals.run import Result


def evaluate(
    model: options.ModelName = "lab",
    tasks: Annotated[list[str] | None, typer.Option(help="Lab tasks, separated by commas; default all.")] = None,
    methods: Annotated[
        list[str] | None, typer.Option(help="Such as snapkv,flowmm:theta=0.3; default all registered.")
    ] = None,
    budgets: Annotated[
        str, typer.Option(help="Shares in (0, 1] or tokens, separated by commas.")
    ] = "0.5,0.2,0.1,0.05",
    count: Annotated[int, typer.Option(help="Samples a task.")] = 100,
    images: Annotated[int, typer.Option(help="Images an album.")] = 8,
    seeds: Annotated[
        str, typer.Option("--seeds", "--seed", help="Of samples and random draws, separated by commas.")
    ] = "0",
    protocol: Annotated[
        str, typer.Option(help="seen: the question is part of what is compressed; unseen: it comes after; or both.")
    ] = "seen",
    baseline: Annotated[
        str | None, typer.Option(help="Method that others are tested against; default snapkv if it is evaluated.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Samples answered together.")] = 50,
    workers: Annotated[int, typer.Option(help="Processes, of one thread each.")] = 2,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    out: Annotated[Path, typer.Option(help="Folder of the results; resumes if it holds some.")] = Path("out/eval"),
    json: options.Json = False,
    pictures: Annotated[
        int, typer.Option(min=0, help="Samples that the page shows kept tokens, speed and flow of; 0: none.")
    ] = 2,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no tables.")] = False,
) -> None:
    """Evaluate methods at equal budgets; interrupted anywhere, the same command resumes.

    Writes a file for each cell under OUT/cells, table.md, table.csv and table.json, and a page, index.html. Exits
    with 1 if samples failed: they are listed, and not scored.
    """
    from kvweave.evals import run, summarise, write_tables
    from kvweave.evals.page import write_page
    from kvweave.evals.tables import rendered

    check_out(out)
    quiet_libraries()
    start = time.perf_counter()
    with bad_input():
        evaluation = _plan(model, tasks, methods, budgets, count, images, seeds, protocol, dtype)
        baseline = _baseline(baseline, evaluation.labels)
        with _Progress(quiet) as progress:
            results = run(
                evaluation,
                out,
                batch=batch,
                workers=workers,
                device=device,
                command=command_line(),
                progress=progress,
            )
    seconds = round(time.perf_counter() - start, 1)
    summary = summarise(evaluation, results, baseline=baseline, command=command_line(), seconds=seconds)
    write_tables(summary, out)
    page = write_page(evaluation, summary, out, samples=pictures, device=device)
    if json:
        print_json(summary)
    elif not quiet:
        stdout().print(rendered(summary))
        stdout().print(f"written: [bold]{page}[/bold], table.md, table.csv, table.json")
    if summary["failed"]:
        err().print(f"{len(summary['failed'])} answers are missing: {out / 'table.md'} lists them", markup=False)
        raise typer.Exit(1)


def _plan(
    model: str,
    tasks: list[str] | None,
    methods: list[str] | None,
    budgets: str,
    count: int,
    images: int,
    seeds: str,
    protocol: str,
    dtype: str,
) -> "Evaluation":
    from kvweave.evals import Evaluation, lab_tasks
    from kvweave.evals.plan import parse_budgets, parse_methods
    from kvweave.lab import TASKS

    return Evaluation(
        model=model,
        tasks=lab_tasks(_pieces(*tasks) if tasks else TASKS, count, images),
        methods=parse_methods(methods or []),
        budgets=parse_budgets([budgets]),
        seeds=_seeds(seeds),
        protocols=tuple(dict.fromkeys(_pieces(protocol))),
        dtype=dtype,
    )


def _baseline(name: str | None, labels: list[str]) -> str | None:
    if name is None:
        return "snapkv" if "snapkv" in labels else None
    if name not in labels:
        raise ValueError(f"baseline={name!r} is not evaluated: allowed is one of {', '.join(labels)}")
    return name


class _Progress:
    """A bar on stderr: cells done, time left, and which cell was the last."""

    def __init__(self, quiet: bool) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            BarColumn(20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self.bar = Progress(*columns, console=err(), disable=quiet, speed_estimate_period=120)
        self.line = self.bar.add_task("starting", total=None)

    def __enter__(self) -> "_Progress":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, result: "Result", done: int, total: int, was_there: bool) -> None:
        cell = result["cell"]
        if was_there:  # does not count for the speed
            self.bar.reset(self.line, completed=done, total=total, description="resumed")
        else:
            what = f"{cell['task']}, {cell['method']} at {cell['budget']:g}, {cell['protocol']}"
            self.bar.update(self.line, completed=done, total=total, description=what)


def _pieces(*texts: str) -> list[str]:
    return [piece.strip() for text in texts for piece in text.split(",") if piece.strip()]


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(piece) for piece in _pieces(text)))
    except ValueError:
        raise ValueError(f"seeds={text!r} is not allowed: allowed is ints >= 0, separated by commas") from None
