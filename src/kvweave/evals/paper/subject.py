"""What a paper's tables are measured on: a model, its data, and the folder that the tables share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvweave import models
from kvweave.evals.tasks.tasks import Task


@dataclass
class Subject:
    """What is measured.

    Attributes:
        model: "lab", a local folder or a hub id.
        data: name of the data, for a reader: "" for the lab's own questions.
        tasks: by what paper's tasks are asked for; those of the lab whatever is asked for.
        out: the folder that all tables share.
        by_length: tasks whose prompts differ in length, for measurements of time.
        command: what a reader may type.
    """

    model: str
    data: str
    tasks: Callable[[Sequence[str]], tuple[Task, ...]]
    by_length: Callable[[], tuple[Task, ...]]
    out: Path
    seeds: tuple[int, ...] = (0,)
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    batch: int = 50
    workers: int = 1
    command: str = ""
    _loaded: tuple[Any, Any] | None = field(default=None, repr=False)

    def load(self) -> tuple[Any, Any]:
        """The model and its processor, once."""
        if self._loaded is None:
            self._loaded = models.load(self.model, self.dtype, self.device, trust_remote_code=self.trust_remote_code)
        return self._loaded
