"""MixKV: importance mixed with diversity (2510.20707; SPEC 10.7)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvweave.methods.allocation import Quota
from kvweave.methods.registry import register
from kvweave.methods.snapkv import SnapKV
from kvweave.ops.match import unit
from kvweave.view import LayerView


@register("mixkv")
@dataclass(frozen=True)
class MixKV(SnapKV):
    """SnapKV's score where a head's keys differ; where they are redundant, what is unlike the others.

    The redundancy is computed from the prompt at hand (the released code reads it from tables).
    """

    keeps_by = "window attention mixed with key diversity by head"
    source = "2510.20707"
    attention_like = False

    def score(self, view: LayerView, quota: Quota) -> Tensor:
        before = view.length - quota.recent
        rows = min(self.window, view.length) if self.rows_by == "mean" else 1
        received = super().score(view, quota)[..., :before] / rows
        keys = unit(view.keys)
        mean = keys.mean(2, keepdim=True)
        length = view.length
        redundancy = ((length * mean.square().sum(-1) - 1) / (length - 1)).clamp(0, 1)  # [batch, kv_heads, 1]
        norms = view.values[:, :, :before].to(keys.dtype).norm(dim=-1)
        importance = received + _scaled_like(received, norms)
        diversity = _scaled_like(received, -torch.matmul(keys[:, :, :before], mean.mT)[..., 0])
        return redundancy * diversity + (1 - redundancy) * importance


def _scaled_like(reference: Tensor, x: Tensor) -> Tensor:
    """`x` brought to [0, 1] by each head's extremes, then to the mean of `reference`."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    x = (x - low) / (high - low + 1e-8)
    return x * reference.mean(-1, keepdim=True) / (x.mean(-1, keepdim=True) + 1e-8)
