"""What a page or a picture of a run shows: plain data, collected elsewhere."""

import math
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from kvweave.report.grids import Grid

if TYPE_CHECKING:
    from PIL.Image import Image

#: For each KV head the slot that each token lives on in; itself: kept, another: merged into it, -1: evicted.
Fate = list[list[int]]


@dataclass(frozen=True)
class Token:
    """One token of the prompt, as text; visual ones have none."""

    text: str
    visual: bool = False
    special: bool = False


@dataclass(frozen=True)
class Layer:
    """One layer after the cut, as `Session.report` tells it; `fate` None: every token was kept, or left alone."""

    index: int
    kind: str
    compressed: bool
    length: int = 0
    kept: int = 0
    merged: int = 0
    evicted: int = 0
    bytes: int = 0
    bytes_before: int = 0
    flow: float | None = None
    scope: str | None = None
    heaviest: int = 1
    fate: Fate | None = None

    @property
    def cells(self) -> dict[str, str]:
        """Its row in a table: column to text; what its method does not have is empty."""
        return {
            "flow": "" if self.flow is None else f"{self.flow:.3f}",
            "scope": self.scope or "",
            "kept": str(self.kept),
            "merged": str(self.merged),
            "heaviest": str(self.heaviest) if self.merged else "",
            "evicted": str(self.evicted),
            "size": size(self.bytes),
        }


@dataclass(frozen=True)
class Speed:
    """Decoding apart from prefill: medians over `steps` steps, and over as many prefills as there were repeats."""

    tokens_per_second: float | None
    prefill_seconds: float
    steps: int
    repeats: int


@dataclass(frozen=True)
class Answer:
    """What the model said with one cache.

    Attributes:
        method: the command line's spelling, or "full cache"; name: the method's own, "" for the full cache.
        cache_bytes: keys and values of the prompt in the layers that can be compressed.
        peak_bytes: the most of them held at once, while the prompt was read and cut.
    """

    method: str
    name: str
    text: str
    tokens: int
    speed: Speed
    cache_bytes: int
    peak_bytes: int
    layers: list[Layer] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        """Columns of a table of its layers: those in which some layer has something to say."""
        grids = [layer.cells for layer in self.layers if layer.compressed]
        return [name for name in Layer(0, "", True).cells if any(cells[name] for cells in grids)]

    @property
    def runs(self) -> list[tuple[str, Layer]]:
        """Neighbouring layers that look alike in a table, together: ("0-29", the first of them)."""
        groups = groupby(self.layers, key=lambda layer: (layer.compressed, layer.kind, layer.cells))
        runs = [list(group) for _, group in groups]
        return [(f"{run[0].index}-{run[-1].index}" if len(run) > 1 else f"{run[0].index}", run[0]) for run in runs]

    def total(self, what: str) -> int:
        """Sum over the compressed layers of "length", "kept", "merged" or "evicted"."""
        return sum(getattr(layer, what) for layer in self.layers if layer.compressed)


@dataclass(frozen=True)
class Long:
    """Decoding behind a long text: how speed changes with length.

    Attributes:
        length: tokens of the text.
        speeds: of the full cache, then of each method.
    """

    length: int
    speeds: list[Speed]


@dataclass(frozen=True)
class Run:
    """One question, asked with the full cache and with each method.

    Attributes:
        right: the right answer, where there is one.
        images: as they were given, in the prompt's order.
        answers: of the methods; `full` is that of the unmodified model.
        notes: what a reader should know of this run.
        long: speeds behind a long text, where that was asked for.
    """

    model: str
    question: str
    right: str | None
    images: "list[Image]"
    tokens: list[Token]
    grids: list[Grid]
    full: Answer
    answers: list[Answer]
    command: str
    machine: str
    versions: dict[str, str]
    notes: list[str] = field(default_factory=list)
    long: Long | None = None

    @property
    def visual(self) -> int:
        """Visual tokens of the prompt."""
        return sum(token.visual for token in self.tokens)

    def to_json(self) -> dict[str, Any]:
        """Everything but the pictures and the tokens' fates."""
        return {
            "model": self.model,
            "question": self.question,
            "right": self.right,
            "prompt": {"tokens": len(self.tokens), "visual": self.visual, "images": len(self.images)},
            "full": self._answer(self.full),
            "methods": [self._answer(answer) for answer in self.answers],
            "notes": self.notes,
            "long": None if self.long is None else asdict(self.long),
            "command": self.command,
            "machine": self.machine,
            "versions": self.versions,
        }

    def _answer(self, answer: Answer) -> dict[str, Any]:
        entry = asdict(answer)
        for layer in entry["layers"]:
            layer.pop("fate")
        entry["bytes_per_token"] = answer.cache_bytes / len(self.tokens)
        entry["right"] = None if self.right is None else answer.text == self.right
        entry["same_as_full"] = answer.text == self.full.text
        return entry


def layers_of(report: dict[str, Any], fates: list[Any]) -> list[Layer]:
    """`Session.report` and `Generation.fates` as the page shows them."""
    names = {name for name in Layer.__dataclass_fields__ if name not in ("index", "fate")}
    rest = iter(fates)
    layers = []
    for entry in report["layers"]:
        fate = next(rest) if entry["compressed"] else None
        layers.append(
            Layer(
                index=entry["layer"],
                fate=fate.tolist() if fate is not None else None,
                **{name: finite(value) for name, value in entry.items() if name in names},
            )
        )
    return layers


def finite(value: Any) -> Any:
    """`value`, or None where it is no number that JSON knows."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def speed_text(speed: Speed) -> str:
    """Tokens per second, or why there are none."""
    if speed.tokens_per_second is None:
        return "one token"
    return f"{speed.tokens_per_second:.0f}" if speed.tokens_per_second >= 10 else f"{speed.tokens_per_second:.2f}"
