"""What a layer's last cut did, as the report says it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Record:
    """Of one layer; nothing is brought to the host before somebody asks.

    Attributes:
        lengths: real tokens of each row.
        kept: int64 [batch, kv_heads], prompt entries left.
        represented: float [batch, kv_heads], tokens they stand for.
        heaviest: float [], tokens that the heaviest entry stands for.
        bytes_before, bytes_after: of the prompt's keys and values in the layer.
        bytes_behind: of the tokens decoded before the cut.
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

    def described(self) -> dict[str, Any]:
        """JSON-able. Counts are means over rows and KV heads, whole numbers that add up to the length."""
        kept, represented = (x.double().mean(1).tolist() for x in (self.kept, self.represented))
        counted = list(zip(self.lengths, kept, represented, strict=True))
        n = len(counted)
        words: dict[str, Any] = {"flow": None, "scope": None}
        for name in dict.fromkeys(name for row in self.rows for name in row):
            said = [row[name] for row in self.rows if name in row]
            if all(isinstance(value, str) for value in said):
                words[name] = said[0] if len(set(said)) == 1 else "mixed"
            else:
                words[name] = sum(said) / len(said)
        described = {
            **_counts(*(sum(column) / n for column in zip(*counted, strict=True))),
            "heaviest": round(float(self.heaviest)),
            "bytes": self.bytes_after,
            "bytes_before": self.bytes_before,
            **words,
        }
        if n > 1:
            described["rows"] = [_counts(*row) | said for row, said in zip(counted, self.rows, strict=True)]
        return described


def _counts(length: float, kept: float, represented: float) -> dict[str, int]:
    total, stay, merged = round(length), round(kept), round(represented - kept)
    return {"length": total, "kept": stay, "merged": merged, "evicted": total - stay - merged}
