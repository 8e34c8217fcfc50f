"""`kvweave lab`: the embedded model, trained, examined, and what it is asked."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kvweave.cli import console, options
from kvweave.cli.train import fetch, train

Questions = Annotated[str, typer.Option("--questions", help="Whose: lab, lab-large, smol or smol-text.")]

lab = typer.Typer(help="The embedded model: train it, examine it, see what it is asked.", no_args_is_help=True)


lab.command()(train)
lab.command()(fetch)


@lab.command("eval")
def evaluate(
    model: options.ModelName = "lab",
    task: Annotated[list[str] | None, typer.Option(help="Repeatable.", show_default="all")] = None,
    images: Annotated[
        list[int] | None,
        typer.Option(help="In an album; of smol-text, tokens; repeatable.", show_default="8 and 12; 600"),
    ] = None,
    questions: options.Questions = None,
    count: Annotated[int, typer.Option(**options.COUNT, help="Albums for each task and number of images.")] = 200,
    seed: Annotated[int, typer.Option(**options.NUMBER, help="Of the albums.")] = 0,
    batch: Annotated[int, typer.Option(**options.COUNT, help="Questions answered together.")] = 16,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    attention: options.Attention = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    out: options.Out = Path("out/lab-eval"),
    json: options.Json = False,
) -> None:
    """Print how many hold-out questions a model answers word for word with its full cache."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    options.check_model(model)
    console.check_out(out)
    console.quiet_libraries()
    source = options.source(model, questions)
    tasks = options.check_tasks(task or [], source)
    numbers = images or sorted({source.size, source.example_size})
    for number in numbers:
        with console.bad_input(option=f"--{source.unit} {number}"):
            source.make(tasks, 1, number)  # refuses what has no room before the model is loaded
    loaded, processor = options.load(model, dtype, device, attention, trust_remote_code)
    from kvweave.evals.tasks import lab_score

    columns = (TextColumn("examining"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console.err(), transient=True) as progress:
        bar = progress.add_task("examining", total=None)
        scores = lab_score.evaluate(
            loaded,
            processor,
            tasks,
            count,
            numbers,
            seed,
            batch,
            make=source.make,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    result = {"model": model, **scores, "command": console.command_line()}
    with console.writing(out) as folder:
        (folder / "scores.json").write_text(console.dump_json(result) + "\n", encoding="utf-8")
    if json:
        console.print_json(result)
    else:
        _print_scores(result, tasks, numbers, out)


def _print_scores(result: dict[str, Any], tasks: list[str], numbers: list[int], out: Path) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task")
    for number in numbers:
        table.add_column(f"{number} images", justify="right")
    for task in tasks:
        scores = [result["scores"][str(number)][task] for number in numbers]
        table.add_row(task, *(f"{s['exact']:.3f} [dim]({s['low']:.3f}-{s['high']:.3f})[/dim]" for s in scores))
    screen = console.out()
    screen.print(table)
    screen.print(
        f"[dim]exact matches with the full cache, {result['count']} hold-out albums each, 95 % intervals[/dim]"
    )
    screen.print(f"written: [bold]{out / 'scores.json'}[/bold]")


@lab.command("example")
def example(
    images: options.Number = None,
    task: options.Task = None,
    seed: options.Seed = None,
    questions: Questions = "lab",
    out: options.Out = Path("out/example"),
    json: options.Json = False,
) -> None:
    """Write the pictures and words of one hold-out question, as the model gets them."""
    console.check_out(out)
    ask = options.read_example(options.source(questions), images, task, seed or 0)
    pieces: list[dict[str, str]] = []
    names = iter(f"image-{n:02}.png" for n in range(1, len(ask.images) + 1))
    with console.writing(out) as folder:
        for piece in ask.messages[0]["content"]:
            if piece["type"] == "image":
                name = next(names)
                piece["image"].save(folder / name)
                pieces.append({"image": name})
            else:
                pieces.append({"text": piece["text"]})
        facts = {"question": ask.question, "answer": ask.right, "content": pieces}
        (folder / "example.json").write_text(console.dump_json(facts) + "\n", encoding="utf-8")
    if json:
        console.print_json(facts)
        return
    screen = console.out()
    for piece in pieces:
        screen.print(f"[dim]{piece['image']}[/dim]" if "image" in piece else piece["text"], markup="image" in piece)
    screen.print(f"answer: [bold]{ask.right}[/bold]")
    screen.print(f"written: [bold]{out}[/bold] (example.json and {len(ask.images)} pictures)")


@lab.command("export")
def export(
    folder: Annotated[Path, typer.Argument(help="Where to write; made if it is not there.")],
    task: Annotated[list[str] | None, typer.Option(help="Repeatable.", show_default="all")] = None,
    images: Annotated[
        int | None, typer.Option(help="In an album; of smol-text, tokens.", show_default="8; 600")
    ] = None,
    count: Annotated[int, typer.Option(**options.COUNT, help="Questions a task.")] = 100,
    seed: Annotated[int, typer.Option(**options.NUMBER, help="Of the albums.")] = 0,
    questions: Questions = "lab",
    json: options.Json = False,
) -> None:
    """Write the lab's hold-out questions in MileBench's format, for `kvweave eval --data` and other tools."""
    console.check_out(folder)
    source = options.source(questions)
    tasks = options.check_tasks(task or [], source)
    from kvweave.evals.tasks.export import export as write

    with console.bad_input(option=f"--{source.unit} {images}"):
        examples = source.make(tasks, count, source.size if images is None else images)
    with console.err().status("drawing"):
        files = [write(one, folder, seed) for one in examples]
    if json:
        console.print_json({"folder": str(folder), "files": [str(file) for file in files], "samples": count})
        return
    console.out().print(f"written: [bold]{folder}[/bold] ({', '.join(tasks)}; {count} samples each)")
    console.out().print(f"evaluate it: kvweave eval --data {folder}", markup=False)
