"""Tables for a terminal: as wide as it is, whatever was measured."""

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

WIDTH = 80  # columns that every terminal has
_FRAME = 3  # columns that a cell costs beside its text

Rows = Sequence[Sequence[str]]


def fitted(title: str, head: Sequence[str], rows: Rows, width: int = WIDTH) -> Iterator[Table]:
    """One table, or several where its columns have no room side by side.

    What does not fit is shown without its intervals, then with rows and columns swapped, and at last in parts.

    Args:
        head, rows: text; the first column holds names, others numbers, perhaps with an interval: "0.52 [0.4, 0.6]".
    """
    head, rows = list(head), [list(row) for row in rows]
    bare = [[cell.partition(" [")[0] for cell in row] for row in rows]
    for name, cells in ((head, rows), (head, bare), _swapped(head, bare)):
        if _width(name, cells) <= width:
            yield _table(title, name, cells)
            return
    turned = _swapped(head, bare)
    wide = min((head, bare), turned, key=lambda table: len(_parts(table[0], table[1], width)))
    for n, columns in enumerate(_parts(wide[0], wide[1], width)):
        part = [[row[0], *(row[at] for at in columns)] for row in (wide[0], *wide[1])]
        yield _table(title if not n else f"{title}, continued", part[0], part[1:])


def _swapped(head: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    turned = [list(column) for column in zip(head, *rows, strict=True)]
    return ["", *turned[0][1:]], turned[1:]


def _width(head: Sequence[str], rows: Rows) -> int:
    return 1 + sum(_FRAME + max(map(len, column)) for column in zip(head, *rows, strict=True))


def _parts(head: Sequence[str], rows: Rows, width: int) -> list[list[int]]:
    """Numbers of the columns that stand side by side, beside the first."""
    sizes = [_FRAME + max(map(len, column)) for column in zip(head, *rows, strict=True)]
    parts: list[list[int]] = [[]]
    for at, size in enumerate(sizes[1:], 1):
        if parts[-1] and 1 + sizes[0] + size + sum(sizes[n] for n in parts[-1]) > width:
            parts.append([])
        parts[-1].append(at)
    return parts


def _table(title: str, head: Sequence[str], rows: Rows) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for n, name in enumerate(head):
        table.add_column(Text(name), justify="right" if n else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
