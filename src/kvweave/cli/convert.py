"""`kvweave convert`: a published folder, or a model's decoder, written so that transformers' auto classes load it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kvweave.cli import console, options


def convert(
    source: Annotated[
        str, typer.Argument(help="Folder of InternVL2.5 or MobileVLM V2 as published; with --decoder any --model.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="DESTINATION", help="Folder to write; new, or empty.")],
    decoder: Annotated[
        bool,
        typer.Option("--decoder", help="The decoder alone, as the text model that an engine such as vLLM loads."),
    ] = False,
    tokenizer: Annotated[bool, typer.Option(help="With --decoder: write the tokenizer too.")] = True,
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Rewrite a published checkpoint for AutoModelForImageTextToText and AutoProcessor, or write a decoder alone.

    The folder appears once all of it is written. Of MobileVLM V2 the auto classes know after `import kvweave.models`.
    """
    from kvweave import models

    if not tokenizer and not decoder:
        raise console.BadInput("--no-tokenizer is not allowed without --decoder")
    with options.model_errors("SOURCE"):
        place = source if decoder else models.check(source)
    console.check_out(folder)
    if folder.exists() and any(folder.iterdir()):
        raise console.BadInput(f"DESTINATION {str(folder)!r} is not empty: allowed is a folder that is, or a new one")
    console.quiet_libraries()
    with options.model_errors("SOURCE"):
        facts = _decoder(place, folder, dtype, tokenizer) if decoder else _published(place, folder, dtype)
    if json:
        console.print_json(facts)
    else:
        console.out().print(
            f"written: [bold]{folder}[/bold], a {facts['model']} of {facts['parameters'] / 1e9:.2f} billion "
            f"parameters in {facts['dtype']}"
        )


def _published(source: str, folder: Path, dtype: str) -> dict[str, Any]:
    from kvweave import models

    processor = models.processor_from_published(source)
    with console.err().status(f"reading {source}"):
        model = models.from_published(source, dtype)
    with console.writing(folder) as partial, console.err().status(f"writing {folder}"):
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        if folder.exists():
            folder.rmdir()  # so that the whole folder takes its name at once
    return {
        "written": str(folder),
        "model": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "image_token_id": model.config.image_token_id,
    }


def _decoder(source: str, folder: Path, dtype: str, tokenizer: bool) -> dict[str, Any]:
    from kvweave import models

    model, processor = options.load(source, dtype, "cpu", "auto", False)
    with console.err().status(f"writing {folder}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        facts = models.export_decoder(model, folder, processor if tokenizer else None)
    return {"written": str(folder), **facts, "tokenizer": tokenizer}
