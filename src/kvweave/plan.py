"""What stays, what merges into what, and what becomes of the tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvweave.ops.match import take
from kvweave.ops.merge import merge, segment_sum
from kvweave.ops.rotary import phase_difference, rotate
from kvweave.view import LayerView


@dataclass(frozen=True)
class Merge:
    """Where the dropped tokens go. Decided once, applied to keys, values and mass alike.

    Attributes:
        source: int64 [batch, kv_heads, sources], slots that are not kept, ascending.
        target: int64 [batch, kv_heads, sources], index into `Plan.keep`, -1: evicted.
        weight: [batch, kv_heads, sources], of each source in its entry.
        own: [batch, kv_heads, kept], of the kept token in its entry.
        mass: float32 [batch, kv_heads, kept], tokens that each entry stands for afterwards.
        keys: merge keys too, not only values.
        rope_aware: bring members' keys to the target's phase before they are averaged.
        value_scale: [batch, kv_heads, kept], factor of merged values (KVMerger), or None.
    """

    source: Tensor
    target: Tensor
    weight: Tensor
    own: Tensor
    mass: Tensor
    keys: bool = True
    rope_aware: bool = False
    value_scale: Tensor | None = None


@dataclass(frozen=True)
class Compacted:
    """One layer after the cut.

    Attributes:
        keys, values: [batch, kv_heads, kept, dim].
        positions: int64 [batch, kv_heads, kept], ascending, columns of the padded input; -1 marks an empty slot,
            those come first.
        mass: float32 [batch, kv_heads, kept], tokens an entry stands for; 0 in an empty slot.
        flow: the layer's flow ratio, mean over rows, where the method computes it.
        bias: float32 [batch, kv_heads, kept], what decoding adds to an entry's logit, or None.
        full: no slot is empty; False: the positions tell.
        counts: entries by row and KV head, where the host knows them; None: the positions tell.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    mass: Tensor
    flow: float | None = None
    bias: Tensor | None = None
    full: bool = False
    counts: list[list[int]] | None = None

    def emptied(self, empty: Tensor) -> "Compacted":
        """With the slots `empty` [batch, kv_heads, kept] holding nothing."""
        return Compacted(
            self.keys.masked_fill(empty[..., None], 0),
            self.values.masked_fill(empty[..., None], 0),
            self.positions.masked_fill(empty, -1),
            self.mass.masked_fill(empty, 0),
            self.flow,
            None if self.bias is None else self.bias.masked_fill(empty, 0),
            counts=self.counts,
        )


@dataclass(frozen=True)
class Plan:
    """What a method decided for the rows of a `LayerView`.

    Attributes:
        keep: int64 [batch, kv_heads, kept], ascending slots; heads that keep less have -1 in front.
        merge: where the others go; None: they are evicted.
        bias: float32 [batch, kv_heads, kept], added to the entries' logits in decode; None: nothing is.
        added: [batch, kv_heads, kept, dim], added to the kept values, which stay one token's (CaM).
        flow: [batch], the flow ratio that the method went by.
        scope: a word for each row of the batch on how the layer was treated, such as "cross".
        memory: [batch, ...], what the method wants to see as `LayerView.memory` on a later turn.
        uneven: heads keep different counts.
        counts: entries by row and KV head, where heads differ and the host knows them already.
        values: [batch, kv_heads, kept, dim], the entries' values where the method has fitted them, float32 or wider.
        log: further numbers for the report, [batch] each; "a.b" is number b of a group a.
        words: what the report says besides, of all layers and rows alike.
    """

    keep: Tensor
    merge: Merge | None = None
    bias: Tensor | None = None
    added: Tensor | None = None
    flow: Tensor | None = None
    scope: tuple[str, ...] | None = None
    memory: Tensor | None = None
    uneven: bool = False
    counts: list[list[int]] | None = None
    values: Tensor | None = None
    log: Mapping[str, Tensor] = field(default_factory=dict)
    words: Mapping[str, str | bool] = field(default_factory=dict)

    def apply(self, view: LayerView) -> Compacted:
        """The kept entries of `view`, merged with what the plan merges into them."""
        keep = self.keep.clamp(min=0) if self.uneven else self.keep
        plan = self.merge
        if plan is None:
            keys, values, mass = take(view.keys, keep), take(view.values, keep), view.mass.gather(-1, keep)
        else:
            keys = self._merged_keys(view, plan) if plan.rope_aware and view.rotated else view.keys
            members = keep, plan.source, plan.target, plan.weight, plan.own
            keys = merge(keys, *members).to(view.keys.dtype) if plan.keys else take(view.keys, keep)
            values, mass = merge(view.values, *members), plan.mass
            if plan.value_scale is not None:
                values = (values.to(plan.weight.dtype) * plan.value_scale[..., None]).to(values.dtype)
        if self.added is not None:
            sums = (values.to(self.added.dtype) + self.added).to(values.dtype)
            values = torch.where((self.added != 0).any(-1, keepdim=True), sums, values)
        if self.values is not None:
            values = self.values.to(view.values.dtype)
        bias = self.bias
        if bias is None and view.bias is not None:  # a later turn: what stays weighs what it did
            bias = view.bias.gather(-1, keep)
        full = view.empty is None and not self.uneven
        positions = view.positions.gather(-1, keep)
        compacted = Compacted(keys, values, positions, mass, bias=bias, full=full, counts=self.counts)
        return compacted.emptied(self.keep < 0) if self.uneven else compacted

    def _merged_keys(self, view: LayerView, plan: Merge) -> Tensor:
        """Keys, float32 or wider, with every source turned to its target's phase (SPEC 4.2)."""
        tables = view.unit_tables("rope_aware=True")
        assert tables is not None
        cos, sin = tables
        goal = self.keep.gather(-1, plan.target.clamp(min=0)).clamp(min=0)
        angle = phase_difference(take(cos, goal), take(sin, goal), take(cos, plan.source), take(sin, plan.source))
        keys = view.keys.to(plan.weight.dtype)
        turned = rotate(take(keys, plan.source), *angle, interleaved=view.interleaved).to(keys.dtype)
        index = plan.source[..., None].expand(*plan.source.shape, keys.shape[-1])
        return keys.scatter(2, index, turned)

    def fate(self, view: LayerView) -> Tensor:
        """For each slot the slot it lives on in: itself if kept, its target's if merged, -1 if evicted.

        Returns:
            int64 [batch, kv_heads, length].
        """
        fate = torch.full_like(view.positions, -1)
        if self.merge is not None:
            target = self.merge.target
            lives = self.keep.gather(-1, target.clamp(min=0)).masked_fill_(target < 0, -1)
            fate.scatter_(-1, self.merge.source, lives)
        is_kept = segment_sum(torch.ones_like(self.keep), self.keep, view.length) > 0
        slots = torch.arange(view.length, device=fate.device).expand_as(fate)
        return torch.where(is_kept, slots, fate)
