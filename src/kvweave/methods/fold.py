"""Fold: what is evicted is folded into its nearest kept entry, by its share of attention (kvfold; SPEC
17.2)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvweave.methods.base import Method
from kvweave.methods.merging import partition
from kvweave.methods.options import choice, flag, integer, real, wrapped
from kvweave.methods.registry import list_methods, method_class, register
from kvweave.methods.scored import ScoredMethod, Selection
from kvweave.methods.snapkv import SnapKV
from kvweave.methods.wrapping import ScoredWrapper
from kvweave.ops.match import nearest
from kvweave.ops.merge import segment_sum
from kvweave.ops.select import lowest_of
from kvweave.plan import Merge, Plan
from kvweave.view import LayerView


@register("fold", wrapper=True)
@dataclass(frozen=True)
class Fold(ScoredWrapper):
    """Keeps what a scored method keeps; each evicted token goes into the kept one of nearest key, none that stays by
    force.

    An entry's value is the mean of its members by attention, its bias the logarithm of what they received together
    over what it received alone: the last row's output is lost nothing where one head and one row made the score.
    """

    keeps_by = "the method's score"
    merges_by = "nearest free entry, values by score, bias"
    source = "kvfold, 2026"

    method: Method = wrapped(SnapKV, help="the scored method that decides")
    weights: str = choice(
        "score", "score", "uniform", help="a member weighs by its score over the entry's, or as much"
    )
    merge_keys: bool = flag(False, help="average keys by the same weights")
    targets: str = choice(
        "all", "all", "low", help="entries that others fold into: all free ones, or those of low score"
    )
    quantile: float = real(0.35, lo=0, hi=1, help="low: share of the free entries, lowest scores first")
    spare: int = integer(4, minimum=0, help="first tokens that nothing folds into")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights == "score" and not self.inside.attention_like:
            names = [name for name in list_methods() if _attention_like(method_class(name))]
            raise ValueError(
                f"weights='score' is not allowed for method={self.method.name!r}, whose scores are no shares of "
                f"attention: allowed is weights='uniform', or one of {', '.join(names)}"
            )

    @property
    def biases_logits(self) -> bool:
        return True

    def planned(self, view: LayerView, budget: int | tuple[int, ...]) -> Plan:
        selection = self.inside.selection(view, budget)
        keep, source = partition(view, selection.kept)
        goal, at = keep.clamp(min=0), source.clamp(min=0)
        allowed = (self.eligible(selection) & selection.kept).gather(-1, goal) & (keep >= 0)
        target, _ = nearest(view.keys, at, goal, allowed[:, :, None], torch.zeros_like(at))
        target = target.masked_fill(source < 0, -1)

        to = goal.gather(-1, target.clamp(min=0))
        ratio = self.ratio(view, selection, at, to).masked_fill(target < 0, 0)
        total = 1 + segment_sum(ratio, target, keep.shape[-1])
        mass = view.mass.gather(-1, goal) + segment_sum(view.mass.gather(-1, at), target, keep.shape[-1])
        weight = ratio / total.gather(-1, target.clamp(min=0))
        bias = total.log().float()
        if view.bias is not None:
            bias = bias + view.bias.gather(-1, goal).float()
        plan = Plan(keep, Merge(at, target, weight, 1 / total, mass, keys=self.merge_keys), bias)
        return self.inside.described(view, replace(plan, uneven=not selection.even))

    def eligible(self, selection: Selection) -> Tensor:
        """Entries that others may fold into: bool [batch, kv_heads, length]."""
        free = selection.kept & selection.candidates
        free = free & (torch.arange(free.shape[-1], device=free.device) >= self.spare)
        return free if self.targets == "all" else lowest_of(selection.scores.value, free, self.quantile)

    def ratio(self, view: LayerView, selection: Selection, source: Tensor, target: Tensor) -> Tensor:
        """What each source weighs against its target alone: [batch, kv_heads, sources]."""
        if self.weights == "uniform":
            weights = view.slot_weights().to(selection.scores.value.dtype)
            return weights.gather(-1, source) / weights.gather(-1, target).clamp(min=1e-30)
        score = selection.scores.value.clamp(min=1e-30).log()
        return (score.gather(-1, source) - score.gather(-1, target)).clamp(-30, 30).exp()


def _attention_like(cls: type[Method]) -> bool:
    return issubclass(cls, ScoredMethod) and cls.attention_like and Fold.accepts(cls())
