"""`kvweave calibrate`: a model's profile, which says how much of a prompt each head wants."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from kvweave.cli import console, options


def calibrate(
    model: options.ModelName = "lab",
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A text of your own; repeatable.", show_default="albums of ours, or installed READMEs"),
    ] = None,
    prompts: Annotated[int, typer.Option(**options.COUNT, help="Prompts at most.")] = 12,
    tokens: Annotated[
        int | None, typer.Option(**options.COUNT, help="Of each, where they are texts.", show_default="800")
    ] = None,
    fit: Annotated[
        int,
        typer.Option(
            min=0, help="Steps of gradient descent that fit each budget's shares to replies; 0: their means."
        ),
    ] = 0,
    lessons: Annotated[
        int | None,
        typer.Option(
            **options.COUNT | {"min": 10}, help="Replies that --fit learns from, at most.", show_default="96"
        ),
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    attention: options.Attention = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    out: Annotated[Path, typer.Option("--out", help="The profile's file.")] = Path("profile.json"),
    json: options.Json = False,
) -> None:
    """Make a model's profile for `allocation=profile`; can be stopped and goes on where it was."""
    options.check_model(model)
    console.check_out(out.parent)
    if out.is_dir():
        raise console.BadInput(f"--out {str(out)!r} is a folder: allowed is a file, new or not")
    if lessons is not None and not fit:
        raise console.BadInput(
            f"--lessons {lessons} is of --fit, which is 0: allowed is --fit too, such as --fit 400"
        )
    console.quiet_libraries()
    loaded, processor = options.load(model, dtype, device, attention, trust_remote_code)
    from kvweave.evals.calibration.calibrate import Fitting
    from kvweave.evals.calibration.calibrate import calibrate as made
    from kvweave.evals.calibration.prompts import lessons_of, prompts_of

    with console.bad_input():
        examples = prompts_of(model, processor, prompts, tokens, text or ())
        fitting = Fitting(lessons_of(model, processor, lessons or 96, tokens, text or ()), fit) if fit else None
    out.parent.mkdir(parents=True, exist_ok=True)
    with _bars() as tell, console.bad_input():
        profile, costs = made(loaded, processor, examples, out, fitting, tell)
    facts = _described(profile, out, len(examples)) | {"costs": costs}
    if json:
        console.print_json(facts)
        return
    screen = console.out()
    screen.print(f"{facts['layers']} layers of {facts['kv_heads']} KV heads, {len(examples)} prompts")
    screen.print(
        f"at 20 % the median head wants {facts['median']:.1%}, the greediest tenth {facts['tenth']:.1%} or more"
    )
    for budget, of in costs.items():
        screen.print(f"KL at {budget:.0%}, held-out replies: {of['start']:.3f} by means, {of['fitted']:.3f} fitted")
    mix = "mix=0," if fit else ""
    screen.print(
        f"written: [bold]{out}[/bold], for weave:profile={out}; other methods: allocation=profile,{mix}profile={out}"
    )


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each thing that is told to go on."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console.err(), transient=True) as progress:
        bars: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=done, total=total)

        yield tell


def _described(profile: Any, out: Path, prompts: int) -> dict[str, Any]:
    layers, kv_heads = profile.shape
    shares = sorted(share for layer in profile.at(0.2) for share in layer)
    return {
        "profile": str(out),
        "fingerprint": profile.fingerprint,
        "prompts": prompts,
        "layers": layers,
        "kv_heads": kv_heads,
        "median": shares[len(shares) // 2],
        "tenth": shares[len(shares) * 9 // 10],
    }
