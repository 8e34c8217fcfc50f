"""What kvzip's score gives each head of a prompt (SPEC 17.7).

The prompt is read, and read again behind itself; entries are kept by kvzip's score, all layers' heads competing. How
many each head gets at a budget is nearly the same for every prompt: it belongs to the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvweave.methods.allocation import Pool, share_out
from kvweave.methods.kvzip import KVzip
from kvweave.ops.budget import entries
from kvweave.seam.entry import compress

BUDGETS = (0.5, 0.3, 0.2, 0.1, 0.05)

Table = list[list[list[float]]]  # shares [budgets][layers][kv_heads]


@dataclass(frozen=True)
class Counting(KVzip):
    """Notes what each head would get at every budget of a profile.

    Attributes:
        found: a table for each prompt.
    """

    found: list[Table] = field(default_factory=list, compare=False)

    def allocate(self, weights: list[Any], budget: int, length: int) -> list[Any]:
        self.found.append([self.shares_at(share, weights, length) for share in BUDGETS])
        return super().allocate(weights, budget, length)

    def shares_at(self, share: float, pools: Sequence[Pool], length: int) -> list[list[float]]:
        """The share of the prompt that each head gets: [layers][kv_heads]."""
        budget = entries(share, length, 0)
        quota = self.quota(budget, budget)
        rows = []
        for pool in (pool.row(0) for pool in pools):
            first = pool.valid & (pool.valid.cumsum(-1) <= quota.sinks)
            rows.append(replace(pool, forced=first, quota=quota))
        return [[count / length for count in counts] for counts in share_out(rows, self.floor)]


@torch.inference_mode()
def shares_of(model: Any, processor: Any, inputs: dict[str, Any]) -> Table:
    """What each head wants of one prompt at every budget."""
    method = Counting(budget=BUDGETS[0])
    with compress(model, method, probes="replay", processor=processor):
        model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}, use_cache=True)
    if not method.found:
        raise ValueError(f"{type(model).__name__} has no layer that kvweave compresses: allowed is one that has")
    return method.found[-1]
