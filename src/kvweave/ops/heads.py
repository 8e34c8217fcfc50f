"""A layer's heads where they are spread over processes (tensor parallelism): what all of them say, what is ours."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class Heads:
    """Processes that share a layer's heads, each holding equally many, in the order of their ranks.

    Numbers of heads are gathered, not summed, so that what is computed from them is what one process computes.

    Attributes:
        group: those processes; None: all heads are here.
        size: how many they are; rank: this one's number.
    """

    group: "dist.ProcessGroup | None" = None
    size: int = field(init=False, default=1)
    rank: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.group is not None:
            object.__setattr__(self, "size", self.group.size())
            object.__setattr__(self, "rank", self.group.rank())

    def gather(self, x: Tensor) -> Tensor:
        """`x` [batch, heads here, ...] of all heads, [batch, heads, ...]."""
        if self.group is None:
            return x
        own = x.contiguous() if x.dtype != torch.bool else x.to(torch.uint8).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own, group=self.group)
        return torch.cat(parts, 1).to(x.dtype)

    def own(self, x: Tensor) -> Tensor:
        """Of `x` [batch, heads, ...] what belongs to the heads here."""
        return x.chunk(self.size, 1)[self.rank]

    def each(self, numbers: Sequence[int], device: torch.device) -> list[list[int]]:
        """These numbers of each process: [processes][numbers]."""
        return self.gather(torch.tensor([[list(numbers)]], device=device))[0].tolist()


#: All of a layer's heads are in this process.
HERE = Heads()
