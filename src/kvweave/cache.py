"""A transformers cache whose layers hold fewer slots than the tokens they have seen.

Two lengths are kept apart: the logical one, which transformers is told and positions are counted by, and the
number of slots that memory holds. `kvweave.attach` lets attention know which logical column each slot is.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from kvweave.compaction import Group, Outcome, Storage, compact, fits, group_rows
from kvweave.methods.base import ALL_ROWS, Method
from kvweave.ops.budget import entries
from kvweave.ops.statistics import AttentionRule
from kvweave.prompt import Prompt


@dataclass
class Conversation:
    """What all layers of a cache share.

    Attributes:
        method: what decides.
        prompt: modalities and padding of everything seen; None before the first forward pass.
        end: logical length at which the current prompt ends; slots after it are decoded tokens.
        declared: the prompt's end as the user told it, for prompts that come in pieces outside `generate`.
        layers: how many layers are compressed.
        trace: keep each layer's fate, for pictures.
        attached: a model that knows how to read this cache is running.
    """

    method: Method
    prompt: Prompt | None = None
    end: int | None = None
    declared: int | None = None
    layers: int = 0
    trace: bool = False
    attached: bool = False


@dataclass
class Record:
    """What the report says of a layer's last cut; counts are [batch, kv_heads]."""

    lengths: list[int]
    kept: Tensor
    represented: Tensor
    bytes_before: int
    bytes_after: int
    rows: list[dict[str, Any]]


@dataclass
class Link:
    """Goes with the keys from `update` to attention: whose they are, and which columns they stand for then."""

    layer: "CompressedLayer"
    positions: Tensor | None
    bias: Tensor | None
    has_empty: bool


@dataclass
class Pending:
    """A layer between its attention and its cut.

    Attributes:
        groups: what the method sees, rows of equal length together.
        weights: of each group, for layer-adaptive methods.
        budgets, lengths: mean entries of a layer and real tokens, by row of the batch.
        body: slots of the prompt; those behind it are not cut.
    """

    groups: list[Group]
    weights: list[float]
    budgets: list[int]
    lengths: list[int]
    body: int


class CompressedLayer(DynamicLayer):
    """One layer's keys and values, compressed once the prompt that fills it ends.

    Attributes:
        keys, values: [batch, kv_heads, slots, dim].
        positions: int64 [batch, kv_heads, slots], logical column of each slot, -1: empty.
        mass: float32 [batch, kv_heads, slots], tokens a slot stands for.
        flow: the layer's flow ratio at the last cut, mean over rows, or None.
        kind: "full" for a layer that is compressed, else why it is not.
    """

    def __init__(self, index: int, conversation: Conversation) -> None:
        super().__init__()
        self.index = index
        self.conversation = conversation
        self._clear()

    def _clear(self) -> None:
        self.keys: Tensor
        self.values: Tensor
        self.is_initialized: bool
        self.seen = 0
        self.kind = "full"
        self.flow: float | None = None
        self.bias: Tensor | None = None
        self.has_empty = False
        self.record: Record | None = None
        self.fate: list[Tensor] = []
        self.unread = False  # keys handed out that attention has not been seen to read
        self._positions: Tensor | None = None  # None: slot j is column j
        self._mass: Tensor | None = None
        self._new = 0
        self._queries: list[Tensor] = []
        self.pending: Pending | None = None

    # ---------------------------------------------------------------- what transformers asks

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens; the keys carry a `Link` to attention."""
        if not self.conversation.attached:
            raise RuntimeError(
                "a CompressedCache is read by a model that kvweave is not attached to: use it inside "
                "kvweave.compress(model, method) or after kvweave.attach(model)"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        if self._positions is not None:
            self._append_slots(new)
        self.seen += new
        self._new = new
        self.unread = True
        keys = self.keys.view_as(self.keys)
        keys._kvweave = Link(self, self._positions, self.bias, self.has_empty)  # type: ignore[attr-defined]
        return keys, self.values

    def _append_slots(self, new: int) -> None:
        assert self._positions is not None
        assert self._mass is not None
        batch, kv_heads, _ = self._positions.shape
        columns = torch.arange(self.seen, self.seen + new, device=self._positions.device)
        self._positions = torch.cat([self._positions, columns.expand(batch, kv_heads, new)], -1)
        self._mass = torch.cat([self._mass, self._mass.new_ones(batch, kv_heads, new)], -1)
        if self.bias is not None:
            self.bias = torch.cat([self.bias, self.bias.new_zeros(batch, kv_heads, new)], -1)

    def get_seq_length(self) -> int:
        """Logical length: every token seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical sizes: the model builds its whole mask, attention picks the slots' columns from it."""
        return self.seen + query_length, 0

    def reset(self) -> None:
        super().reset()
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; a positive number is the length to crop to (transformers before 5.20)."""
        gone = self.seen - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        if gone <= 0 or not self.is_initialized:
            return
        self.seen -= gone
        if self._positions is None:
            self._truncate(gone)
            return
        # Decoded tokens lie at the end of every head; a cut prompt's may lie anywhere.
        tail = int((self._positions >= self.seen).sum(-1).min())
        self._truncate(tail)
        dead = self._positions >= self.seen
        if bool(dead.any()):
            assert self._mass is not None
            self._positions = self._positions.masked_fill(dead, -1)
            self._mass = self._mass.masked_fill(dead, 0)
            self.has_empty = True

    def _truncate(self, slots: int) -> None:
        stop = self.slots - slots
        self.keys, self.values = self.keys[..., :stop, :], self.values[..., :stop, :]
        if self._positions is not None and self._mass is not None:
            self._positions, self._mass = self._positions[..., :stop], self._mass[..., :stop]
            self.bias = self.bias[..., :stop] if self.bias is not None else None
        elif self._queries:
            rows = torch.cat(self._queries, 2)
            self._queries = [rows[:, :, : rows.shape[2] - slots]]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select(torch.arange(self.keys.shape[0], device=self.keys.device).repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, in that order."""
        if not self.is_initialized:
            return
        rows = rows.to(self.keys.device)
        self.keys, self.values = self.keys[rows], self.values[rows]
        self._queries = [queries[rows] for queries in self._queries]
        if self._positions is not None and self._mass is not None:
            self._positions, self._mass = self._positions[rows], self._mass[rows]
            self.bias = self.bias[rows] if self.bias is not None else None

    # ---------------------------------------------------------------- what users ask

    @property
    def slots(self) -> int:
        """Entries that memory holds, for each row and KV head."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.dim() == 4 else 0

    @property
    def positions(self) -> Tensor | None:
        if self._positions is not None or not self.slots:
            return self._positions
        batch, kv_heads = self.keys.shape[:2]
        columns = torch.arange(self.slots, device=self.keys.device).expand(batch, kv_heads, -1)
        prompt = self.conversation.prompt
        if prompt is None:
            return columns
        valid = prompt.valid[:, None, : self.slots].to(columns.device)
        return columns.masked_fill(~valid, -1)

    @property
    def mass(self) -> Tensor | None:
        if self._mass is not None or not self.slots:
            return self._mass
        positions = self.positions
        return (positions >= 0).to(torch.float32) if positions is not None else None

    # ---------------------------------------------------------------- compression

    def after_attention(self, queries: Tensor, rule: AttentionRule, mask: Tensor | None) -> None:
        """Called once attention has read the keys of a forward pass; cuts the layer when the prompt is complete.

        Args:
            queries: [batch, heads, new, dim] as attention took them.
            rule: scaling, soft cap and sinks of the layer.
            mask: [batch or 1, heads or 1, new, slots], as attention took it; None: causal.
        """
        if not self.unread:
            return  # a second reader of the same keys (layers that share them)
        self.unread = False
        if queries.shape[2] != self._new:
            self.kind = "cross attention"
            return
        talk = self.conversation
        start = self.seen - self._new
        if self.kind != "full" or talk.end is None or start >= talk.end:
            return
        real = min(self.seen, talk.end) - start
        wanted = talk.method.query_rows
        if wanted:
            self._queries.append(queries[:, :, :real].detach())
            if wanted != ALL_ROWS and len(self._queries) > 1:
                self._queries = [torch.cat(self._queries, 2)[:, :, -wanted:].clone()]
        if self.seen < talk.end:
            return
        body = self.slots - (self.seen - talk.end)  # candidates of assisted decoding may lie behind the prompt
        asked = torch.cat(self._queries, 2) if self._queries else None
        self._queries = []
        if asked is not None and wanted != ALL_ROWS:
            asked = asked[:, :, -wanted:]
        rows = asked.shape[2] if asked is not None else 0
        # Of a prompt that came in pieces only the last one's mask is at hand: the whole counts as causal.
        mask = mask[:, :, real - rows : real, :body] if mask is not None and 0 < rows <= real else None
        self._prompt_complete(asked, rule, mask, body)

    def _prompt_complete(self, queries: Tensor | None, rule: AttentionRule, mask: Tensor | None, body: int) -> None:
        """Cut the layer's first `body` slots, or with a layer-adaptive method prepare for `cut`."""
        talk = self.conversation
        assert talk.prompt is not None
        prompt = talk.prompt.cropped(talk.end).to(self.keys.device)
        lengths = prompt.lengths()
        budgets = [entries(talk.method.budget, n, self._entry_bytes() * talk.layers) for n in lengths]
        storage = Storage(
            self.keys[:, :, :body],
            self.values[:, :, :body],
            self._columns()[..., :body],
            self._masses()[..., :body],
            None if self.bias is None else self.bias[..., :body],
        )
        adaptive = talk.method.layer_adaptive
        layered = [talk.method.layer_budgets(b, n, talk.layers) for b, n in zip(budgets, lengths, strict=True)]
        share = [row[self.index] for row in layered]
        if not adaptive and self._positions is None and all(b >= n for b, n in zip(share, lengths, strict=True)):
            self._note(lengths, self._bytes(), None)  # nothing to give up: not a bit is touched
            return
        groups = group_rows(
            storage, queries, prompt, rule, mask=mask, layer=self.index, layers=talk.layers, alone=adaptive
        )
        pending = Pending(groups, [], budgets, lengths, body)
        if not adaptive:
            self.cut(pending, share)
            return
        pending.weights = [float(talk.method.observe(group.view)) for group in groups]
        for group in groups:
            group.view.release_queries()
        self.pending = pending

    def cut(self, pending: "Pending", share: list[int]) -> None:
        """Replace the prompt's slots by what the method keeps of them.

        Args:
            share: entries that each row of the batch keeps in this layer.
        """
        self.pending = None
        before = self._bytes()
        if fits(pending.groups, share):
            self._note(pending.lengths, before, None)
            return
        talk = self.conversation
        outcome = compact(talk.method, pending.groups, share, trace=talk.trace)
        done, body = outcome.compacted, pending.body
        tail = slice(body, None)  # slots behind the prompt stay as they are
        positions, mass = self._columns()[..., tail], self._masses()[..., tail]
        bias = self.bias[..., tail] if self.bias is not None else torch.zeros_like(mass)
        self.keys = torch.cat([done.keys, self.keys[:, :, tail]], 2)
        self.values = torch.cat([done.values, self.values[:, :, tail]], 2)
        self._positions = torch.cat([done.positions, positions], -1)
        self._mass = torch.cat([done.mass, mass], -1)
        self.bias = torch.cat([done.bias, bias], -1) if done.bias is not None else None
        self.has_empty = bool((done.positions < 0).any())
        self.flow = done.flow
        self.fate = outcome.fate
        self._note(pending.lengths, before, outcome)

    def _note(self, lengths: list[int], before: int, outcome: Outcome | None) -> None:
        """Keep what the report will say."""
        positions, mass = self._columns(), self._masses()
        assert self.conversation.end is not None
        prompt = (positions >= 0) & (positions < self.conversation.end)
        represented = (mass * prompt).sum(-1)
        rows = outcome.rows if outcome else [{} for _ in lengths]
        self.record = Record(lengths, prompt.sum(-1), represented, before, self._bytes(), rows)

    def _columns(self) -> Tensor:
        positions = self.positions
        assert positions is not None
        return positions

    def _masses(self) -> Tensor:
        mass = self.mass
        assert mass is not None
        return mass

    def _bytes(self) -> int:
        return self.keys.numel() * self.keys.element_size() + self.values.numel() * self.values.element_size()

    def _entry_bytes(self) -> int:
        """Bytes of one token's keys and values over the batch."""
        return self._bytes() // self.slots


class CompressedCache(Cache):
    """A cache that compresses every prompt it is given, to be kept over many turns.

    A further prompt compresses the whole again, decoded tokens included, to the budget of the whole conversation;
    what was evicted does not return. Layers that are no full attention (sliding, linear, cross attention) are
    transformers' own and stay as they are.

    Args:
        config: the model's.
        method: what decides, such as `FlowMM(budget=0.2)`.
        trace: keep what became of each token, for pictures (`layers[i].fate`).
    """

    def __init__(self, config: Any, method: Method, *, trace: bool = False) -> None:
        if not isinstance(method, Method):
            raise TypeError(f"method={method!r} is not a kvweave method: allowed is one of kvweave.get_method(...)")
        self.method = method
        self._trace = trace
        decoder = config.get_text_config(decoder=True)
        crossed = set(getattr(decoder, "cross_attention_layers", None) or ())
        layers: list[Any] = list(DynamicCache(config=config).layers)
        places = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer and i not in crossed]
        self.conversation = Conversation(method, layers=len(places), trace=trace)
        for index, place in enumerate(places):
            layers[place] = CompressedLayer(index, self.conversation)
        self._kinds = [
            "cross_attention" if i in crossed else kind for i, kind in enumerate(_layer_kinds(decoder, len(layers)))
        ]
        super().__init__(layers=layers)

    @property
    def prompt(self) -> Prompt | None:
        """Visual and padding masks of everything seen; None before the first forward pass."""
        return self.conversation.prompt

    @property
    def compressed_layers(self) -> list[CompressedLayer]:
        """The layers that are compressed."""
        return [x for x in self.layers if isinstance(x, CompressedLayer) and x.kind == "full"]

    def declare_prompt(self, length: int) -> None:
        """Say how long the prompt is that comes next in pieces, so that it is compressed once, when it is complete.

        Inside `generate` this is known; elsewhere every forward of more than one token ends a prompt.

        Args:
            length: logical length of the conversation when the prompt ends, padding included.
        """
        if not isinstance(length, int) or length <= self.get_seq_length():
            raise ValueError(
                f"length={length!r} is not allowed: an int above the {self.get_seq_length()} tokens seen"
            )
        self.conversation.declared = length

    def finish_prompt(self) -> None:
        """Cut the layers of a layer-adaptive method, once all of them have been observed."""
        layers = self.compressed_layers
        pending = [layer.pending for layer in layers if layer.pending is not None]
        if not layers or len(pending) < len(layers):
            return
        first = pending[0]
        shares: list[list[int]] = [[] for _ in first.lengths]
        for n, group in enumerate(first.groups):
            row = group.index[0]
            weights = [p.weights[n] for p in pending]
            shares[row] = self.method.allocate(weights, first.budgets[row], first.lengths[row])
        for place, (layer, p) in enumerate(zip(layers, pending, strict=True)):
            layer.cut(p, [share[place] for share in shares])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        talk = self.conversation
        talk.prompt = talk.end = talk.declared = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_prompt(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.prompt is not None:
            self._select_prompt(torch.arange(self.prompt.valid.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_prompt(indices)

    def _select_prompt(self, rows: Tensor) -> None:
        if self.prompt is not None:
            self.conversation.prompt = self.prompt.rows(rows)

    @property
    def report(self) -> dict[str, Any]:
        """What the last cut did, JSON-able.

        `layers`: for each layer its length, how many tokens were kept, merged and evicted (means over rows and KV
        heads, they add up to the length), bytes after the cut, flow ratio and scope; `rows`: the same for each
        row of a batch. `totals`: over the compressed layers.
        """
        layers = [_described(i, layer, self._kinds[i]) for i, layer in enumerate(self.layers)]
        done = [layer for layer in layers if layer["compressed"]]
        totals: dict[str, Any] = {
            name: sum(layer[name] for layer in done)
            for name in ("length", "kept", "merged", "evicted", "bytes", "bytes_before")
        }
        totals["layers"] = len(done)
        return {"method": self.method.to_dict(), "layers": layers, "totals": totals}


def _layer_kinds(decoder: Any, layers: int) -> list[str]:
    kinds = list(getattr(decoder, "layer_types", None) or [])
    return kinds if len(kinds) == layers else ["full_attention"] * layers


def _described(index: int, layer: Any, kind: str) -> dict[str, Any]:
    """One layer's part of the report."""
    if not isinstance(layer, CompressedLayer) or layer.kind != "full" or layer.record is None:
        why = layer.kind if isinstance(layer, CompressedLayer) and layer.kind != "full" else kind
        return {"layer": index, "kind": why, "compressed": False}
    record = layer.record
    kept, represented = record.kept.double().mean(1).tolist(), record.represented.double().mean(1).tolist()
    rows = [
        {**_counts(n, k, r), **words}
        for n, k, r, words in zip(record.lengths, kept, represented, record.rows, strict=True)
    ]
    n = len(rows)
    scopes = {row["scope"] for row in record.rows if "scope" in row}
    words: dict[str, Any] = {"scope": (scopes.pop() if len(scopes) == 1 else "mixed") if scopes else None}
    for name in dict.fromkeys(key for row in record.rows for key in row if key != "scope"):
        words[name] = sum(row[name] for row in record.rows) / n
    described = {
        "layer": index,
        "kind": kind,
        "compressed": True,
        **_counts(sum(record.lengths) / n, sum(kept) / n, sum(represented) / n),
        "bytes": record.bytes_after,
        "bytes_before": record.bytes_before,
        "flow": None,
        **words,
    }
    return described | ({"rows": rows} if n > 1 else {})


def _counts(length: float, kept: float, represented: float) -> dict[str, int]:
    """Whole numbers that add up to the length."""
    total, stay, merged = round(length), round(kept), round(represented - kept)
    return {"length": total, "kept": stay, "merged": merged, "evicted": total - stay - merged}
