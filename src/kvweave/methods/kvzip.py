"""KVzip: what a model looks at while it says its context again (Kim et al., 2505.23416; SPEC 16.9)."""

import math
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor

from kvweave.methods.allocation import Quota
from kvweave.methods.needs import ALL_ROWS, Needs
from kvweave.methods.options import choice, flag, integer, real
from kvweave.methods.registry import register
from kvweave.methods.scored import ScoredMethod
from kvweave.plan import Plan
from kvweave.view import LayerView


def surprise_option() -> float:
    """As every method that reads a prompt again declares it."""
    return real(
        0.0,
        lo=0,
        hi=math.inf,
        open_hi=True,
        help="nats: a row that is read again counts by what it leads to; 0: alike",
    )


@register("kvzip")
@dataclass(frozen=True)
class KVzip(ScoredMethod):
    """Keeps the tokens that received most attention from any probed row and head; all heads compete for the budget.

    The probes repeat the context: the model reads it again behind itself where no others are named, which is one more
    prefill. Where that is not done (`replay=False`, `defer`, no model) the prompt's own rows take their place. The
    softmax is that of the attention that happened; the released code narrows it to a chunk, to save time.
    """

    keeps_by = "largest attention from any probed row and head"
    allocates_by = "score over all heads and layers (uneven heads)"
    source = "2505.23416"
    attention_like = True

    sinks: int = integer(4, minimum=0, help="first tokens that stay, at most half of what recent ones leave")
    recent: int = integer(0, minimum=0, help="last tokens that stay, at most half of the budget")
    _: KW_ONLY
    allocation: str = choice(
        "global",
        "global",
        "layer",
        "head",
        "profile",
        help="entries of a head: by score over all layers' heads, over its layer's, alike, or the model's profile",
    )
    floor: float = real(0.0, lo=0, hi=1, help="layer, global: share of its free entries that a head has for itself")
    rows_by: str = choice("max", "mean", "max", help="attention of the rows that count: the largest, or their mean")
    heads_by: str = choice(
        "max", "mean", "max", help="attention of a KV head's query heads: the largest or their mean"
    )

    replay: bool = flag(True, help="without probes and defer, read the prompt again before it is cut")
    images: bool = flag(False, help="read the images again, too, instead of describing them")
    surprise: float = surprise_option()

    @property
    def needs(self) -> Needs:
        replay = self.replay and not self.defer
        return replace(super().needs, rows=ALL_ROWS, replay=replay, images=self.images, surprise=self.surprise)

    def score(self, view: LayerView, quota: Quota) -> Tensor:
        probed = view.decoded_attention(*self.reduction)
        if view.probed and probed is not None:
            return probed
        if self.rows_by == "mean":
            return view.column_mass(*self.reduction)
        own = view.received(*self.reduction)
        return own if probed is None else torch.maximum(own, probed)

    def described(self, view: LayerView, plan: Plan) -> Plan:
        return replace(plan, words={"rows": "probes" if view.probed else "prompt"})
