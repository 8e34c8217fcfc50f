"""Several evaluations of one model whose cells lie in one folder: what two tables need is computed once."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kvweave.evals.run import store
from kvweave.evals.run.plan import Cell, Evaluation, difference

_EXTENT = ("tasks", "methods", "budgets", "seeds", "protocols")  # what may differ between tables


@dataclass(frozen=True)
class Study(Evaluation):
    """All cells of `parts`, each once, those of a prompt together."""

    parts: tuple[Evaluation, ...] = ()

    @classmethod
    def of(cls, *parts: Evaluation) -> "Study":
        """The evaluations together; all of one model."""
        merged: dict[str, Any] = {
            name: tuple({repr(value): value for part in parts for value in getattr(part, name)}.values())
            for name in _EXTENT
        }
        same = {field.name: getattr(parts[0], field.name) for field in fields(Evaluation) if field.name not in merged}
        return cls(**same, **merged, parts=parts)

    def cells(self) -> list[Cell]:
        """The full cache first; then task by task, so that a prompt is read, and filled in, once for all methods."""
        cells = {json.dumps(cell.key): cell for part in self.parts for cell in part.cells()}
        places = {cell.place: n for n, cell in enumerate(cells.values())}
        return sorted(cells.values(), key=lambda cell: (cell.label != "full", places[cell.place]))

    def claim(self, out: Path) -> None:
        """Make `out` the folder of this model and these tasks, or find that it is; other tables may join.

        Raises:
            ValueError: it is another's; the message names the differences.
        """
        path, mine = out / "study.json", self.conditions()
        if path.exists():
            there = store.read_object(path, tasks=dict)
            tasks = {name: there["tasks"].get(name, task) for name, task in mine["tasks"].items()}
            different = [name for name in mine if name != "tasks" and there.get(name) != mine[name]]
            named = [f"{name} {difference(there.get(name), mine[name])}" for name in different]
            if tasks != mine["tasks"]:
                named.append(f"tasks {difference(tasks, mine['tasks'])}")
            if named:
                raise ValueError(
                    f"out={str(out)!r} holds results of other options, which are not mixed: {'; '.join(named)}. "
                    "Name another folder, or delete this one"
                )
            mine["tasks"] = there["tasks"] | mine["tasks"]
        store.write_json(path, mine)

    def conditions(self) -> dict[str, Any]:
        """What the numbers of a cell depend on beside the cell: alike for all tables in a folder."""
        facts = json.loads(json.dumps({k: v for k, v in self.to_dict().items() if k not in _EXTENT}))
        return facts | {"tasks": {task.name: json.loads(json.dumps(task.to_dict())) for task in self.tasks}}
