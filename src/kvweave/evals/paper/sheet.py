"""A table or figure, laid out: what is written as JSON, Markdown and a picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvweave.evals.paper.figures import round_data
from kvweave.evals.run import store


@dataclass(frozen=True)
class Table:
    """Cells of text under a title; the first column is a name, the others are numbers."""

    title: str
    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """As Markdown writes tables."""
        lines = [self.head, ["---", *["--:"] * (len(self.head) - 1)], *self.rows]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(cells)} |" for cells in lines)])


@dataclass(frozen=True)
class Sheet:
    """What a recipe came to.

    Attributes:
        notes: sentences that a reader must know.
        data: all numbers, JSON-able.
        draw: writes the picture to a path; None: there is none.
    """

    name: str
    title: str
    shows: str
    tables: Sequence[Table]
    notes: Sequence[str]
    data: dict[str, Any]
    draw: Callable[[Path], None] | None = None
    about: Sequence[str] = field(default_factory=list)

    @property
    def stem(self) -> str:
        """The name as files have it."""
        return self.name.replace(":", "-")

    def markdown(self, pictures: str = "") -> str:
        """The sheet as text; the picture is looked for in the folder `pictures`."""
        parts = [f"## {self.title}", self.shows]
        if self.draw is not None:
            parts.append(f"![{self.title}]({pictures}{self.stem}.png)")
        parts += [table.markdown() for table in self.tables]
        parts += ["\n".join(f"- {note}" for note in (*self.notes, *self.about))]
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path) -> list[Path]:
        """NAME.json, NAME.md and NAME.png in `folder`; their paths."""
        paths = [folder / f"{self.stem}.{kind}" for kind in ("json", "md", "png")]
        tables = [{"title": table.title, "head": table.head, "rows": table.rows} for table in self.tables]
        words = {"name": self.name, "title": self.title, "shows": self.shows, "notes": [*self.notes, *self.about]}
        store.write_json(paths[0], round_data({**words, "tables": tables, **self.data}), indent=None)
        store.write_text(paths[1], self.markdown())
        if self.draw is None:
            return paths[:2]
        self.draw(paths[2])
        return paths
