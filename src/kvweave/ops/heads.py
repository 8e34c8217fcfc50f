"""A layer's heads where they are spread over processes (tensor parallelism): what all of them say, what is ours."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class Heads:
    """Processes that share a layer's heads, each holding equally many, in the order of their ranks.

    Numbers of heads are gathered, not summed, so that what is computed from them is what one process computes.

    Attributes:
        group: those processes; None: all heads are here.
    """

    group: "dist.ProcessGroup | None" = None

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

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

    def counts(self, count: int, device: torch.device) -> list[int]:
        """`count` of each process."""
        if self.group is None:
            return [count]
        return self.gather(torch.tensor([[count]], device=device))[0].tolist()


#: All of a layer's heads are in this process.
HERE = Heads()
