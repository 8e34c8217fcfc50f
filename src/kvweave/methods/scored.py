"""What every method shares that keeps some tokens by force and the best of the others by one score (SPEC
16.10).

The score comes first, reduced over heads and rows as the options say and lent to neighbours; then the tokens that
stay by force; then how many each head keeps (`kvweave.methods.allocation`). Wrappers ask for the `Selection` and go
on.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kvweave.methods.allocation import Pool, Quota, profile_counts, share_out
from kvweave.methods.base import Method
from kvweave.methods.needs import Needs, Reduction
from kvweave.methods.options import choice, integer, real, text
from kvweave.ops.budget import GUARD, entries, floor
from kvweave.ops.select import lend, of_some, ragged_places, ranks_by, top_and_recent, top_and_recent_of_each
from kvweave.plan import Plan
from kvweave.view import LayerView

_LEAST = 0.2  # share of a prompt that a coarse cut goes by at least: of less, too little is known before the reply


@dataclass(frozen=True)
class Scores:
    """What tokens are ranked by.

    Attributes:
        value: float [batch, kv_heads, n], of all tokens or of those before the recent ones.
        first: bool, alike: tokens that come before all others whatever their value; None: none does.
        ties: float, alike: decides where values are equal, before the position does; None: the position.
    """

    value: Tensor
    first: Tensor | None = None
    ties: Tensor | None = None

    @property
    def keys(self) -> list[Tensor]:
        """The same as keys of decreasing rank."""
        first = None if self.first is None else self.first.to(self.value.dtype)
        return [key for key in (first, self.value, self.ties) if key is not None]

    def shared(self, heads_by: str) -> "Scores":
        """Of all heads together, [batch, 1, n]: their mean, or the largest; a token comes first if it does in any."""

        def one(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.amax(1, keepdim=True) if heads_by == "max" else x.mean(1, keepdim=True)

        first = None if self.first is None else self.first.any(1, keepdim=True)
        value = one(self.value)
        assert value is not None
        return Scores(value, first, one(self.ties))

    def over(self, length: int) -> "Scores":
        """With the tokens that have no score among the last of all."""

        def padded(x: Tensor | None, fill: float) -> Tensor | None:
            return None if x is None else F.pad(x, (0, length - x.shape[-1]), value=fill)

        value = F.pad(self.value, (0, length - self.value.shape[-1]), value=-torch.inf)
        return Scores(value, padded(self.first, 0), padded(self.ties, 0))


@dataclass(frozen=True)
class Selection:
    """What a scored method keeps of one layer, and by what.

    Attributes:
        view: what memory holds of the layer.
        scores: of all tokens.
        quota: what stays by force.
        counts: entries that stay by row and KV head, those by force included; a head that holds fewer keeps them all.
        even: all heads keep equally many.
    """

    view: LayerView
    scores: Scores
    quota: Quota
    counts: list[list[int]]
    even: bool

    @cached_property
    def _tokens(self) -> tuple[Tensor, Tensor]:
        return forced_tokens(self.view, self.quota)

    @property
    def forced(self) -> Tensor:
        """Tokens that stay whatever their score: bool [1 or batch, 1 or kv_heads, length]."""
        return self._tokens[0]

    @property
    def valid(self) -> Tensor:
        """Slots that hold a token: bool [1 or batch, 1 or kv_heads, length]."""
        return self._tokens[1]

    @property
    def candidates(self) -> Tensor:
        """Tokens that stay by their score, or not: bool [batch, kv_heads, length]."""
        return (self.valid & ~self.forced).expand_as(self.scores.value)

    @cached_property
    def free(self) -> Tensor:
        """How many stay by their score: int64 [batch, kv_heads]."""
        asked = torch.tensor(self.counts, device=self.scores.value.device)
        by_force = (self.forced & self.valid).sum(-1)
        return (asked - by_force).clamp(min=0).minimum((self.valid & ~self.forced).sum(-1))

    def top(self, count: Tensor) -> Tensor:
        """The best `count` [batch, kv_heads] candidates: bool [batch, kv_heads, length]."""
        among = self.candidates
        return among & (ranks_by(of_some(self.scores.keys, among)) < count[..., None])

    @property
    def kept(self) -> Tensor:
        """Tokens that stay: bool [batch, kv_heads, length]."""
        return self.top(self.free) | (self.forced & self.valid)

    def plan(self) -> Plan:
        """Keeps what was selected and evicts the rest."""
        if self.view.empty is not None or len(self.scores.keys) > 1:
            return Plan(ragged_places(self.kept), uneven=not self.even)
        sinks, recent, length = self.quota.sinks, self.quota.recent, self.view.length
        counts = [[min(max(count, sinks + recent), length) for count in row] for row in self.counts]
        keep = top_and_recent_of_each(self.scores.value, counts, recent, sinks=sinks)
        return Plan(keep, uneven=not self.even, counts=counts)


@dataclass(frozen=True)
class ScoredMethod(Method):
    """Base of methods that keep forced tokens, and the best of the others by one score a token."""

    _: dataclasses.KW_ONLY
    heads_by: str = choice(
        "mean", "mean", "max", help="attention of a KV head's query heads: their mean or the largest"
    )
    rows_by: str = choice("mean", "mean", "max", help="attention of the rows that count: their mean or the largest")
    ahead: int = integer(0, minimum=0, help="tokens behind a token that its score is lent to; no pooling then")
    behind: int = integer(0, minimum=0, help="tokens before a token that its score is lent to; no pooling then")
    fade: float = real(
        1.0, lo=0, hi=1, open_lo=True, help="what a lent score is multiplied by for each token that it is lent across"
    )
    allocation: str = choice(
        "head",
        "head",
        "layer",
        "global",
        "profile",
        help="entries of a head: alike, by score over its layer's heads or over all layers', or by a profile",
    )
    floor: float = real(0.2, lo=0, hi=1, help="layer, global: share of its free entries that a head has for itself")
    profile: str | None = text(
        None,
        allowed="the path of a profile, the name of one that is shipped, or None",
        help="profile: the file with the shares, or a shipped one's name",
    )
    mix: float = real(0.5, lo=0, hi=1, help="profile: weight of what global gives this prompt")
    coarse: float = real(
        0,
        lo=0,
        hi=math.inf,
        open_hi=True,
        help="with defer: a head holds so many times its entries until the cut, or what it would keep of a fifth of "
        "the prompt, by the prompt's own rows; 0: all",
    )

    shares_options: ClassVar[bool] = True
    #: Scores are positive and their ratios mean something, as those of attention do.
    attention_like: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        holds = bool(self.coarse) and self.allocation == "global"  # till the cut, by the profile's shares
        if (self.allocation == "profile") != (self.profile is not None) and not holds:
            raise ValueError(
                f"profile={self.profile!r} is not allowed with allocation={self.allocation!r}: allowed is the path "
                "of a profile with allocation='profile', and None else"
            )
        if self.fade < 1 and not self.attention_like:
            raise ValueError(
                f"fade={self.fade} is not allowed with method={self.name!r}, whose scores are not attention: "
                "allowed is 1"
            )
        if self.coarse:
            self._check_coarse()

    def _check_coarse(self) -> None:
        """Refuse `coarse` where nothing waits, or what waits cannot be had of some slots alone."""
        why = ""
        if self.coarse < 1:
            why = "at all: allowed is 0, or a number from 1 on"
        elif not self.defer:
            why = "with defer=0, which cuts at once: allowed is defer >= 1"
        elif not self.needs.by_slot:
            why = f"for {self.name}, which goes by more than what rows pay to each slot: allowed is 0"
        if why:
            raise ValueError(f"coarse={self.coarse} is not allowed {why}")

    # ------------------------------------------------------------ what a method defines

    def score(self, view: LayerView, quota: Quota) -> Tensor | Scores:
        """What a token is worth: [batch, kv_heads, length], or of the tokens before the recent ones alone."""
        raise TypeError(f"{type(self).__name__} does not define score(view, quota)")

    def quota(self, budget: int, mean_budget: int) -> Quota:
        """Tokens that stay by force where `budget` entries do; here the options `recent` and `sinks` (15.2).

        Args:
            mean_budget: entries of a layer on average, before they were shared out over layers.
        """
        recent = min(getattr(self, "recent", 0), budget // 2)
        return Quota(budget, min(getattr(self, "sinks", 0), (budget - recent) // 2), recent)

    # ------------------------------------------------------------ what follows from it

    @property
    def needs_heads(self) -> str:
        if self.uneven or self.allocation in ("layer", "profile"):
            what = f"method={self.name}" if self.uneven else f"allocation={self.allocation!r}"
            return f"{what} gives each head a count of its own"
        if getattr(self, "per_head", False):
            return "per_head=True gives each head tokens of its own"
        return f"method={self.name} turns keys, of which MLA turns a part" if self.needs.rotary else ""

    @property
    def reduction(self) -> Reduction:
        """How attention is reduced, over rows and over heads."""
        return self.rows_by, self.heads_by

    @property
    def lends(self) -> bool:
        """Scores are lent to neighbours, which takes the place of pooling."""
        return bool(self.ahead or self.behind)

    @property
    def needs(self) -> Needs:
        return replace(super().needs, decoded=(self.reduction,))

    @property
    def layer_adaptive(self) -> bool:
        return self.pools

    @property
    def profiles(self) -> tuple[str, ...]:
        return () if self.profile is None else (self.profile,)

    @property
    def pools(self) -> bool:
        return self.allocation == "global" or (self.allocation == "profile" and self.mix > 0)

    def ranking(self, view: LayerView, quota: Quota) -> Scores:
        """Scores of the layer, lent to neighbours."""
        scores = self.score(view, quota)
        scores = scores if isinstance(scores, Scores) else Scores(scores)
        if view.stored is not None:
            view, scores = view.stored, scores.shared(self.heads_by)
        if not self.lends:
            return scores
        ties = None if scores.ties is None else lend(scores.ties, self.ahead, self.behind, self.fade)
        value = scores.value if view.empty is None else scores.value.masked_fill(view.empty, -torch.inf)
        return Scores(lend(value, self.ahead, self.behind, self.fade), scores.first, ties)

    def prepare(self, view: LayerView, budget: int) -> None:
        super().prepare(view, budget)
        self.score(view, self.quota(budget, budget))  # lending asks for no more

    def plan(self, view: LayerView, budget: int) -> Plan:
        if self.allocation == "head" and view.empty is None and not self.uneven:
            quota = self.quota(budget, view.mean_budget or budget)
            scores = self.ranking(view, quota)
            return self.described(view, Plan(even_keep(view.storage, scores, quota)))
        return self.evicting(view, self.selection(view, budget))

    def plan_heads(self, view: LayerView, counts: tuple[int, ...]) -> Plan:
        return self.evicting(view, self.selection(view, counts))

    def evicting(self, view: LayerView, selection: Selection) -> Plan:
        """The plan that keeps what was selected and evicts the rest."""
        return self.described(view, selection.plan())

    def described(self, view: LayerView, plan: Plan) -> Plan:
        """The plan, with what the report is to say."""
        return plan

    #: Heads keep different counts whatever the allocation (AdaKV).
    uneven: ClassVar[bool] = False

    def selection(self, view: LayerView, budget: int | tuple[int, ...]) -> Selection:
        """What stays of one layer, and by what.

        Args:
            budget: entries of each KV head; or, where they were shared out over layers, of each apart.
        """
        mean = view.mean_budget or (budget if isinstance(budget, int) else sum(budget) // len(budget))
        quota = self.quota(budget if isinstance(budget, int) else mean, mean)
        scores = self.ranking(view, quota).over(view.length)
        view = view.storage
        if isinstance(budget, tuple):
            kv_heads = view.kv_heads * view.heads.size
            if len(budget) != kv_heads:
                raise ValueError(
                    f"profile={self.profile!r} has {len(budget)} KV heads a layer, and the model {kv_heads}: "
                    "allowed is a profile of this model"
                )
            counts, even = [list(budget)] * view.batch, False
        else:
            counts, even = self.shares(view, quota, scores), self.allocation == "head"
        own = [row[view.first_head : view.first_head + view.kv_heads] for row in counts]
        return Selection(view, scores, quota, own, even and view.empty is None and not self.uneven)

    def shares(self, view: LayerView, quota: Quota, scores: Scores) -> list[list[int]]:
        """Entries that each of the layer's heads keeps, by row, known without the other layers."""
        if self.allocation == "layer":
            pool = self.pool(view, self.rivals(view, quota, scores), quota)
            return [share_out([pool.row(n)], self.floor)[0] for n in range(view.batch)]
        return [[quota.budget] * (view.kv_heads * view.heads.size)] * view.batch

    # ------------------------------------------------------------ what is held until the cut

    def on_model(self, profile: Callable[[], str | None]) -> "Method":
        if not self.coarse or self.allocation != "global" or self.profile is not None:
            return self
        known = profile()
        return self if known is None else replace(self, profile=known)

    def searching(self) -> Method:
        found = super().searching()
        return found if found is self else replace(self, budget=found.budget, coarse=0)

    @property
    def coarse_cut(self) -> Method | None:
        if not self.coarse:
            return None
        alike = "layer" if self.allocation == "layer" else "head"
        how: dict[str, Any] = {"allocation": alike, "profile": None, "coarse": 0, "defer": 0, "redecode": False}
        return replace(self, budget=0.5, **how)  # of any budget: it is told how many entries stay

    @property
    def coarse_refusal(self) -> str:
        lacks = bool(self.coarse) and self.allocation == "global" and self.profile is None
        return "allocation=global, and no profile of the model" if lacks else ""

    def coarse_budgets(self, budget: int, length: int, layers: int) -> list[Any] | None:
        if not self.coarse or self.coarse_refusal:
            return None
        budget = max(budget, floor(_LEAST * length))
        if self.profile is None:
            shares = self.layer_budgets(budget, length, layers)
        else:
            shares = profile_counts(self.profile, layers, self.quota(budget, budget), length)

        def more(count: int) -> int:
            return min(length, math.ceil(self.coarse * count - GUARD))

        return [more(share) if isinstance(share, int) else tuple(map(more, share)) for share in shares]

    # ------------------------------------------------------------ budgets over all layers

    def keeps_all(self, length: int) -> bool:
        if self.allocation != "profile" or self.pools or isinstance(self.budget, str):
            return super().keeps_all(length)
        return entries(self.budget, length, 0) >= length

    def layer_budgets(self, budget: int, length: int, layers: int) -> list[Any]:
        if self.allocation != "profile" or self.pools:
            return super().layer_budgets(budget, length, layers)
        return profile_counts(self.profile or "", layers, self.quota(budget, budget), length)

    def observe(self, view: LayerView) -> Any:
        if not self.pools:
            return super().observe(view)
        quota = self.quota(view.mean_budget, view.mean_budget)
        return self.pool(view.storage, self.rivals(view, quota).over(view.length), quota)

    def rivals(self, view: LayerView, quota: Quota, scores: Scores | None = None) -> Scores:
        """What heads compete for entries by; `scores` are the layer's, where they are known already."""
        return scores or self.ranking(view, quota)

    def pool(self, view: LayerView, scores: Scores, quota: Quota) -> Pool:
        """The layer's tokens as they compete, of all its heads."""
        forced, valid = (view.over_heads(x.expand_as(scores.value)) for x in forced_tokens(view, quota))
        return Pool([view.over_heads(key) for key in scores.keys], forced, valid, quota)

    def allocate(self, weights: list[Any], budget: int, length: int) -> list[Any]:
        if not self.pools:
            return super().allocate(weights, budget, length)
        if not isinstance(weights[0], Pool):  # a row without a token
            return [0] * len(weights)
        counts_of = [tuple(counts) for counts in share_out([pool.row(0) for pool in weights], self.floor)]
        if self.allocation == "profile":
            ceilings = [tuple(pool.row(0).valid.sum(-1).tolist()) for pool in weights]
            path, quota = self.profile or "", weights[0].quota
            counts_of = profile_counts(path, len(weights), quota, length, counts_of, self.mix, ceilings)
        return counts_of


def even_keep(view: LayerView, scores: Scores, quota: Quota) -> Tensor:
    """Slots that stay where every head keeps equally many: int64 [batch, kv_heads, kept]."""
    if scores.first is None and scores.ties is None:
        return top_and_recent(scores.value, quota.budget, quota.recent, view.length, sinks=quota.sinks)
    between = slice(quota.sinks, view.length - quota.recent)
    ranks = ranks_by([key[..., between] for key in scores.keys])
    score = view.length - quota.recent - quota.sinks - ranks  # the higher the better, all different
    padded = F.pad(score, (quota.sinks, 0))
    return top_and_recent(padded, quota.budget, quota.recent, view.length, sinks=quota.sinks)


def forced_tokens(view: LayerView, quota: Quota) -> tuple[Tensor, Tensor]:
    """Slots of the first `sinks` and last `recent` tokens, and slots that hold a token at all.

    Returns:
        bool [batch, kv_heads, length] twice, or [1, 1, length] where every slot holds a token.
    """
    if view.empty is None:
        place = torch.arange(view.length, device=view.keys.device)[None, None]
        valid = torch.ones_like(place, dtype=torch.bool)
        count: Any = view.length
    else:
        valid = ~view.empty
        place = valid.cumsum(-1) - 1
        count = valid.sum(-1, keepdim=True)
    return ((place < quota.sinks) | (place >= count - quota.recent)) & valid, valid
