"""What is to be evaluated: a plan of cells, and the folder that belongs to it."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from kvweave import models
from kvweave.evals.run import store
from kvweave.evals.tasks.tasks import Task
from kvweave.methods import Method, list_methods, method_from_dict, parse_method
from kvweave.methods.full import Full
from kvweave.methods.registry import parse_budget
from kvweave.models import ModelError
from kvweave.models.loading import DTYPES
from kvweave.ops.brief import brief

#: When the question comes.
PROTOCOLS = {
    "seen": "question seen during compression",
    "unseen": "context compressed before the question",
    "probed": "context asked the processor's own probes, then compressed before the question",
}
FULL = "full"
_FORMAT = 2  # of the result files


@dataclass(frozen=True)
class Cell:
    """One method at one budget on one task with one seed: what one result file holds."""

    protocol: str
    task: Task
    seed: int
    label: str
    method: Method

    @property
    def budget(self) -> float | int:
        assert not isinstance(self.method.budget, str)  # `parse_budgets` refused it
        return self.method.budget

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from the plan's other cells."""
        return {
            "protocol": self.protocol,
            "task": self.task.name,
            "seed": self.seed,
            "method": self.label,
            "budget": self.budget,
        }

    @property
    def is_full(self) -> bool:
        """Its cache is the full one, which others are held against."""
        return self.label == FULL

    @property
    def place(self) -> tuple[str, str, int]:
        """Cells of one place ask the same prompts."""
        return self.protocol, self.task.name, self.seed

    def path(self, out: Path) -> Path:
        """Its result file."""
        name = "-".join(str(part) for part in self.key.values())
        return out / "cells" / (re.sub(r"[^\w.,=-]", "_", name) + ".json")

    def reference(self, out: Path, example: str) -> Path:
        """Where the full cache's answer to an example is kept, for others to be held against."""
        place = re.sub(r"[^\w.,=-]", "_", f"{self.protocol}-{self.task.name}-{self.seed}")
        return out / "references" / place / (hashlib.sha256(example.encode()).hexdigest()[:16] + ".safetensors")


@dataclass(frozen=True)
class Evaluation:
    """Everything that the numbers depend on.

    Attributes:
        model: "lab", a local folder or a hub id.
        tasks: what is asked.
        methods: each with any budget; the full cache is evaluated besides them, once.
        budgets: shares in (0, 1], or tokens as ints.
        seeds: of the samples, and of methods that draw at random.
        protocols: of `PROTOCOLS`.
        dtype: of the weights; "auto": as the checkpoint has them.
        trust_remote_code: run code that the checkpoint brings along.
        fidelity: hold every compressed cache against the full one along the full one's answers.
    """

    model: str
    tasks: tuple[Task, ...]
    methods: tuple[Method, ...]
    budgets: tuple[float | int, ...] = (0.5, 0.2, 0.1, 0.05)
    seeds: tuple[int, ...] = (0,)
    protocols: tuple[str, ...] = ("seen",)
    dtype: str = "auto"
    fidelity: bool = True
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        models.check(self.model)
        if self.dtype not in DTYPES:
            raise ModelError(f"dtype={self.dtype!r} is not allowed: allowed is one of {', '.join(DTYPES)}", "dtype")
        for name in ("tasks", "methods", "budgets", "seeds", "protocols"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: allowed is at least one")
        for protocol in self.protocols:
            if protocol not in PROTOCOLS:
                raise ValueError(f"protocol={protocol!r} is unknown: allowed is one of {', '.join(PROTOCOLS)}")
        for seed in self.seeds:
            if not 0 <= seed < 2**63:
                raise ValueError(f"seeds={brief(seed)} is not allowed: allowed is an int >= 0, below 2**63")

    def cells(self) -> list[Cell]:
        """All cells: the full cache first, then task by task, so that a prompt is read once for all methods."""
        places = [(protocol, task, seed) for protocol in self.protocols for task in self.tasks for seed in self.seeds]
        full = [Cell(*place, FULL, Full()) for place in places]
        cut = [
            Cell(*place, label(method), seeded(replace(method, budget=budget), place[2]))
            for place in places
            for method in self.methods
            if label(method) != FULL
            for budget in self.budgets
        ]
        return full + cut

    @property
    def labels(self) -> list[str]:
        """Rows of the tables, the full cache first."""
        return list(dict.fromkeys([FULL, *map(label, self.methods)]))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; two evaluations whose dictionaries differ are not mixed in one folder."""
        return {
            "format": _FORMAT,
            "model": self.model,
            "dtype": self.dtype,
            "weights": models.checkpoint_mark(self.model),
            "protocols": list(self.protocols),
            "tasks": [task.to_dict() for task in self.tasks],
            "methods": {label(method): _options(method) for method in self.methods},
            "budgets": list(self.budgets),
            "seeds": list(self.seeds),
            "fidelity": self.fidelity,
            "trust_remote_code": self.trust_remote_code,
            "code": store.code_mark(),
            "versions": store.versions(),
        }

    def claim(self, out: Path) -> None:
        """Make `out` this evaluation's folder, or find that it is.

        Raises:
            ValueError: it is another's; the message names the differences.
        """
        path, mine = out / "plan.json", json.loads(json.dumps(self.to_dict()))
        if not path.exists():
            store.write_json(path, mine)
            return
        there = store.read_object(path)
        different = [name for name in {**there, **mine} if there.get(name) != mine.get(name)]
        if different:
            named = "; ".join(f"{name} {difference(there.get(name), mine.get(name))}" for name in different)
            raise ValueError(
                f"out={str(out)!r} holds results of other options, which are not mixed: {named}. "
                "Name another folder, or delete this one"
            )


def difference(there: Any, here: Any) -> str:
    """Two values in a few words: of collections only what one side alone has."""
    if isinstance(there, dict) and isinstance(here, dict):
        names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        there, here = ({name: side[name] for name in names if name in side} for side in (there, here))
    elif isinstance(there, list) and isinstance(here, list):
        there, here = ([x for x in a if x not in b] or a for a, b in ((there, here), (here, there)))
    return f"{_brief(there)} there, {_brief(here)} asked for"


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:197] + "..."


def label(method: Method) -> str:
    """A method's row in the tables: the command line's spelling without the budget."""
    name, _, options = method.spelling().partition(":")
    rest = ",".join(option for option in options.split(",") if not option.startswith("budget="))
    return f"{name}:{rest}" if rest else name


def _options(method: Method) -> dict[str, Any]:
    return {name: value for name, value in method.to_dict().items() if name != "budget"}


def seeded(method: Method, seed: int) -> Method:
    """The method with the evaluation's seed, if it draws at random and its spelling names no seed."""
    for field in fields(method):
        if field.name == "seed" and method.to_dict()["seed"] == field.default:
            return method_from_dict({**method.to_dict(), "seed": seed})
    return method


def parse_methods(texts: Sequence[str]) -> tuple[Method, ...]:
    """Methods from the command line's spelling, several separated by commas; none: all that are registered.

    Raises:
        ValueError: an unknown method or option, one named twice, or a spelling with a budget of its own.
    """
    spellings: list[str] = []
    for piece in (piece.strip() for text in texts for piece in text.split(",")):
        if "=" in piece and ":" not in piece and spellings:
            spellings[-1] += f",{piece}"  # a further option of the method before it
        elif piece:
            spellings.append(piece)
    methods: dict[str, Method] = {}
    for spelling in spellings or list_methods():
        if re.search(r"[:,]\s*budget\s*=", spelling):
            raise ValueError(f"methods={spelling!r} is not allowed: budgets are given once for all, by --budgets")
        method = parse_method(spelling)
        if label(method) in methods:
            raise ValueError(f"methods={spelling!r} is named twice: allowed is once")
        methods[label(method)] = method
    return tuple(methods.values())


def parse_budgets(texts: Sequence[str]) -> tuple[float | int, ...]:
    """Shares or tokens from the command line, several separated by commas.

    Raises:
        ValueError: no budget, or one in bytes, which count a whole batch.
    """
    budgets: list[float | int] = []
    for piece in (piece.strip() for text in texts for piece in text.split(",")):
        if not piece:
            continue
        budget = parse_budget(piece)
        if isinstance(budget, str):
            raise ValueError(
                f"budgets={piece!r} is not allowed: bytes count a whole batch; allowed is a share in (0, 1] or tokens"
            )
        if any(budget == other and type(budget) is not type(other) for other in budgets):
            raise ValueError(f"budgets={piece!r} is not allowed here: 1 is one token, 1.0 is all; name one of them")
        budgets.append(budget)
    return tuple(dict.fromkeys(budgets))
