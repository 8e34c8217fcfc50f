"""`kvweave calibrate`: a model's profile, which says how much of a prompt each head wants."""

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
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    attention: options.Attention = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    out: Annotated[Path, typer.Option("--out", help="The profile's file.")] = Path("profile.json"),
    json: options.Json = False,
) -> None:
    """Make a model's profile for `allocation=profile`; can be stopped and goes on where it was."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    options.check_model(model)
    console.check_out(out.parent)
    if out.is_dir():
        raise console.BadInput(f"--out {str(out)!r} is a folder: allowed is a file, new or not")
    console.quiet_libraries()
    loaded, processor = options.load(model, dtype, device, attention, trust_remote_code)
    from kvweave.evals import calibration

    with console.bad_input():
        examples = calibration.prompts_of(model, processor, prompts, tokens, text or ())
    out.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("calibrating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console.err(), transient=True) as progress, console.bad_input():
        bar = progress.add_task("calibrating", total=len(examples))
        profile = calibration.calibrate(
            loaded, processor, examples, out, lambda done, total: progress.update(bar, completed=done, total=total)
        )
    facts = _described(profile, out, len(examples))
    if json:
        console.print_json(facts)
        return
    screen = console.out()
    screen.print(f"{facts['layers']} layers of {facts['kv_heads']} KV heads, {len(examples)} prompts")
    screen.print(
        f"at 20 % the median head wants {facts['median']:.1%}, the greediest tenth {facts['tenth']:.1%} or more"
    )
    screen.print(f"written: [bold]{out}[/bold], for allocation=profile,profile={out}")


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
