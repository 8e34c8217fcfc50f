"""`kvweave eval`: methods x budgets x tasks, measured, as tables with intervals; resumable."""

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[str, typer.Option(help="A hub id, a local folder, or lab.")] = "lab",
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
    out: Annotated[Path, typer.Option(help="Folder of the results; resumes if it holds some.")] = Path("out/eval"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress, no tables.")] = False,
) -> None:
    """Evaluate methods at equal budgets; interrupted anywhere, the same command resumes.

    Writes a file for each cell under OUT/cells, and table.md, table.csv and table.json. Exits with 1 if samples
    failed: they are listed, and not scored.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Left

    from kvweave.evals.plan import Evaluation, parse_budgets, parse_methods
    from kvweave.evals.run import Result, run
    from kvweave.evals.tables import rendered, summarise, write_tables
    from kvweave.evals.tasks import lab_tasks
    from kvweave.lab import TASKS

    chosen = _pieces(*tasks) if tasks else list(TASKS)
    evaluation = Evaluation(
        model=model,
        tasks=lab_tasks(chosen, count, images),
        methods=parse_methods(methods or []),
        budgets=parse_budgets([budgets]),
        seeds=_seeds(seeds),
        protocols=tuple(dict.fromkeys(_pieces(protocol))),
    )
    if baseline is None:
        baseline = "snapkv" if "snapkv" in evaluation.labels else None
    elif baseline not in evaluation.labels:
        raise ValueError(f"baseline={baseline!r} is not evaluated: allowed is one of {', '.join(evaluation.labels)}")

    command = shlex.join(["kvweave", *sys.argv[1:]])
    errors = Console(stderr=True)
    start = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), Left())
    with Progress(*columns, console=errors, disable=quiet, speed_estimate_period=120) as bar:
        line = bar.add_task("starting", total=None)

        def show(result: Result, done: int, total: int, was_there: bool) -> None:
            cell = result["cell"]
            what = f"{cell['protocol']} {cell['task']} {cell['method']} {cell['budget']:g}"
            if was_there:
                bar.reset(line, completed=done, total=total, description=f"{done} cells were there")
            else:
                bar.update(line, completed=done, total=total, description=what)

        results = run(evaluation, out, batch=batch, workers=workers, command=command, progress=show)
    summary = summarise(
        evaluation, results, baseline=baseline, command=command, seconds=round(time.perf_counter() - start, 1)
    )
    write_tables(summary, out)
    if as_json:
        typer.echo(json.dumps(summary, ensure_ascii=False))
    elif not quiet:
        Console().print(rendered(summary))
        Console().print(f"Written to {out / 'table.md'}, table.csv, table.json", markup=False)
    if summary["failed"]:
        errors.print(f"{len(summary['failed'])} samples failed: {out / 'table.md'} lists them", markup=False)
        raise typer.Exit(1)


def _pieces(*texts: str) -> list[str]:
    return [piece.strip() for text in texts for piece in text.split(",") if piece.strip()]


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(piece) for piece in _pieces(text)))
    except ValueError:
        raise ValueError(f"seeds={text!r} is not allowed: allowed is ints >= 0, separated by commas") from None
