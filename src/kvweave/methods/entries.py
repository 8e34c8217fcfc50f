"""What methods share whose entries are clusters, or are fitted to reference rows (SPEC 17.1 and 17.3)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvweave.methods.base import Method
from kvweave.methods.needs import Needs
from kvweave.methods.options import integer, real
from kvweave.ops.cluster import clusters, medoids
from kvweave.ops.fit import Entries, Settings, fit
from kvweave.ops.merge import segment_sum
from kvweave.ops.reference_rows import ReferenceRows
from kvweave.ops.select import ragged_places
from kvweave.plan import Merge, Plan
from kvweave.view import LayerView

INFINITE = float("inf")

# Options of more than one method, declared as each of them does.


def rows_option() -> int:
    return integer(32, minimum=1, help="last rows of the prompt that say what attention will look like")


def ridge_option() -> float:
    return real(0.1, lo=0, hi=INFINITE, open_hi=True, help="pull of a fit towards what is there")


def cap_option(default: float | None) -> float | None:
    return real(
        default,
        lo=0,
        hi=INFINITE,
        open_lo=True,
        open_hi=True,
        optional=True,
        help="most that the values of a head move, as a share of their norm; None: as far as the fit says",
    )


def bound_option(default: float) -> float:
    return real(default, lo=0, hi=INFINITE, open_lo=True, open_hi=True, help="most that a bias moves")


def steps_option() -> int:
    return integer(2, minimum=0, help="of the biases' fit, after they were bounded")


def recent_option() -> int:
    return integer(32, minimum=0, help="last tokens that stay as they are, at most half of the budget")


def clusters_option() -> float:
    return real(0.5, lo=0, hi=1, help="share of the free entries that are clusters of the tokens not kept")


def rounds_option() -> int:
    return integer(8, minimum=0, help="of clustering")


def span_option() -> int | None:
    return integer(
        1024, minimum=1, optional=True, help="tokens between a cluster's seed and its members at most; None: any"
    )


# ---------------------------------------------------------------- clusters


def cluster_labels(view: LayerView, candidates: Tensor, counts: Tensor, rounds: int, span: int | None) -> Tensor:
    """Which cluster each of the tokens `candidates` is in: int64 [batch, kv_heads, length], -1 for all others.

    Args:
        candidates: bool [batch, kv_heads, length]; counts: int64 [batch, kv_heads], clusters of each head, 0: none.
    """
    label = torch.full_like(view.positions, -1)
    weights = view.slot_weights()
    keys = view.keys.to(torch.promote_types(view.keys.dtype, torch.float32))
    for b, row in enumerate(counts.tolist()):
        for h, count in enumerate(row):
            if count:
                at = candidates[b, h].nonzero().flatten()
                own = weights[b, h, at].to(keys.dtype)
                label[b, h, at] = clusters(keys[b, h, at], own, at, count, rounds, span)
    return label


def cluster_plan(view: LayerView, exact: Tensor, label: Tensor, *, even: bool) -> Plan:
    """The plan that keeps the tokens `exact`, and of each cluster one entry: mean key, mean value, bias log(count).

    An entry stands where the member stands whose key is nearest to the mean.

    Args:
        exact: bool [batch, kv_heads, length]; label: int64, alike, of the others, -1: evicted.
        even: all heads keep equally many.
    """
    most = int(label.max()) + 1
    if not most:
        return Plan(ragged_places(exact), uneven=not even)
    keys = view.keys.to(torch.promote_types(view.keys.dtype, torch.float32))
    weights = view.slot_weights().to(keys.dtype)
    medoid = medoids(keys, label, weights, most)
    mask = exact | medoid
    keep, source = ragged_places(mask), ragged_places((label >= 0) & ~medoid)
    goal, at = keep.clamp(min=0), source.clamp(min=0)

    place = mask.cumsum(-1) - 1 + keep.shape[-1] - mask.sum(-1, keepdim=True)  # of a kept slot in `keep`
    of_cluster = torch.where(medoid, label, most)
    index = torch.full((*label.shape[:2], most + 1), -1, device=label.device).scatter_(-1, of_cluster, place)
    target = index.gather(-1, label.gather(-1, at).clamp(min=0)).masked_fill(source < 0, -1)

    own, members = weights.gather(-1, goal), weights.gather(-1, at)
    total = own + segment_sum(members, target, keep.shape[-1])
    mass = view.mass.gather(-1, goal) + segment_sum(view.mass.gather(-1, at), target, keep.shape[-1])
    merge = Merge(at, target, members / total.gather(-1, target.clamp(min=0)), own / total, mass)
    bias = total.log().float()
    if view.bias is not None:  # an entry alone weighs what it did, to the bit
        alone = segment_sum(torch.ones_like(members), target, keep.shape[-1]) == 0
        bias = torch.where(alone, view.bias.gather(-1, goal).float(), bias)
    return Plan(keep, merge, bias.masked_fill(keep < 0, 0), uneven=not even)


def cluster_counts(share: float, free: Tensor, *, gate: bool) -> list[Tensor]:
    """How many of the `free` entries of each head may be clusters: with a gate none, half the share, the share."""
    shares = [0.0, share / 2, share] if gate else [share]
    return [torch.floor(part * free.double() + 1e-9).long() for part in shares]


# ---------------------------------------------------------------- fits


def entries_of(view: LayerView, plan: Plan, mutable: Tensor | None = None) -> Entries:
    """What a plan keeps, in float32 or wider.

    Args:
        mutable: bool [batch, kv_heads, length], slots that a fit may change; None: nothing is fitted.
    """
    wide = torch.promote_types(view.keys.dtype, torch.float32)
    compacted = plan.apply(replace(view, keys=view.keys.to(wide), values=view.values.to(wide)))
    bias = torch.zeros_like(compacted.mass) if compacted.bias is None else compacted.bias
    may = torch.zeros_like(plan.keep, dtype=torch.bool)
    if mutable is not None:
        may = mutable.expand_as(view.positions).gather(-1, plan.keep.clamp(min=0)) & (plan.keep >= 0)
    return Entries(plan.keep, compacted.keys, compacted.values, bias.to(wide), may)


def fitted(
    view: LayerView,
    plan: Plan,
    rows: ReferenceRows,
    mutable: Tensor,
    kinds: Sequence[str],
    settings: Settings,
    *,
    gate: bool,
) -> Plan:
    """The plan with its entries' values, and biases where "both" is among the kinds, fitted to the rows."""
    entries = entries_of(view, plan, mutable)
    outcome = fit(rows, view.values, entries, kinds, settings, gate=gate)
    changed = (outcome.kind != kinds.index("none"))[..., None] & entries.mutable
    compacted = plan.apply(view)
    values = torch.where(
        changed[..., None], outcome.entries.values, compacted.values.to(outcome.entries.values.dtype)
    )

    def everywhere(x: Tensor) -> Tensor:
        """[batch] here: [batch, processes that share the layer's heads]."""
        return view.over_heads(x[:, None])

    winners = view.over_heads(outcome.kind)
    log = {f"fitted.{kind}": (winners == n).sum(-1) for n, kind in enumerate(kinds)}
    if gate:
        errors = [everywhere(error).mean(-1) for error in outcome.held_out]
        log |= {"held_out.none": errors[0], "held_out.winner": errors[1]}
    log |= {"reference_tokens": rows.tokens(rows.counted)[:, 0], "value_step": everywhere(outcome.step).mean(-1)}
    bias = plan.bias
    if "both" in kinds:
        bias = outcome.entries.bias.float()
        log["bias_min"] = everywhere(bias.amin((1, 2))).amin(-1)
        log["bias_max"] = everywhere(bias.amax((1, 2))).amax(-1)
    return replace(plan, values=values, bias=bias, log={**plan.log, **log})


class FittedMethod(Method):
    """Base of methods whose entries' biases and values are fitted to reference rows, recent ones left alone."""

    rows: int
    ridge: float
    cap: float | None
    bound: float
    steps: int

    @property
    def biases_logits(self) -> bool:
        return True

    @property
    def needs(self) -> Needs:
        return Needs(decoded=()).with_reference(self.rows)

    def fitted(self, view: LayerView, plan: Plan, rows: ReferenceRows, recent: int, *, gate: bool) -> Plan:
        """The plan with all entries fitted but those of the last `recent` tokens (SPEC 17.1)."""
        mutable = torch.arange(view.length, device=view.keys.device) < view.length - recent
        settings = Settings(self.ridge, self.cap, self.bound, self.steps)
        return fitted(view, plan, rows, mutable, ("none", "values", "both"), settings, gate=gate)


def best_of(errors: Sequence[Tensor]) -> Tensor:
    """Which of the choices each head takes: a later one if its error is below 0.99 of the best's; [batch,
    kv_heads]."""
    best, winner = errors[0], torch.zeros_like(errors[0], dtype=torch.long)
    for number, error in enumerate(errors[1:], 1):
        better = error < 0.99 * best
        best, winner = torch.where(better, error, best), torch.where(better, number, winner)
    return winner


def row_scores(rows: ReferenceRows, kind: str, on: Tensor) -> Tensor:
    """What the rows `on` [batch, 1, rows] say of the prompt's slots: [batch, kv_heads, length] (SPEC 17.5).

    Args:
        kind: "rms" or "mean", weighted; "max".
    """
    attention = rows.attention()
    if kind == "max":
        return (attention * on[..., None]).amax(2)
    weight = (rows.weight * on)[..., None]
    total = weight.sum(2).clamp(min=1e-30)
    if kind == "mean":
        return (weight * attention).sum(2) / total
    return ((weight * attention.square()).sum(2) / total).sqrt()
