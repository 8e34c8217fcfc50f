"""`kvweave convert`: a published folder, rewritten so that transformers' auto classes load it."""

from pathlib import Path
from typing import Annotated

import typer

from kvweave.cli import console, options


def convert(
    source: Annotated[str, typer.Argument(help="Folder of InternVL2.5 or MobileVLM V2 as published.")],
    folder: Annotated[Path, typer.Argument(metavar="DESTINATION", help="Folder to write; new, or empty.")],
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Rewrite a published checkpoint for AutoModelForImageTextToText and AutoProcessor.

    The folder appears once all of it is written. Of MobileVLM V2 the auto classes know after `import kvweave.models`.
    """
    from kvweave import models

    with options.model_errors("SOURCE"):
        published = models.check(source)
    console.check_out(folder)
    if folder.exists() and any(folder.iterdir()):
        raise console.BadInput(f"DESTINATION {str(folder)!r} is not empty: allowed is a folder that is, or a new one")
    console.quiet_libraries()
    with options.model_errors("SOURCE"):
        processor = models.processor_from_published(published)
        with console.err().status(f"reading {source}"):
            model = models.from_published(published, dtype)
    with console.writing(folder) as partial, console.err().status(f"writing {folder}"):
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        if folder.exists():
            folder.rmdir()  # so that the whole folder takes its name at once
    written = {
        "written": str(folder),
        "model": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "image_token_id": model.config.image_token_id,
    }
    if json:
        console.print_json(written)
    else:
        console.out().print(
            f"written: [bold]{folder}[/bold], a {written['model']} of {written['parameters'] / 1e9:.2f} billion "
            f"parameters in {written['dtype']}"
        )
