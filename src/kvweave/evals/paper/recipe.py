"""What a table or figure needs: methods, budgets and tasks, and how it is laid out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvweave.evals.paper.sheet import Sheet
from kvweave.evals.paper.subject import Subject
from kvweave.evals.run.plan import label, parse_methods
from kvweave.evals.tasks.tasks import Task
from kvweave.methods import Method, list_methods, parse_method

MILEBENCH = (
    "ALFRED",
    "IEdit",
    "Spot-the-Diff",
    "MMCoQA",
    "CLEVR-Change",
    "TextNeedleInAHaystack",
    "ImageNeedleInAHaystack",
)
#: From a subject, tasks and methods' names to what is measured beside scores, JSON-able.
Measure = Callable[[Subject, Sequence[Task], Sequence[str]], dict[str, Any]]


@dataclass(frozen=True)
class Recipe:
    """One table or figure of a paper.

    Attributes:
        name: as typed.
        title, shows: a heading, and a sentence on what the paper shows there.
        lay_out: from what was measured to a `Sheet`.
        measure: what is measured beside scores, JSON-able; None: nothing.
        methods: the command line's spelling of each, with the name that a reader sees; empty: every registered method
            and the oracle under their own names.
        budgets: shares at which they are scored; none: nothing is scored.
        protocols: of `evals.PROTOCOLS`.
        tasks: the paper's, where the data is MileBench.
        marked: methods that a picture with many lines tells apart.
        printed: where `printed.json` has the paper's numbers.
    """

    name: str
    title: str
    shows: str
    lay_out: Callable[..., Sheet]
    measure: Measure | None = None
    methods: Mapping[str, str] = field(default_factory=dict)
    budgets: tuple[float, ...] = ()
    protocols: tuple[str, ...] = ("seen",)
    tasks: tuple[str, ...] = MILEBENCH
    marked: tuple[str, ...] = ()
    printed: str = ""

    def with_methods(self, methods: str) -> "Recipe":
        """With these methods, in the command line's spelling, in place of all that are registered.

        Raises:
            ValueError: an unknown method or option, or one named twice.
        """
        named = {label(method): label(method) for method in parse_methods([methods])}
        return self if self.methods else replace(self, methods=named)

    def parsed(self) -> dict[str, Method]:
        """The methods by the names that a reader sees."""
        named = self.methods or {name: name for name in (*list_methods(), "oracle")}
        return {title: parse_method(spelling) for spelling, title in named.items()}

    def shown(self) -> dict[str, str]:
        """A method's row in the tables, by its label."""
        return {label(method): name for name, method in self.parsed().items()}
