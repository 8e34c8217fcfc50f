"""A first cut, to more than stays, where the cut itself waits for tokens: the prompt is not held whole meanwhile.

It comes straight after a layer's own attention and goes by the prompt's rows, so that one layer is whole at a time.
What those rows say of the slots that are left is held as it was computed on the whole prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvweave.ops.heads import Heads
from kvweave.ops.select import ragged_places


@dataclass(frozen=True)
class Coarse:
    """What the first cut of a layer did.

    Attributes:
        bytes_before, bytes_after: of the prompt's keys and values in the layer, in all processes.
        fates: with `trace`, for each row int64 [kv_heads, length], -1 for each slot of the prompt that it evicted.
    """

    bytes_before: int
    bytes_after: int
    fates: list[Tensor] = field(default_factory=list)

    def rows(self, places: Sequence[int]) -> "Coarse":
        """The given rows of the batch, in that order."""
        return replace(self, fates=[self.fates[row] for row in places] if self.fates else [])


def of_slots_left(
    statistics: Sequence[dict[Any, Any]], fates: Sequence[Tensor], heads: Heads
) -> list[dict[Any, Any]]:
    """Of each row's statistics those of the slots that are left, heads that hold fewer with zeros in front.

    Statistics that are not of single slots are forgotten (`Needs.by_slot`), numbers alone stay.

    Args:
        statistics: for each row, tensors [1, heads, length] among others.
        fates: for each row [heads or 1, length], -1 for slots that are gone.
        heads: where the layer's other heads are; of a row slots are as many everywhere.
    """
    index = [ragged_places(fate[None] >= 0) for fate in fates]
    counts = [x.shape[-1] for x in index]
    most = (
        [max(each) for each in zip(*heads.each(counts, fates[0].device), strict=True)] if heads.size > 1 else counts
    )
    return [
        {
            key: value if isinstance(value, int) else _gathered(value, F.pad(own, (n - own.shape[-1], 0), value=-1))
            for key, value in row.items()
            if isinstance(value, int) or _by_slot(value, fate.shape[-1])
        }
        for row, own, n, fate in zip(statistics, index, most, fates, strict=True)
    ]


def _by_slot(value: Any, length: int) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3 and value.shape[-1] == length


def _gathered(value: Tensor, index: Tensor) -> Tensor:
    index = index.expand(-1, value.shape[1], -1)
    return value.gather(-1, index.clamp(min=0)).masked_fill(index < 0, 0)


def fate_after(first: Tensor, then: Tensor) -> Tensor:
    """What became of a row's slots in two cuts, of which the first evicts and does nothing else.

    Args:
        first: int64 [kv_heads, length]; then: int64 [kv_heads, slots that the second cut saw].
    Returns:
        int64 [kv_heads, length], the slot that a slot lives on in, -1: evicted.
    """
    index = ragged_places(first[None] >= 0)[0]
    index = F.pad(index, (then.shape[-1] - index.shape[-1], 0), value=-1)
    lives = index.gather(-1, then.clamp(min=0)).masked_fill(then < 0, -1)
    out = torch.full((len(first), first.shape[-1] + 1), -1, device=first.device)  # empty slots are written to the end
    return out.scatter_(-1, index.masked_fill(index < 0, first.shape[-1]), lives)[:, :-1]
