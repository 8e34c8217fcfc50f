"""One layer of the cache as a method sees it: keys, values, queries, modalities, and statistics on demand."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvweave.ops import spread, statistics
from kvweave.ops.draw import stratified_rows
from kvweave.ops.heads import HERE, Heads
from kvweave.ops.statistics import AttentionRule, Flow

#: Rows of column sums that the decoded tokens' attention counts as, before it is weighted (SPEC 13.1).
DECODED_ROWS = 32


@dataclass
class LayerView:
    """Rows of one layer that hold the same number of slots, padding already taken out.

    On a first prompt slot j of every head is the row's token j. On a later turn heads may hold different tokens.
    Statistics are computed when first asked for, and once.

    Attributes:
        keys, values: [batch, kv_heads, length, dim], after rotary.
        queries: [batch, heads, rows, dim] of the last `rows` tokens, after rotary; None where the method needs none.
        positions: int64 [batch, kv_heads, length], columns of the padded input.
        mass: float [batch, kv_heads, length], tokens that an entry stands for already.
        visual: bool [batch, kv_heads, length].
        rule: how queries and keys become attention.
        bias: float [batch, kv_heads, length], what decoding has added to the slots' logits so far, or None.
        empty: bool [batch, kv_heads, length], slots that hold nothing, where heads hold different counts (a later
            turn of a method that keeps different counts by head); None: there are none.
        memory: [batch, ...], what the plan of the turn before left (`Plan.memory`), or None.
        mean_budget: entries of a layer on average, before they were shared out over layers.
        layer, layers: this layer's number among the compressed ones, and how many there are.
        rotary: (cos, sin), [batch, kv_heads, length, rotary_dim] each, where a method turns keys.
        interleaved: how rotary pairs channels: (2m, 2m + 1), else (m, m + rotary_dim / 2).
        rotated: the layer's keys are rotated at all.
        decoded: float [batch, kv_heads, length], attention received from tokens decoded behind the prompt, mean over
            them (SPEC 13.1, `D`), where the cut was deferred or probes were answered; else None.
        decoded_weight: its weight against the prompt's own rows, in [0, 1); one, or [batch, 1, 1].
        probed: the decoded tokens are answers to probes, not the reply's beginning.
        heads: where the layer's other KV heads are, if not here (tensor parallelism).
        known: statistics that were computed, by name.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor | None
    positions: Tensor
    mass: Tensor
    visual: Tensor
    rule: AttentionRule
    bias: Tensor | None = None
    empty: Tensor | None = None
    memory: Tensor | None = None
    mean_budget: int = 0
    layer: int = 0
    layers: int = 1
    rotary: tuple[Tensor, Tensor] | None = None
    interleaved: bool = False
    rotated: bool = True
    decoded: Tensor | None = None
    decoded_weight: float | Tensor = 0.0
    probed: bool = False
    heads: Heads = HERE
    known: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def batch(self) -> int:
        return self.keys.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def over_heads(self, x: Tensor) -> Tensor:
        """`x` [batch, heads here, ...] of all the layer's heads: what is decided by several heads goes by this."""
        return self.heads.gather(x)

    @property
    def first_head(self) -> int:
        """Number of the first KV head here among the layer's."""
        return self.heads.rank * self.kv_heads

    def window_attention(self, window: int, adjust: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Attention received from the last `window` rows: [batch, kv_heads, length] (SPEC 2.1, `I`).

        Where tokens were decoded before the cut, theirs is mixed in as if it came from as many rows (SPEC 13.1).

        Args:
            adjust: what is done to the prompt's own part first, such as pooling; it may leave the last tokens off.
        """
        received = self.once(
            ("window", window),
            lambda: statistics.window_attention(self._queries(), self.keys, self.rule, window),
        )
        received = received if adjust is None else adjust(received)
        if self.decoded is None:
            return received
        decoded = self.decoded[..., : received.shape[-1]] * min(window, self.rows)
        return (1 - self.decoded_weight) * received + self.decoded_weight * decoded

    def peak_attention(self) -> Tensor:
        """Most attention from any one row, a group's mean: [batch, kv_heads, length] (SPEC 13.2)."""
        return self.once("peak", lambda: statistics.column_peaks(self._queries(), self.keys, self.rule))

    def column_sums(self) -> Tensor:
        """Attention received by each token from text and from visual rows: [batch, heads, 2, length]."""

        def compute() -> Tensor:
            visual = self.row_visual()
            kinds = torch.stack([~visual, visual], 1)
            return statistics.column_sums(self._queries(), self.keys, self.rule, kinds)

        return self.once("columns", compute)

    def column_mass(self) -> Tensor:
        """Attention received by each token from all rows: [batch, kv_heads, length] (SPEC 2.1, `C`).

        Where tokens were decoded before the cut, theirs is added (SPEC 13.1).
        """
        mass = self.once("column mass", lambda: self.column_sums().sum(2).unflatten(1, (self.kv_heads, -1)).mean(2))
        if self.decoded is None:
            return mass
        odds = self.decoded_weight / (1 - self.decoded_weight)
        return mass + odds * DECODED_ROWS * self.decoded

    def flow(self, rows: int = 0, seed: int = 0) -> Flow:
        """The layer's cross-modal flow ratios, [batch] each (SPEC 3, step 1).

        Args:
            rows: estimate them from that many rows, drawn from text and visual ones in proportion; 0: from all.
        """
        if not 0 < rows < self.rows:
            return self.once("flow", lambda: self._flow(self.column_sums()))
        return self.once(("flow", rows, seed), lambda: self._sampled_flow(rows, seed))

    def _sampled_flow(self, rows: int, seed: int) -> Flow:
        row_visual = self.row_visual()
        index, weight = stratified_rows(row_visual, rows, seed, self.layer)
        queries = self._queries()
        drawn = queries.gather(2, index[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3]))
        first = self.length - queries.shape[2]
        columns = torch.arange(self.length, device=index.device)
        whole = self.rule.mask

        def mask(start: int, stop: int) -> Tensor:
            """What the drawn rows [start, stop) see: [batch, 1 or heads, stop - start, length]."""
            part = index[:, start:stop]
            if whole is None:
                return (columns <= first + part[..., None])[:, None]
            low, high = int(part.min()), int(part.max()) + 1
            block = whole(low, high).expand(len(part), -1, -1, -1)
            at = (part - low)[:, None, :, None].expand(-1, block.shape[1], -1, block.shape[3])
            return block.gather(2, at)

        sums = statistics.column_sums(drawn, self.keys, replace(self.rule, mask=mask), weight)
        return self._flow(sums)

    def _flow(self, sums: Tensor) -> Flow:
        return statistics.flow_ratio(sums, self.visual, self.row_visual(), self.over_heads)

    def cross_entropy(self, *, causal: bool) -> Tensor:
        """Entropy of attention restricted to the other modality, nats: [batch] (SPEC 7)."""
        return self.once(
            ("entropy", causal),
            lambda: spread.cross_entropy(
                self._queries(), self.keys, self.rule, self.visual, self.row_visual(), self.over_heads, causal=causal
            ),
        )

    def density(self, rows: int, share: float) -> Tensor:
        """Fraction of what the last `rows` see that reaches `share` of their maximum: [batch] (SPEC 10.6)."""
        first, mask = self.rows - rows, self.rule.mask
        rule = self.rule if mask is None else replace(self.rule, mask=lambda i, j: mask(first + i, first + j))
        return self.once(
            ("density", rows, share),
            lambda: spread.row_density(self._queries()[:, :, first:], self.keys, rule, share, self.over_heads),
        )

    @property
    def rows(self) -> int:
        """Rows whose queries are, or were, at hand."""
        return self.once("rows", lambda: self._queries().shape[2])

    def row_visual(self) -> Tensor:
        """Modality of those rows: bool [batch, rows]."""
        return self.visual[:, 0, self.length - self.rows :]

    def release_queries(self) -> None:
        """Forget the queries; statistics already computed stay, and how many rows there were."""
        if self.queries is not None:
            self.once("rows", lambda: self._queries().shape[2])
        self.queries = None

    def _queries(self) -> Tensor:
        if self.queries is None:
            raise RuntimeError("this statistic needs queries, and the method asked for none (Method.query_rows)")
        return self.queries

    def remember_in(self, known: dict[Any, Any]) -> None:
        """Look statistics up in `known`, and put them there, before any has been computed."""
        self.known = known

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """What `compute` returned when it was first called for this key."""
        if key not in self.known:
            self.known[key] = compute()
        return self.known[key]
