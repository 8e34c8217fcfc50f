"""Tables on the terminal, for the benchmarks that may use rich."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def console(*, stderr: bool = False) -> Console:
    """The terminal; wide enough for the tables where standard output is none."""
    return Console(stderr=stderr, width=None if sys.stdout.isatty() else 140)


def show(to: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """First column to the left, the others to the right."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    to.print(table)
