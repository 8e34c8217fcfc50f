"""Files that are whole or not there, and what tells one set of results from another."""

import hashlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvweave
from kvweave.ops.brief import brief

#: Folders of the package without a part in answers and scores; whatever else there is counts, whatever it is called.
_NO_PART_IN_RESULTS = ("cli", "report", "serve", "evals/one", "evals/paper", "evals/tables")


def write_text(path: Path, text: str) -> None:
    """Write a file so that whoever looks finds all of it or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, data: Any, *, indent: int | None = 1) -> None:
    """`write_text` of JSON; without an indent in as few characters as can be."""
    separators = (",", ":") if indent is None else None
    write_text(path, json.dumps(data, indent=indent, separators=separators, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """JSON from a file; a ValueError names the file that holds none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}; delete it, and it is made again") from None


def read_object(path: Path, **needed: type | tuple[type, ...]) -> dict[str, Any]:
    """A JSON object from a file, with entries of these types.

    Raises:
        ValueError: it is damaged, or an entry is missing or of another type; the message names both.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds no object; delete it, and it is made again")
    for name, kind in needed.items():
        if not isinstance(value.get(name), kind):
            lost = "is missing" if name not in value else f"is {brief(value[name])}"
            raise ValueError(f"{path} is damaged: {name!r} {lost}; delete it, and it is made again")
    return value


def versions() -> dict[str, str]:
    """Of everything that numbers may depend on."""
    return {
        "kvweave": kvweave.__version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }


def cpu() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def code_mark(*also: str, home: Path | None = None) -> str:
    """Changes with the source of all that decides answers and scores, shipped profiles among it: results of different
    code are not mixed.

    Args:
        also: folders that otherwise have no part in them, such as "evals/paper" in what it measures itself.
        home: of the package.
    """
    home = home or Path(kvweave.__file__).parent
    aside = [folder for folder in _NO_PART_IN_RESULTS if folder not in also]
    digest = hashlib.sha256()
    files = (*home.rglob("*.py"), *home.glob("profiles/*.json"))
    for path in sorted(path.relative_to(home) for path in files):
        if not any(path.is_relative_to(folder) for folder in aside):
            digest.update(f"{path.as_posix()}\0".encode() + (home / path).read_bytes() + b"\0")
    return digest.hexdigest()[:12]
