"""What a layer's last cut did, as the report says it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kvweave.ops.heads import Heads


@dataclass(frozen=True)
class Record:
    """Of one layer; nothing is brought to the host before somebody asks.

    Attributes:
        lengths: real tokens of each row.
        kept: [batch, kv_heads], prompt entries left.
        represented: float [batch, kv_heads], tokens they stand for.
        heaviest: float [batch, kv_heads], tokens that the heaviest of them stands for.
        bytes_before, bytes_after: of the prompt's keys and values in the layer.
        bytes_behind: of the tokens decoded before the cut.
        bytes_coarse: of what a first, coarse cut left of the prompt; None: there was none.
        rows: for each row, what its plan says of itself: flow ratio, scope, ...
    """

    lengths: list[int]
    kept: Tensor
    represented: Tensor
    heaviest: Tensor
    bytes_before: int
    bytes_after: int
    rows: list[dict[str, Any]]
    bytes_behind: int = 0
    bytes_coarse: int | None = None

    @property
    def words(self) -> dict[str, Any]:
        """What the method says of all layers and rows alike."""
        words: dict[str, Any] = grouped(self.rows[0]).get("report", {}) if self.rows else {}
        return words

    def described(self) -> dict[str, Any]:
        """JSON-able. Counts are means over rows and KV heads, whole numbers that add up to the length."""
        kept, represented = (x.double().mean(1).tolist() for x in (self.kept, self.represented))
        counted = list(zip(self.lengths, kept, represented, strict=True))
        n = len(counted)
        words: dict[str, Any] = {"flow": None, "scope": None}
        for name in dict.fromkeys(name for row in self.rows for name in row):
            values = [row[name] for row in self.rows if name in row]
            if all(isinstance(value, (str, bool)) for value in values):
                words[name] = values[0] if len(set(values)) == 1 else "mixed"
            else:
                words[name] = sum(values) / len(values)
        words = _of_the_layer(words)
        described = {
            **_counts(*(sum(column) / n for column in zip(*counted, strict=True))),
            "heaviest": round(float(self.heaviest.max())),
            "bytes": self.bytes_after,
            "bytes_before": self.bytes_before,
            **words,
        }
        if n > 1:
            described["rows"] = [
                _counts(*row) | _of_the_layer(own) for row, own in zip(counted, self.rows, strict=True)
            ]
        return described


def tally(real: Tensor | None, mass: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Entries, the tokens that they stand for, and that the heaviest stands for, [batch, kv_heads of the layer] each.

    Args:
        real: bool [batch, kv_heads, slots], those that hold an entry; None: all do, which no device is asked for.
        mass: [batch, kv_heads, slots].
        heads: where they are.
    """
    if real is None:
        kept = torch.full(mass.shape[:2], mass.shape[-1], device="cpu" if heads.size == 1 else mass.device)
    else:
        kept, mass = real.sum(-1), mass * real
    counts = kept, mass.sum(-1), mass.amax(-1)
    if heads.size == 1:
        return counts
    kept, represented, heaviest = heads.gather(torch.stack([x.to(mass.dtype) for x in counts], -1)).unbind(-1)
    return kept, represented, heaviest


def _of_the_layer(words: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in grouped(words).items() if name != "report"}


def grouped(words: dict[str, Any]) -> dict[str, Any]:
    """Names "a.b" as b within a."""
    out: dict[str, Any] = {}
    for name, value in words.items():
        group, dot, inner = name.partition(".")
        if dot:
            out.setdefault(group, {})[inner] = value
        else:
            out[name] = value
    return out


def _counts(length: float, kept: float, represented: float) -> dict[str, int]:
    total, stay = round(length), round(kept)
    merged = round(represented) - stay  # of halves too the counts add up
    return {"length": total, "kept": stay, "merged": merged, "evicted": total - stay - merged}


def peak(records: Sequence[Record], together: bool) -> int:
    """Most bytes held at once while these layers were filled and cut.

    Args:
        together: none had its last cut before all were filled.
    """
    left = [record.bytes_after for record in records]
    if together:
        left = [record.bytes_before if record.bytes_coarse is None else record.bytes_coarse for record in records]
    filled = max((done + x.bytes_before for done, x in zip([0, *accumulate(left)], records, strict=False)), default=0)
    return max(filled, sum(left) + sum(record.bytes_behind for record in records)) if together else filled
