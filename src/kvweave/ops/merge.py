"""How much of each member a merged entry is made of, and its sum over members (SPEC 2.2)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kvweave.ops.device import fused
from kvweave.ops.match import take

RULES = ("similarity", "average", "pivotal", "weighted", "importance")


def segment_sum(x: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Sums of `x` by segment; members of segment -1 are left out.

    Args:
        x: [batch, kv_heads, n] or [batch, kv_heads, n, dim]; segment: int64 [batch, kv_heads, n].
    Returns:
        [batch, kv_heads, segments] or [batch, kv_heads, segments, dim], in the dtype of `x`.
    """
    batch, kv_heads, n = segment.shape
    tail = x.shape[3:]
    if not tail:
        sums = x.new_zeros(batch, kv_heads, segments + 1)  # and a last one for those that are left out
        return sums.scatter_add_(-1, segment.remainder(segments + 1), x)[..., :segments]
    sums = x.new_zeros(batch * kv_heads * (segments + 1), *tail)
    sums.index_add_(0, _places(segment, segments), x.reshape(batch * kv_heads * n, *tail))
    return sums.view(batch, kv_heads, segments + 1, *tail)[:, :, :segments]


def _places(segment: Tensor, segments: int) -> Tensor:
    """Row of each member among all heads' segments laid end to end; -1 goes to a last segment of its head."""
    batch, kv_heads, _ = segment.shape
    offset = torch.arange(batch * kv_heads, device=segment.device).view(batch, kv_heads, 1) * (segments + 1)
    return (segment.remainder(segments + 1) + offset).flatten()


def merge_weights(
    rule: str,
    target: Tensor,
    cosine: Tensor,
    source_mass: Tensor,
    kept_mass: Tensor,
    source_importance: Tensor | None = None,
    kept_importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights of the members and of the kept token itself in each merged entry.

    An entry that stands for several tokens already (a later turn) counts as that many; with mass 1 everywhere
    this is the table of SPEC 2.2.

    Args:
        rule: one of `RULES`.
        target: int64 [batch, kv_heads, sources], index into the kept tokens, -1: evicted.
        cosine: [batch, kv_heads, sources], of each source's key with its target's.
        source_mass: [batch, kv_heads, sources]; kept_mass: [batch, kv_heads, kept].
        source_importance, kept_importance: alike, for the rule `importance`.
    Returns:
        [batch, kv_heads, sources] and [batch, kv_heads, kept].
    """
    entries = kept_mass.shape[-1]
    source_mass, kept_mass = source_mass.to(cosine.dtype), kept_mass.to(cosine.dtype)
    total = kept_mass + segment_sum(source_mass, target, entries)
    at = target.clamp(min=0)
    if rule in ("average", "pivotal", "weighted"):
        share, own = source_mass / total.gather(-1, at), kept_mass / total
        if rule == "average":
            return share, own
        if rule == "pivotal":
            return share / 2, (1 + own) / 2
        return share * cosine, own
    if rule == "similarity":
        raw, raw_own = source_mass * cosine.exp(), kept_mass * math.e
    elif rule == "importance":
        if source_importance is None or kept_importance is None:
            raise ValueError("merge_rule='importance' needs the tokens' importance")
        raw, raw_own = source_importance, kept_importance
        nothing = raw_own + segment_sum(raw, target, entries) <= 0  # no importance at all: average
        raw = torch.where(nothing.gather(-1, at), source_mass, raw)
        raw_own = torch.where(nothing, kept_mass, raw_own)
    else:
        raise ValueError(f"merge_rule={rule!r} is unknown: allowed is one of {', '.join(RULES)}")
    norm = raw_own + segment_sum(raw, target, entries)
    return raw / norm.gather(-1, at), raw_own / norm


def tangent_bias(
    before: Tensor | None, keep: Tensor, source: Tensor, target: Tensor, weight: Tensor, own: Tensor
) -> Tensor:
    """The largest bias with which a merged entry never counts more than its members did, whatever the query.

    With weights w of sum 1 and members' logits s, `sum w s + H(w) <= log sum exp(s)`, and equal where w are the
    members' shares of that query's attention: the tangent there. So an entry whose keys are averaged by w gets the
    entropy H(w), plus the mean of what its members had already; with equal weights that is log(mass) (SPEC 4.1).

    Args:
        before: [batch, kv_heads, length], biases of the slots so far, or None.
        keep, source, target, weight, own: as `merge` takes them; the weights of an entry sum to 1.
    Returns:
        [batch, kv_heads, kept].
    """

    def part(weight: Tensor, at: Tensor) -> Tensor:
        had = 0 if before is None else weight * before.gather(-1, at).to(weight.dtype)
        return had - torch.xlogy(weight, weight)

    return part(own, keep) + segment_sum(part(weight, source), target, keep.shape[-1])


def merge(
    x: Tensor,
    keep: Tensor,
    source: Tensor,
    target: Tensor,
    weight: Tensor,
    own: Tensor,
    step: int = 4096,
) -> Tensor:
    """Merged entries; one without members is copied bit for bit.

    Args:
        x: keys or values, [batch, kv_heads, length, dim].
        keep: int64 [batch, kv_heads, kept]; source: int64 [batch, kv_heads, sources].
        target: index into `keep` for each source, -1: evicted; weight: alike; own: [batch, kv_heads, kept].
    Returns:
        [batch, kv_heads, kept, dim] in the dtype of `x`, accumulated in float32 or wider.
    """
    if fused(x, weight):
        from kvweave.ops import kernels

        return kernels.merge(x, keep, source, target, weight, own)
    entries = keep.shape[-1]
    original = take(x, keep)
    sums = F.pad(original.to(weight.dtype) * own[..., None], (0, 0, 0, 1))  # and a place for the evicted
    flat = sums.flatten(0, 2)
    for start in range(0, source.shape[-1], step):
        part = slice(start, start + step)
        rows = take(x, source[..., part]).to(weight.dtype) * weight[..., part, None]
        flat.index_add_(0, _places(target[..., part], entries), rows.flatten(0, 2))
    alone = torch.ones(*keep.shape[:2], entries + 1, dtype=torch.bool, device=x.device)
    alone = alone.scatter_(-1, target.remainder(entries + 1), False)[..., :entries]
    return torch.where(alone[..., None], original, sums[:, :, :entries].to(x.dtype))
