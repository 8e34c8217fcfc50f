"""How much is run, and on what."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BUDGETS = (1.0, 0.2, 0.05)
BUDGET = 0.2  # of the methods in the prefill tables

#: Seconds of each part, in the order in which they run: what is worth most comes first.
LIMITS = {
    "kernels": 75, "column sums": 15, "decode": 40, "end to end": 60, "prefill": 80, "whole model": 40, "tests": 75,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Prompts of `length` tokens, `batch` of them."""

    length: int
    batch: int

    def __str__(self) -> str:
        return f"{self.length} x {self.batch}"


@dataclass(frozen=True)
class Plan:
    """Qwen2.5-VL-7B's language model, and what is measured on it."""

    device: torch.device
    dtype: torch.dtype
    heads: int = 28
    kv_heads: int = 4
    dim: int = 128
    layers: int = 28
    hidden: int = 3584
    mlp: int = 18944
    vocabulary: int = 152064
    checked: tuple[tuple[int, int, int, int, int], ...] = (  # batch, heads, KV heads, dim, tokens
        (2, 14, 2, 64, 1500),
        (1, 28, 4, 128, 2049),
        (3, 6, 6, 80, 333),
    )
    prefill: tuple[int, ...] = (2048, 4096, 8192)
    decode: tuple[Case, ...] = (Case(8192, 1), Case(32768, 1), Case(8192, 8), Case(32768, 8))
    whole: tuple[Case, ...] = (Case(8192, 1), Case(32768, 1), Case(8192, 8), Case(8192, 32), Case(32768, 32))
    rounds: int = 5
    steps: int = 16  # of a decode, end to end
    copied: int = 2**32  # bytes of the copy that measures bandwidth
    cold: int = 2**28  # bytes that the layers hold together at least, so that a cache of the chip does not serve them
    busy: int = 160_000_000  # clock cycles of the work that a compression is queued behind
    patience: float = 2.0  # seconds a round may take; a method slower than that is not run at longer prompts

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    @property
    def entry(self) -> int:
        """Bytes of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.dim * self.dtype.itemsize

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


#: To see that it runs.
QUICK: dict[str, Any] = {
    "layers": 2, "hidden": 64, "mlp": 64, "vocabulary": 128, "checked": ((2, 14, 2, 64, 150),),
    "prefill": (64, 128), "decode": (Case(256, 1), Case(256, 2)), "whole": (Case(256, 1), Case(256, 2)),
    "rounds": 2, "steps": 3, "copied": 2**20, "cold": 0, "patience": math.inf,
}  # fmt: skip
