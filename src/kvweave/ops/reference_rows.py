"""Rows that say what attention will look like, and how far a compressed layer is from them (SPEC 15.3).

A token gives one row for each query head of a KV head's group: of a KV head all rows are looked at together. Tokens
come in this order: the last ones of the prompt, then those decoded, or fed as probes, behind it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvweave.ops.statistics import AttentionRule


@dataclass(frozen=True)
class ReferenceRows:
    """Queries of some tokens, and what they see of the prompt's slots.

    Attributes:
        queries: [batch, kv_heads, rows, dim], float32 or wider; rows = tokens * group, the rows of a token together.
        logits: [batch, kv_heads, rows, length], on the prompt's slots, biases of the slots added; -inf unseen.
        slot: int64 [rows], the last slot that a row sees.
        counted: bool [batch, 1, rows], rows that take part.
        weight: [batch, 1, rows], omega; 0 for rows that do not count.
        held_out: bool [batch, 1, rows], of every fourth token that counts.
        group: rows of a token.
        rule: scaling and soft cap of the logits.
    """

    queries: Tensor
    logits: Tensor
    slot: Tensor
    counted: Tensor
    weight: Tensor
    held_out: Tensor
    group: int
    rule: AttentionRule

    @staticmethod
    def of(
        keys: Tensor,
        queries: Tensor,
        rule: AttentionRule,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        empty: Tensor | None = None,
        decoded: Tensor | None = None,
        counted: Tensor | None = None,
        decoded_weight: float | Tensor = 0.0,
    ) -> "ReferenceRows":
        """Of a prompt's last tokens, and those behind it.

        Args:
            keys: [batch, kv_heads, length, dim]; queries: [batch, heads, tokens, dim] of its last tokens.
            mask: the model's own for these, [batch, 1 or heads, tokens, length], boolean or additive, biases of the
                slots included; None: causal.
            bias: [batch, kv_heads, length], of the slots; empty: bool, alike, slots that hold nothing.
            decoded: [batch, heads, more, dim], queries of the tokens behind; counted: bool [batch, more].
            decoded_weight: lambda of SPEC 13.1; one, or [batch, 1, 1].
        """
        batch, kv_heads, length, _ = keys.shape
        heads, tokens = queries.shape[1:3]
        group = heads // kv_heads
        wide = torch.promote_types(keys.dtype, torch.float32)
        more = 0 if decoded is None else decoded.shape[2]
        every = queries if decoded is None else torch.cat([queries, decoded.to(queries.dtype)], 2)
        rows = every.to(wide).unflatten(1, (kv_heads, group)).transpose(2, 3).flatten(2, 3)
        logits = capped(torch.matmul(rows, keys.to(wide).mT) * rule.scaling, rule)
        slot = torch.arange(length - tokens, length, device=keys.device)
        slot = torch.cat([slot, slot.new_full((more,), length - 1)]).repeat_interleave(group)
        logits = _visible(logits, slot, mask, bias, empty, tokens * group)
        counts = torch.ones(batch, tokens + more, dtype=torch.bool, device=keys.device)
        if counted is not None:
            counts[:, tokens:] = counted.to(keys.device)
        weight = _weights(counts, tokens, decoded_weight, wide)
        number = counts.cumsum(1) - 1  # of each token among those that count
        check = counts & (number % 4 == 3)
        return ReferenceRows(
            rows,
            logits,
            slot,
            counts.repeat_interleave(group, 1)[:, None],
            weight.repeat_interleave(group, 1)[:, None],
            check.repeat_interleave(group, 1)[:, None],
            group,
            rule,
        )

    def tokens(self, rows: Tensor) -> Tensor:
        """How many tokens the rows `rows` [batch, 1, rows] are of: [batch, 1]."""
        return (rows & self.counted).sum(-1) / self.group

    def attention(self) -> Tensor:
        """Probabilities on the prompt's slots alone, `A`: [batch, kv_heads, rows, length]."""
        return _softmax(self.logits)

    def log_sum_exp(self) -> Tensor:
        """Of each row's logits on the prompt's slots: [batch, kv_heads, rows]."""
        return self.logits.logsumexp(-1)

    def output(self, values: Tensor) -> Tensor:
        """What the whole prompt gives, `O`: [batch, kv_heads, rows, dim]."""
        return torch.matmul(self.attention(), values.to(self.logits.dtype))

    def entry_logits(self, keys: Tensor, bias: Tensor, slot: Tensor) -> Tensor:
        """Logits on entries [batch, kv_heads, kept, ...]: [batch, kv_heads, rows, kept], -inf unseen.

        Args:
            slot: int64 [batch, kv_heads, kept], where an entry stands; -1: it is empty.
        """
        products = torch.matmul(self.queries, keys.to(self.queries.dtype).mT) * self.rule.scaling
        logits = capped(products, self.rule) + bias[:, :, None]
        hidden = (slot[:, :, None] > self.slot[:, None]) | (slot < 0)[:, :, None]
        return logits.masked_fill(hidden, -torch.inf)

    def error(self, output: Tensor, reference: Tensor, rows: Tensor) -> Tensor:
        """`err` of SPEC 15.3 over the rows `rows` [batch, 1, rows]: [batch, kv_heads].

        Args:
            output: `O`; reference: `O'`, what the entries give, [batch, kv_heads, rows, dim] both.
        """
        weight = self.weight * rows
        wrong = (weight * (output - reference).square().sum(-1)).sum(-1)
        return wrong / (weight * output.square().sum(-1)).sum(-1).clamp(min=1e-12)


def entry_attention(logits: Tensor) -> Tensor:
    """`X`: softmax over entries; a row that sees none attends to none."""
    return _softmax(logits)


def capped(logits: Tensor, rule: AttentionRule) -> Tensor:
    """Within the model's soft cap, where it has one."""
    return logits if rule.softcap is None else rule.softcap * torch.tanh(logits / rule.softcap)


def _softmax(logits: Tensor) -> Tensor:
    blind = (logits == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(logits.masked_fill(blind, 0), -1).masked_fill(blind, 0)


def _visible(
    logits: Tensor, slot: Tensor, mask: Tensor | None, bias: Tensor | None, empty: Tensor | None, own: int
) -> Tensor:
    """Logits [batch, kv_heads, rows, length] with the slots' biases, -inf where a row does not see a slot.

    Args:
        slot: int64 [rows], the last slot that a row sees where nothing else says.
        mask, bias, empty: as in `ReferenceRows.of`; the mask is of the first `own` rows.
    """
    batch, kv_heads, _, length = logits.shape
    added = torch.zeros(batch, kv_heads, 1, length, dtype=logits.dtype, device=logits.device)
    if bias is not None:
        added = added + bias[:, :, None]
    if empty is not None:
        added = added.masked_fill(empty[:, :, None], -torch.inf)
    ahead = torch.arange(length, device=logits.device) > slot[:, None]  # [rows, length]
    if mask is None:
        return (logits + added).masked_fill(ahead, -torch.inf)
    group = own // mask.shape[2]
    own_mask = _by_token(mask, kv_heads, group, logits.dtype)  # [batch, kv_heads, own, length]
    logits = torch.cat([logits[:, :, :own] + own_mask, (logits + added)[:, :, own:]], 2)
    return logits if empty is None else logits.masked_fill(empty[:, :, None], -torch.inf)


def _by_token(mask: Tensor, kv_heads: int, group: int, dtype: torch.dtype) -> Tensor:
    """A mask [batch, 1 or heads, tokens, length] as what is added to logits [batch, kv_heads, tokens * group,
    length]."""
    if mask.dtype == torch.bool:
        added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    else:
        added = mask.to(dtype).masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf)
    if added.shape[1] == 1:
        return added.repeat_interleave(group, 2)
    return added.unflatten(1, (kv_heads, group)).transpose(2, 3).flatten(2, 3)


def _weights(counts: Tensor, prompt: int, share: float | Tensor, dtype: torch.dtype) -> Tensor:
    """omega of each token, [batch, tokens]: 1 each where none is behind the prompt, else shared by lambda."""
    behind = counts[:, prompt:].sum(1, keepdim=True).to(dtype)  # [batch, 1]
    share = share.reshape(-1, 1).to(dtype) if isinstance(share, Tensor) else torch.full_like(behind, share)
    total = prompt + behind
    own = torch.where(behind > 0, total * (1 - share) / prompt, 1.0)
    other = total * share / behind.clamp(min=1)
    weight = torch.cat([own.expand(-1, prompt), other.expand(-1, counts.shape[1] - prompt)], 1)
    return weight * counts
