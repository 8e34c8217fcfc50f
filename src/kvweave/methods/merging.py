"""What every method that merges dropped tokens into kept ones shares."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvweave.methods.base import Method
from kvweave.methods.needs import Needs
from kvweave.methods.options import choice, flag
from kvweave.ops.match import nearest
from kvweave.ops.merge import RULES, merge_weights, segment_sum, tangent_bias
from kvweave.ops.select import complement, ragged_places
from kvweave.plan import Merge, Plan
from kvweave.view import LayerView


@dataclass(frozen=True)
class MergingMethod(Method):
    """Base of methods that merge dropped tokens into kept ones (SPEC 2.2 and 4)."""

    merge_rule: str = choice("similarity", *RULES, help="weights of the members of a merged entry")
    merge_keys: bool = flag(True, help="merge keys as well as values")
    mass_bias: bool = flag(False, help="decode adds log(mass) to a merged entry's logit")
    mass_kind: str = choice(
        "count", "count", "attention", "entropy", help="mass: tokens, attention received, or tokens that weigh in"
    )
    rope_aware: bool = flag(False, help="turn keys to the target's phase before they are averaged")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mass_kind == "attention" and (self.merge_rule != "importance" or self.merge_keys):
            raise ValueError(
                "mass_kind='attention' is not allowed here: it goes with merge_rule='importance' and merge_keys=False"
            )
        if self.mass_kind == "entropy" and (self.merge_rule == "weighted" or not self.merge_keys):
            raise ValueError(
                "mass_kind='entropy' is not allowed here: it goes with merge_keys=True and merge_rule not 'weighted'"
            )

    @property
    def needs(self) -> Needs:
        return replace(super().needs, rotary=self.rope_aware)

    @property
    def needs_heads(self) -> str:
        return f"method={self.name} merges each head's entries"

    @property
    def biases_logits(self) -> bool:
        return self.mass_bias

    def merged(
        self,
        view: LayerView,
        keep: Tensor,
        source: Tensor,
        target: Tensor,
        cosine: Tensor,
        importance: Tensor | None = None,
    ) -> Plan:
        """The plan that merges every source into its target by this method's options.

        Args:
            keep: int64 [batch, kv_heads, kept]; source: int64 [batch, kv_heads, sources].
            target: index into `keep`, -1: evicted; cosine: of each source with its target.
            importance: [batch, kv_heads, length], for merge_rule="importance".
        """
        source_mass, kept_mass = view.mass.gather(-1, source), view.mass.gather(-1, keep)
        scores = [None, None] if importance is None else [importance.gather(-1, at) for at in (source, keep)]
        weights = merge_weights(self.merge_rule, target, cosine, source_mass, kept_mass, *scores)
        return self.weighted(view, keep, source, target, *weights)

    def merge_into_nearest(self, view: LayerView, keep: Tensor, importance: Tensor | None = None) -> Plan:
        """The plan that merges every dropped token into its nearest kept one.

        Args:
            keep: int64 [batch, kv_heads, kept]; importance: as in `merged`.
        """
        source = complement(keep, view.length)
        target, cosine = nearest(view.keys, source, keep)
        return self.merged(view, keep, source, target, cosine, importance)

    def merge_uneven(
        self, view: LayerView, mask: Tensor, importance: Tensor | None = None, eligible: Tensor | None = None
    ) -> Plan:
        """As `merge_into_nearest`, where heads may keep different counts.

        Args:
            mask: bool [batch, kv_heads, length].
            eligible: bool, alike, kept tokens that others may merge into; None: all.
        """
        keep, source = partition(view, mask)
        at, goal = source.clamp(min=0), keep.clamp(min=0)
        allowed = keep >= 0
        if eligible is not None:
            allowed = allowed & eligible.gather(-1, goal)
        target, cosine = nearest(view.keys, at, goal, allowed[:, :, None], torch.zeros_like(at))
        plan = self.merged(view, goal, at, target.masked_fill(source < 0, -1), cosine, importance)
        return replace(plan, keep=keep, uneven=True)

    def weighted(
        self, view: LayerView, keep: Tensor, source: Tensor, target: Tensor, weight: Tensor, own: Tensor
    ) -> Plan:
        """The plan that merges every source into its target with given weights."""
        source_mass, kept_mass = view.mass.gather(-1, source), view.mass.gather(-1, keep)
        mass = kept_mass + segment_sum(source_mass, target, keep.shape[-1])
        merge = Merge(source, target, weight, own, mass, keys=self.merge_keys, rope_aware=self.rope_aware)
        bias = None
        if self.mass_bias and self.mass_kind == "count":
            bias = mass.log()
        elif self.mass_bias and self.mass_kind == "entropy":
            bias = tangent_bias(view.bias, keep, source, target, weight, own).to(mass.dtype)
        elif self.mass_bias:  # own = I_c / (I_c + sum of I_e): the bias is minus its logarithm
            before = torch.zeros_like(mass) if view.bias is None else view.bias.gather(-1, keep)
            bias = (before - own.log()).clamp(0, math.log(view.length)).to(mass.dtype)
        return Plan(keep, merge, bias)


def partition(view: LayerView, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Slots that stay and slots that go, heads with fewer with -1 in front; empty slots do neither.

    Args:
        mask: bool [batch, kv_heads, length].
    """
    valid = torch.ones_like(mask) if view.empty is None else ~view.empty
    return ragged_places(mask & valid), ragged_places(~mask & valid)
