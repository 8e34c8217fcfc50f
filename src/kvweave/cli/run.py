"""`kvweave run`: one question, asked with the full cache and with each method."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvweave.cli import console, options

if TYPE_CHECKING:
    from kvweave.methods import Method
    from kvweave.report.data import Answer, Run

_SHOWN = ["flowmm", "weave:redecode=True"]  # no token behind the first comes from the full cache
_LONG = 40  # characters: longer answers do not fit a table


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
    images: options.Number = None,
    task: options.Task = None,
    questions: options.Questions = None,
    seed: options.Seed = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    attention: options.Attention = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    out: options.Out = Path("out/run"),
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
    if repeats is None:
        from kvweave.models import LABS

        repeats = 10 if model in LABS else 1
    loaded, processor = options.load(model, dtype, device, attention, trust_remote_code)
    result = _measure(model, loaded, processor, ask, methods, max_new_tokens, repeats)

    from kvweave.report.page import html
    from kvweave.report.picture import png

    with console.writing(out) as folder:
        (folder / "report.json").write_text(console.dump_json(result.to_json()) + "\n", encoding="utf-8")
        (folder / "run.html").write_text(html(result), encoding="utf-8")
        png(result).save(folder / "run.png", optimize=True)
    if json:
        console.print_json(result.to_json())
    else:
        _print(result, out)


def _measure(
    name: str, model: Any, processor: Any, ask: options.Ask, methods: "list[Method]", longest: int, repeats: int
) -> "Run":
    """Generate with the full cache and with each method, a progress bar running."""
    from rich.progress import Progress

    from kvweave.evals.one.collect import Subject, compare

    subject = Subject(name, model, processor, options.encode(processor, ask), ask.images, ask.question, ask.right)
    with Progress(console=console.err(), transient=True) as progress:
        bar = progress.add_task("answering", total=(1 + len(methods)) * repeats)

        def step(what: str) -> None:
            progress.update(bar, advance=1, description=f"answered, {what}")

        with options.model_errors():
            return compare(subject, methods, longest, repeats, console.command_line(), step)


def _print(run: "Run", folder: Path) -> None:
    """Both answers, the numbers, and a table by layer."""
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
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    long = any(len(answer.text) > _LONG for answer in (run.full, *run.answers))
    for heading in ("cache",) if long else ("cache", "answer"):
        table.add_column(heading, overflow="fold")
    for heading in ("decoding", "KV cache", "per token", "of full"):
        table.add_column(heading, justify="right")
    for answer in (run.full, *run.answers):
        if long:
            screen.print(Text(f"{answer.method}: ", style="bold") + _marked(answer, run))
        table.add_row(
            Text(answer.method),
            *([] if long else [_marked(answer, run)]),
            speed_text(answer.speed),
            size(answer.cache_bytes),
            size(answer.cache_bytes / len(run.tokens)),
            f"{answer.cache_bytes / run.full.cache_bytes:.1%}",
        )
    screen.print(table)
    for answer in run.answers:
        screen.print(_layers(answer))
    speed = run.full.speed
    screen.print(
        f"[dim]decoding: 1 / median time between tokens, prefill apart; {speed.steps} steps in {speed.repeats} "
        f"generations of the full cache · {run.machine}[/dim]"
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


def _layers(answer: "Answer") -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from kvweave.report.data import size

    title = Text(answer.method, style="bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", justify="right")
    table.add_column("flow", justify="right")
    table.add_column("scope")
    for heading in ("kept", "merged", "evicted", "bytes before", "after"):
        table.add_column(heading, justify="right")
    for layer in answer.layers:
        if not layer.compressed:
            table.add_row(str(layer.index), "", f"not compressed: {layer.kind}")
            continue
        flow = "" if layer.flow is None else f"{layer.flow:.3f}"
        counts = [str(n) for n in (layer.kept, layer.merged, layer.evicted)]
        table.add_row(str(layer.index), flow, layer.scope or "", *counts, size(layer.bytes_before), size(layer.bytes))
    return table
