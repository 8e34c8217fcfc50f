"""The positions of the columns that a cache has seen, as far as models tell them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Places:
    """What forward passes told of positions; tokens decoded behind a prompt go on by one each.

    Attributes:
        ids: int64 [batch, columns], position ids of the columns seen up to the last prompt's end, the farthest of
            their axes. None: not known.
        last: position ids of the prompt's last tokens, [..., batch, 1], where the model was given them.
        ahead: [batch, 1], how far positions have run ahead of columns, where the model keeps that itself
            (`lookup.offsets`).
    """

    ids: Tensor | None = None
    last: Tensor | None = None
    ahead: Tensor | None = None

    def note(self, ids: Tensor | None, past: int, new: int, like: Tensor) -> None:
        """Note a pass's position ids, [..., batch or 1, new], behind `past` columns; None: those of the columns.

        Args:
            like: of the batch that it is, on its device.
        """
        if ids is None:
            ids = torch.arange(past, past + new, device=like.device)[None]
        elif ids.dim() > 2:
            ids = ids[-3:].amax(0)  # time, height and width; a fourth axis, in front, counts columns
        ids = ids.to(like.device).expand(len(like), -1)
        before = self.of(past)
        if past:
            self.ids = None if before is None else torch.cat([before, ids], 1)
        else:
            self.ids = ids

    def note_last(self, last: Tensor | None) -> None:
        """Note where the prompt that comes ends, as far as its tokens have come."""
        self.last = last

    def of(self, columns: int) -> Tensor | None:
        """The positions of the first `columns`, [batch, columns], those of decoded tokens written out."""
        ids = self.ids
        if ids is None:
            return None
        behind = columns - ids.shape[1]
        if behind <= 0:
            return ids[:, :columns]
        further = torch.arange(1, behind + 1, device=ids.device)
        return torch.cat([ids, ids.amax(1, keepdim=True) + further], 1)

    def note_ahead(self, ahead: Tensor | None, rows: int) -> None:
        """As in the attribute, [prompts, 1], of those that `generate` was given, each repeated to `rows` in all."""
        self.ahead = None if ahead is None else ahead.repeat_interleave(rows // len(ahead), 0)

    def crop(self, length: int) -> None:
        """Forget the columns from `length` on."""
        self.ids = None if self.ids is None else self.ids[:, :length]

    def select(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, in that order."""
        self.ids = None if self.ids is None else self.ids[rows.to(self.ids.device)]
        self.ahead = None if self.ahead is None else self.ahead[rows.to(self.ahead.device)]
        self.last = None if self.last is None else self.last[..., rows.to(self.last.device), :]
