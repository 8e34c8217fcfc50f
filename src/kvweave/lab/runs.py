"""What a training run keeps on disk, so that an interruption leaves something to go on from."""

import json
import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that an interruption leaves either the old or the new one."""
    partial = path.with_suffix(".partial")
    write(partial)
    os.replace(partial, path)


def forget_after(log: Path, step: int) -> None:
    """Drop the lines of steps that the checkpoint had not seen yet: they are taken again."""
    if log.exists():
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))
