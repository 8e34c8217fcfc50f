"""Where what cannot be committed lies: the user's cache folder, and the packages it is made from."""

import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

COMMAND = "kvweave lab fetch smol"


class SmolError(ValueError):
    """The model cannot be had; the message says why, and which command helps."""


def cache_folder() -> Path:
    """`kvweave` in $XDG_CACHE_HOME, or in ~/.cache; made if it is not there."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "kvweave"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def require(package: str) -> ModuleType:
    """The package by this name of import.

    Raises:
        SmolError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise SmolError(f"the package {package.replace('_', '-')} is not installed: run `{COMMAND}`") from error


@contextmanager
def complete(path: Path) -> Iterator[Path]:
    """A file or folder to write in `path`'s place, which appears there once all is written, or not at all."""
    room = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield room / path.name
        try:
            os.replace(room / path.name, path)
        except OSError:
            if not path.is_dir():  # if it is one, another process was faster: what it wrote is the same
                raise
    finally:
        shutil.rmtree(room, ignore_errors=True)
