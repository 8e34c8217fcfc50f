"""What every command shares: where words go, how errors end, how files are written."""

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvweave.ops.brief import brief

if TYPE_CHECKING:
    from rich.console import Console

UNEXPECTED, BAD_INPUT, STOPPED = 1, 2, 130


class BadInput(Exception):  # noqa: N818  it is the user's, and reads so where it is raised
    """What the user asked for cannot be done; one line names the option, its value and what is allowed."""


@contextlib.contextmanager
def bad_input(*errors: type[Exception], option: str = "") -> Iterator[None]:
    """Errors of these kinds (ValueError if none is named) are the user's input; `option` is put in front."""
    kinds = errors or (ValueError,)
    try:
        yield
    except kinds as error:
        raise BadInput(f"{option}: {error}" if option else str(error)) from error


def out() -> "Console":
    """For results."""
    from rich.console import Console

    return Console(highlight=False)


def err() -> "Console":
    """For progress and remarks."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_json(data: Any) -> None:
    """One JSON object on stdout."""
    print(dump_json(data))


def dump_json(data: Any) -> str:
    """JSON that every parser reads: NaN is an error, not a word."""
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)


def check_out(folder: Path) -> None:
    """Refuse a place that cannot be written to, before any work is done."""
    there = folder
    try:
        while not there.exists() and there != there.parent:
            there = there.parent
    except (OSError, ValueError) as error:  # a name that no file can have
        raise BadInput(f"--out {brief(str(folder))}: {error}; allowed is a folder, new or not") from error
    if not there.is_dir():
        raise BadInput(f"--out {str(folder)!r}: {there} is a file; allowed is a folder, new or not")
    if not os.access(there, os.W_OK):
        raise BadInput(f"--out {str(folder)!r}: {there} cannot be written to; allowed is a folder that can")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A fresh folder whose files move to `folder` once all are written; on an error none does."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise BadInput(f"--out {str(folder)!r}: {error}; allowed is a folder that can be written to") from error
    try:
        yield partial
        if not folder.exists():
            partial.chmod(0o777 & ~_umask())  # mkdtemp's folders are private
            partial.rename(folder)
            return
        for file in sorted(partial.iterdir()):
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def quiet_libraries() -> None:
    """Keep transformers' bars and hints off the terminal; errors come as exceptions."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from kvweave.models.loading import quiet

    quiet()


def command_line() -> str:
    """What was typed, as a shell would read it again."""
    import shlex

    return shlex.join(["kvweave", *sys.argv[1:]])
