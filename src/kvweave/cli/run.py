"""`kvweave run`: one question, asked with the full cache and with each method."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvweave.cli import console, options

if TYPE_CHECKING:
    from kvweave.methods import Method
    from kvweave.report.data import Answer, Run

_SHOWN = ["snapkv", "flowmm", "weave:redecode=True"]  # no token behind the first comes from the full cache
_BANDS = 8  # rows of a table by layer, unless each layer is asked for
_LONG_TEXT = 8192  # tokens behind which a small model's decoding is bound by its cache, no longer by Python


def run(
    model: options.ModelName = "lab",
    image: options.Images = None,
    prompt: options.PromptText = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME or NAME:option=value,...; repeatable, to compare.", show_default=f"{', '.join(_SHOWN)}"
        ),
    ] = None,
    budget: Annotated[
        str, typer.Option(help="What stays: a share such as 0.2, tokens such as 512, or bytes such as 256MiB.")
    ] = "0.2",
    max_new_tokens: Annotated[int, typer.Option(**options.COUNT, help="Longest answer.")] = 64,
    repeats: Annotated[
        int | None, typer.Option(**options.COUNT, help="Generations to time.", show_default="10 with lab, else 1")
    ] = None,
    long: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Time decoding behind a text of so many tokens, too; 0: not.",
            show_default=f"{_LONG_TEXT} where lab is asked its own question, else 0",
        ),
    ] = None,
    images: options.Number = None,
    task: options.Task = None,
    questions: options.Questions = None,
    seed: options.Seed = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    attention: options.Attention = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    out: options.Out = Path("out/run"),
    layers: Annotated[bool, typer.Option("--layers", help="Print a row for each layer, however many.")] = False,
    json: options.Json = False,
) -> None:
    """Answer a question about images with the full KV cache and with a compressed one, and draw what stayed.

    Writes run.html (a page that needs no network), run.png and report.json.
    """
    methods = options.parse_methods(method or _SHOWN, budget)
    options.check_model(model)
    console.check_out(out)
    console.quiet_libraries()
    ask = options.read_ask(options.source(model, questions), image, prompt, images, task, seed)
    from kvweave.models import LABS

    repeats = repeats or (10 if model in LABS else 1)
    if long is None:
        long = _LONG_TEXT if model in LABS and ask.right is not None else 0
    loaded, processor = options.load(model, dtype, device, attention, trust_remote_code)
    result = _measure(model, loaded, processor, ask, methods, max_new_tokens, repeats, long)
    _write(result, out)
    if json:
        console.print_json(result.to_json())
    else:
        _print(result, out, sys.maxsize if layers else _BANDS)


def _write(run: "Run", out: Path) -> None:
    from kvweave.report.page import html
    from kvweave.report.picture import png

    with console.writing(out) as folder:
        (folder / "report.json").write_text(console.dump_json(run.to_json()) + "\n", encoding="utf-8")
        (folder / "run.html").write_text(html(run), encoding="utf-8")
        png(run).save(folder / "run.png", optimize=True)


def _measure(
    name: str,
    model: Any,
    processor: Any,
    ask: options.Ask,
    methods: "list[Method]",
    longest: int,
    repeats: int,
    long: int,
) -> "Run":
    """Generate with the full cache and with each method, a progress bar running."""
    from rich.progress import Progress

    from kvweave.evals.one.collect import Subject, compare, words

    subject = Subject(name, model, processor, options.encode(processor, ask), ask.images, ask.question, ask.right)
    if long and not len(words(subject)):
        raise console.BadInput(
            f"--long: long={long} is not allowed with a prompt that has no words to repeat: allowed is 0"
        )
    with Progress(console=console.err(), transient=True) as progress:
        bar = progress.add_task("answering", total=(1 + len(methods)) * (repeats + bool(long)))

        def step(what: str) -> None:
            progress.update(bar, advance=1, description=f"answered, {what}")

        with options.model_errors():
            return compare(subject, methods, longest, repeats, console.command_line(), step, long)


def _print(run: "Run", folder: Path, most: int) -> None:
    """Both answers, the numbers, and a table by layer, of about so many rows at most."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from kvweave.report.data import size, speed_text

    screen = console.out()
    screen.print()
    screen.print(Text(run.question, style="bold"))
    screen.print(
        f"[dim]{run.model} · {len(run.tokens)} tokens, {run.visual} of them visual, {len(run.images)} images[/dim]"
    )
    if run.right is not None:
        screen.print(f"right answer: [bold]{run.right}[/bold]")
    answers = (run.full, *run.answers)
    for answer in answers:
        screen.print(Text(f"{answer.method}: ", style="bold") + _marked(answer, run))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("cache", overflow="fold")
    speeds = [[speed_text(answer.speed)] for answer in answers]
    headings = ["tokens/s"]
    if run.long is not None:
        headings.append(f"behind {run.long.length:,}")
        speeds = [[*own, speed_text(long)] for own, long in zip(speeds, run.long.speeds, strict=True)]
    for heading in (*headings, "KV cache", "of full", "peak"):
        table.add_column(heading, justify="right")
    for answer, timing in zip(answers, speeds, strict=True):
        table.add_row(
            Text(answer.method),
            *timing,
            size(answer.cache_bytes),
            f"{answer.cache_bytes / run.full.cache_bytes:.1%}",
            size(answer.peak_bytes),
        )
    screen.print(table)
    for answer in run.answers:
        screen.print(_layers(answer, most))
    if any(len(answer.runs) > most for answer in run.answers):
        screen.print(
            "[dim]neighbouring layers stand together, from the least to the most; each by itself: --layers[/dim]"
        )
    speed = run.full.speed
    screen.print(
        f"[dim]tokens/s: 1 / median time between tokens, prefill apart; {speed.steps} steps in {speed.repeats} "
        f"generations of the full cache · {run.machine}[/dim]"
    )
    if run.long is not None:
        screen.print(
            f"[dim]behind {run.long.length:,}: tokens/s behind a text of so many tokens. Behind a short prompt a "
            "step is the framework's time; behind a long one it reads the cache: a smaller one is faster.[/dim]"
        )
    for note in run.notes:
        screen.print(f"[yellow]{note}[/yellow]")
    screen.print(f"what stayed, drawn on the images: [bold]{folder / 'run.html'}[/bold] (also run.png, report.json)")


def _marked(answer: "Answer", run: "Run") -> Any:
    """The answer, with a word on how it compares."""
    from rich.text import Text

    text = Text(answer.text or "(nothing)")
    if run.right is not None:
        right = answer.text == run.right
        text.append(" ✓" if right else " ✗", style="green" if right else "red")
    elif answer is not run.full:
        same = answer.text == run.full.text
        text.append(" (as full)" if same else " (differs)", style="green" if same else "yellow")
    return text


def _layers(answer: "Answer", most: int) -> Any:
    """A row for each run of layers that look alike, or for neighbours where these are more than `most`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from kvweave.report.data import cells_of

    table = Table(title=Text(answer.method, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", justify="right")
    for heading in answer.columns:
        table.add_column(heading, justify="left" if heading == "scope" else "right")
    for place, layers in answer.bands(most):
        cells = cells_of(layers)
        row = [cells[name] for name in answer.columns]
        table.add_row(place, *(row if layers[0].compressed else [f"not compressed: {layers[0].kind}"]))
    return table
