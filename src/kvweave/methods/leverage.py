"""Compactor: keys that the others do not span, and attention inside chunks (2507.08143; SPEC 16.7)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvweave.methods.allocation import Quota
from kvweave.methods.needs import ALL_ROWS, Needs
from kvweave.methods.options import integer, real
from kvweave.methods.registry import register
from kvweave.methods.scored import ScoredMethod
from kvweave.ops.reference_rows import capped
from kvweave.ops.rotary import rotate
from kvweave.ops.select import pool
from kvweave.view import LayerView


@register("leverage")
@dataclass(frozen=True)
class Leverage(ScoredMethod):
    """Keeps the tokens of high leverage among the keys without their phase, blended with what their chunk looks at.

    The paper sketches the keys to few random dimensions first; here the leverage is exact, and needs no seed.
    """

    keeps_by = "leverage of the keys, and attention inside chunks"
    source = "2507.08143"
    cost = "L D² + L chunk D"

    sinks: int = integer(8, minimum=0, help="first tokens that stay, at most half of what recent ones leave")
    recent: int = integer(4, minimum=0, help="last tokens that stay, at most half of the budget")
    chunk: int = integer(256, minimum=1, help="neighbours among which attention is looked at")
    blend: float | None = real(
        None,
        lo=0,
        hi=float("inf"),
        open_hi=True,
        optional=True,
        help="weight of leverage against attention; None: the share that is evicted (the paper: 0.35)",
    )

    needs = Needs(ALL_ROWS, decoded=(), rotary=True)  # a deferred cut only comes later

    def score(self, view: LayerView, quota: Quota) -> Tensor:
        between = slice(quota.sinks, view.length - quota.recent)
        weights = view.slot_weights()[..., between]
        blend = 1 - quota.budget / view.length if self.blend is None else self.blend
        looked_at = self.looked_at(view, between)
        norms = view.values[:, :, between].to(looked_at.dtype).norm(dim=-1)
        parts = blend * _standard(self.leverages(view, between), weights)
        parts = parts + _standard(pool(looked_at * norms, 3), weights)
        return F.pad(parts, (quota.sinks, quota.recent), value=-torch.inf)

    def leverages(self, view: LayerView, between: slice) -> Tensor:
        """y_j (Y'Y + e I)^-1 y_j of the centred keys without their phase: [batch, kv_heads, candidates]."""
        keys = view.keys[:, :, between].to(torch.promote_types(view.keys.dtype, torch.float32))
        tables = view.unit_tables(self.name)
        if tables is not None:
            cos, sin = (table[:, :, between].to(keys.dtype) for table in tables)
            keys = rotate(keys, cos, -sin, interleaved=view.interleaved)
        weights = view.slot_weights()[..., between, None].to(keys.dtype)
        keys = keys - (keys * weights).sum(2, keepdim=True) / weights.sum(2, keepdim=True).clamp(min=1e-12)
        gram = torch.matmul(keys.mT, keys * weights).double()
        trace = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        ridge = torch.where(trace > 0, 1e-4 * trace, 1.0)  # no key differs: all leverages are zero
        turned = torch.linalg.solve(gram + ridge * eye, keys.mT.double()).mT
        return (turned * keys).sum(-1).clamp(min=0).to(keys.dtype)

    def looked_at(self, view: LayerView, between: slice) -> Tensor:
        """Attention received inside chunks, in both directions: [batch, kv_heads, candidates]."""
        key = ("chunks", self.chunk, between.start, between.stop, *self.reduction)
        return view.once(key, lambda: self._looked_at(view, between))

    def _looked_at(self, view: LayerView, between: slice) -> Tensor:
        queries, group = view.all_queries(), view.rule
        first = view.length - queries.shape[2]  # slots of earlier turns, whose queries are gone
        wide = torch.promote_types(view.keys.dtype, torch.float32)
        parts = []
        for start in range(between.start, between.stop, self.chunk):
            chunk = slice(start, min(start + self.chunk, between.stop))
            asks = slice(max(0, start - first), max(0, chunk.stop - first))
            rows = queries[:, :, asks].to(wide).unflatten(1, (view.kv_heads, -1))
            keys = view.keys[:, :, None, chunk].to(wide)
            logits = capped(torch.matmul(rows, keys.mT) * group.scaling, group)
            if view.bias is not None:
                logits = logits + view.bias[:, :, None, None, chunk]
            if view.empty is not None:
                logits = logits.masked_fill(view.empty[:, :, None, None, chunk], torch.finfo(wide).min)
            shares = torch.softmax(logits, -1)  # [batch, kv_heads, group, rows, columns]
            by_row = shares.mean(2) if self.heads_by == "mean" else shares.amax(2)
            if not by_row.shape[2]:
                parts.append(torch.zeros_like(view.keys[:, :, chunk, 0], dtype=wide))
            else:
                parts.append(by_row.sum(2) if self.rows_by == "mean" else by_row.amax(2))
        return torch.cat(parts, -1)


def _standard(x: Tensor, weights: Tensor) -> Tensor:
    """Minus the mean, over the deviation, of the candidates that hold a token."""
    valid = (weights > 0).to(x.dtype)
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    x = x - (x * valid).sum(-1, keepdim=True) / count
    deviation = ((x.square() * valid).sum(-1, keepdim=True) / count).sqrt()
    return x / deviation.clamp(min=1e-6)
