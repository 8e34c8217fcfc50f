"""Rotary tables of the columns that memory still holds: over endless input those of all columns would be endless."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvweave.ops.rotary import paired_tables

_FEW = 1024  # columns that are not worth a search for those that no slot stands for


@dataclass
class Tables:
    """Tables by column.

    Attributes:
        cos, sin: in pieces, [batch, columns, rotary_dim] each.
        columns: int64 [columns], ascending, which these are; in pieces of the same lengths.
        interleaved: how rotary pairs channels.
        kept: columns that were left when they were last looked through.
    """

    cos: list[Tensor] = field(default_factory=list)
    sin: list[Tensor] = field(default_factory=list)
    columns: list[Tensor] = field(default_factory=list)
    interleaved: bool = False
    kept: int = 0

    def append(self, cos: Tensor, sin: Tensor, start: int, batch: int, *, interleaved: bool) -> None:
        """Add a forward pass's tables, [batch or 1, new, rotary_dim], of the columns from `start` on."""
        self.crop(start)
        self.interleaved = interleaved
        for pieces, table in ((self.cos, cos), (self.sin, sin)):
            pieces.append(paired_tables(table, interleaved=interleaved).expand(batch, -1, -1))
        self.columns.append(torch.arange(start, start + cos.shape[1], device=cos.device))

    def at(self, rows: list[int], positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), [rows, kv_heads, length, rotary_dim] each, at the columns `positions` [rows, kv_heads, length].

        Args:
            rows: of the batch. A position that is none, -1, gets some column's.
        """
        self._join()
        index = torch.searchsorted(self.columns[0], positions.clamp(min=0).to(self.columns[0].device).contiguous())
        index = index.clamp(max=len(self.columns[0]) - 1)
        at = torch.tensor(rows, device=index.device)[:, None, None]
        cos, sin = (pieces[0][at, index].to(positions.device) for pieces in (self.cos, self.sin))
        return cos, sin

    @property
    def grown(self) -> bool:
        """There are many more columns than the slots stood for when they were last looked through."""
        return sum(map(len, self.columns)) > 2 * self.kept + _FEW

    def keep(self, positions: list[Tensor]) -> None:
        """Forget the columns that none of the slots at these positions stands for."""
        self._join()
        used = torch.cat([x.flatten().to(self.columns[0].device) for x in positions]).unique()
        self._take(torch.isin(self.columns[0], used))
        self.kept = len(self.columns[0])

    def crop(self, length: int) -> None:
        """Forget the columns from `length` on."""
        if self.columns and int(self.columns[-1][-1]) >= length:
            self._join()
            self._take(self.columns[0] < length)

    def select(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, in that order."""
        for pieces in (self.cos, self.sin):
            pieces[:] = [piece[rows.to(piece.device)] for piece in pieces]

    def _take(self, columns: Tensor) -> None:
        self.cos, self.sin = ([pieces[0][:, columns]] for pieces in (self.cos, self.sin))
        self.columns = [self.columns[0][columns]]
        if not len(self.columns[0]):
            self.cos, self.sin, self.columns = [], [], []

    def _join(self) -> None:
        if len(self.columns) > 1:
            self.cos, self.sin = ([torch.cat(pieces, 1)] for pieces in (self.cos, self.sin))
            self.columns = [torch.cat(self.columns)]
