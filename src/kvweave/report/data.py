"""What a page or a picture of a run shows: plain data, collected elsewhere."""

import math
from collections.abc import Callable, Sequence
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
        return cells_of([self])


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
        return [(_places(run), run[0]) for run in runs]

    def bands(self, most: int) -> list[tuple[str, list[Layer]]]:
        """`runs`, or where they are more than `most`, neighbours together: about so many bands of compressed layers.

        Layers that are not compressed stand together, by kind: ("0-4, 6-10", all of them).
        """
        if len(self.runs) <= most:
            return [(place, [layer]) for place, layer in self.runs]
        compressed = [layer for layer in self.layers if layer.compressed]
        size = max(1, -(-len(compressed) // most))
        bands = [compressed[start : start + size] for start in range(0, len(compressed), size)]
        kinds = dict.fromkeys(layer.kind for layer in self.layers if not layer.compressed)
        bands += [[layer for layer in self.layers if not layer.compressed and layer.kind == kind] for kind in kinds]
        return [(_places(band), band) for band in sorted(bands, key=lambda band: band[0].index)]

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


def cells_of(layers: Sequence[Layer]) -> dict[str, str]:
    """A row of a table for layers of one kind: column to text, where they differ the least and the most."""
    flows = [layer.flow for layer in layers if layer.flow is not None]
    scopes = {layer.scope for layer in layers if layer.scope}
    merged = [layer for layer in layers if layer.merged]
    return {
        "flow": _span(flows, lambda flow: f"{flow:.3f}" if len(flows) == 1 else f"{flow:.2f}"),
        "scope": "both" if len(scopes) > 1 else "".join(scopes),
        "kept": _span([layer.kept for layer in layers], str),
        "merged": _span([layer.merged for layer in layers], str),
        "heaviest": _span([layer.heaviest for layer in merged], str),
        "evicted": _span([layer.evicted for layer in layers], str),
        "size": _span([layer.bytes for layer in layers], size),
    }


def _span(values: Sequence[Any], text: Callable[[Any], str]) -> str:
    """The least and the most of some numbers: "76-100", with their unit once where it is the same."""
    if not values:
        return ""
    least, most = text(min(values)), text(max(values))
    if least == most:
        return least
    number, _, unit = least.partition(" ")
    return f"{number if unit == most.partition(' ')[2] else least}-{most}"


def _places(layers: Sequence[Layer]) -> str:
    """Numbers of layers, in order: "0-4, 6"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer.index == runs[-1][-1] + 1:
            runs[-1].append(layer.index)
        else:
            runs.append([layer.index])
    return ", ".join(_span(run, str) for run in runs)


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
