"""What somebody else may hand in: files that lie, numbers of hundreds of digits, JSON of any shape."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from hypothesis import strategies as st

from kvweave.cli import app

HUGE = 10**400

#: JSON that no reader expects.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just(HUGE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)


def bomb(path: Path, width: int = 12_000, height: int = 12_000) -> Path:
    """A PNG that says how large it is, and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    return path


def _commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, (*path, name))
        else:
            yield (*path, name), command


#: Every command of the command line by its path.
COMMANDS = dict(_commands(typer.main.get_command(app)))
