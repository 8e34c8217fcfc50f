"""Files that are whole or not there, and what tells one set of results from another."""

import hashlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoConfig

import kvweave

_HEAD = 2**24  # bytes of a weights file that tell it apart
_NO_PART_IN_RESULTS = {"cli", "evals", "report", "serve"}


def write_text(path: Path, text: str) -> None:
    """Write a file so that whoever looks finds all of it or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, data: Any, *, indent: int = 1) -> None:
    """`write_text` of JSON."""
    write_text(path, json.dumps(data, indent=indent, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """JSON from a file; a ValueError names the file that holds none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; delete it, and it is made again") from None


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


def code_mark() -> str:
    """Changes with the source of all that decides an answer: results of different code are not mixed."""
    home = Path(kvweave.__file__).parent
    files = sorted(path.relative_to(home) for path in home.rglob("*.py"))
    digest = hashlib.sha256()
    for path in files:
        if path.parts[0] not in _NO_PART_IN_RESULTS:
            digest.update(str(path).encode() + (home / path).read_bytes())
    return digest.hexdigest()[:12]


def weights_mark(checkpoint: str) -> str:
    """Changes with a checkpoint's weights: a mark of a local folder's files, or a hub id's commit.

    Raises:
        ValueError: a hub id that cannot be found.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        try:
            return str(AutoConfig.from_pretrained(checkpoint)._commit_hash)
        except (OSError, ValueError) as error:
            why = str(error).strip().splitlines()[0]
            raise ValueError(f"model={checkpoint!r} is not found on the hub: {why}") from None
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_HEAD))
    return digest.hexdigest()[:12]
