"""`kvweave plan`: what a prompt will take of a device's memory, before anything is loaded."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvweave.cli import console, options

if TYPE_CHECKING:
    from kvweave.models.footprint import Footprint


def plan(
    model: options.ModelName = "lab",
    tokens: Annotated[int, typer.Option(**options.COUNT, help="Of the prompt, its images included.")] = 32000,
    images: Annotated[int, typer.Option(**options.NUMBER, help="Images in the prompt; a tile counts as one.")] = 0,
    image_size: Annotated[
        int, typer.Option(**options.COUNT, help="Their side in pixels, where the model takes any.")
    ] = 448,
    new_tokens: Annotated[int, typer.Option(**options.NUMBER, help="Of the reply.")] = 256,
    batch: Annotated[int, typer.Option(**options.COUNT, help="Prompts at a time.")] = 1,
    method: Annotated[str, typer.Option(help="NAME or NAME:option=value,...")] = "flowmm",
    budget: Annotated[str, typer.Option(help="What stays: a share, tokens, or bytes.")] = "0.2",
    dtype: options.Dtype = "auto",
    weights: Annotated[
        str, typer.Option(help="auto: in --dtype; 8bit or 4bit: as bitsandbytes packs them.")
    ] = "auto",
    memory: Annotated[str, typer.Option(help="Of the device.")] = "24GiB",
    out_folder: Annotated[Path | None, typer.Option("--out", help="Folder for plan.json.")] = None,
    json: options.Json = False,
) -> None:
    """Say what a model, a prompt and its compressed cache take of a device's memory, and whether they fit.

    Of the model only config.json is read. CUDA itself takes a few hundred MiB more, and fragmentation some.
    """
    room = _bytes(memory)
    (works,) = options.parse_methods([method], budget)
    if out_folder is not None:
        console.check_out(out_folder)
    console.quiet_libraries()
    from kvweave.models.footprint import footprint

    with console.err().status(f"planning {model}"), options.model_errors():
        sizes = footprint(
            model,
            works,
            tokens=tokens,
            images=images,
            image_size=image_size,
            new_tokens=new_tokens,
            batch=batch,
            dtype=dtype,
            weights=weights,
        )
    summary = _summary(sizes, works.spelling(), room)
    if out_folder is not None:
        with console.writing(out_folder) as partial:
            (partial / "plan.json").write_text(console.dump_json(summary) + "\n", encoding="utf-8")
    if json:
        console.print_json(summary)
    else:
        _print(sizes, works.spelling(), tokens, room)


def _bytes(memory: str) -> int:
    from kvweave.ops.budget import parse_bytes

    try:
        return parse_bytes(memory)
    except ValueError:
        raise console.BadInput(f"--memory {memory!r} is no size: allowed is bytes such as 24GiB or 512MiB") from None


def _summary(sizes: "Footprint", method: str, room: int) -> dict[str, Any]:
    import dataclasses

    return {
        "method": method,
        **dataclasses.asdict(sizes),
        "peak": sizes.peak,
        "full_peak": sizes.full_peak,
        "memory": room,
        "fits": sizes.peak <= room,
        "full_fits": sizes.full_peak <= room,
    }


def _print(sizes: "Footprint", method: str, tokens: int, room: int) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from kvweave.report.data import size

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "full cache", method):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("weights", size(sizes.weights), size(sizes.weights))
    table.add_row("vision tower, at most", size(sizes.vision), size(sizes.vision))
    table.add_row("prefill of a layer, at most", size(sizes.prefill), size(sizes.prefill))
    table.add_row("KV cache of the prompt", size(sizes.full), size(sizes.kept))
    table.add_row("KV cache of the reply", size(sizes.reply), size(sizes.reply))
    table.add_row("peak", size(sizes.full_peak), size(sizes.peak), style="bold")
    table.add_row(f"fits {size(room)}", *(_fit(peak, room) for peak in (sizes.full_peak, sizes.peak)))
    screen = console.out()
    screen.print(table)
    screen.print(Text(f"{sizes.layers} layers keep {sizes.entries} of {tokens} tokens each, on average"))
    if sizes.waits and sizes.before_cut == sizes.full:
        screen.print(Text("it cuts once the whole prompt is cached: the peak is the full cache's, decoding is not"))
    elif sizes.waits:
        screen.print(Text(f"until its cut it holds {size(sizes.before_cut)} of the prompt's cache"))


def _fit(peak: int, room: int) -> str:
    from kvweave.report.data import size

    return f"yes, {size(room - peak)} left" if peak <= room else f"no, {size(peak - room)} too much"
