"""One layer of the cache as a method sees it: keys, values, queries, modalities, and statistics on demand."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvweave.ops import spread, statistics
from kvweave.ops.draw import stratified_rows
from kvweave.ops.heads import HERE, Heads
from kvweave.ops.reference_rows import ReferenceRows
from kvweave.ops.rotary import unit_tables
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
        decoded_by: the same where it is not the mean over the tokens and over a group's heads, by (rows_by,
            heads_by).
        decoded_queries: [batch, heads, tokens, dim], those tokens' queries, where the method looks through their eyes
            (`Needs.decoded_queries`); decoded_counted: bool [batch, tokens], those that count.
        projection: [hidden, heads * dim], the layer's output projection, where the method asks for it and there is
            one.
        probed: the decoded tokens are answers to probes, not the reply's beginning.
        heads: where the layer's other KV heads are, if not here (tensor parallelism).
        stored: what memory holds where all heads share one entry a token (MLA), as a view of one head, without
            queries; `keys` and `values` are then what each head makes of it. None: `keys` and `values` themselves.
        memo: statistics that were computed, by name.
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
    decoded_by: dict[tuple[str, str], Tensor] = field(default_factory=dict, repr=False)
    decoded_queries: Tensor | None = None
    decoded_counted: Tensor | None = None
    projection: Tensor | None = None
    probed: bool = False
    heads: Heads = HERE
    stored: "LayerView | None" = None
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def batch(self) -> int:
        return self.keys.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    @property
    def storage(self) -> "LayerView":
        """What a plan is about: the view itself, or what memory holds in place of its heads."""
        return self if self.stored is None else self.stored

    def of_one_head(self, keys: Tensor, values: Tensor) -> "LayerView":
        """The same tokens as all heads share them: keys and values are [batch, 1, length, dim]."""

        def first(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, :1]

        return replace(
            self,
            keys=keys,
            values=values,
            queries=None,
            positions=self.positions[:, :1],
            mass=self.mass[:, :1],
            visual=self.visual[:, :1],
            bias=first(self.bias),
            empty=first(self.empty),
            memo={},
        )

    def over_heads(self, x: Tensor) -> Tensor:
        """`x` [batch, heads here, ...] of all the layer's heads: what is decided by several heads goes by this."""
        return self.heads.gather(x)

    @property
    def first_head(self) -> int:
        """Number of the first KV head here among the layer's."""
        return self.heads.rank * self.kv_heads

    def decoded_attention(self, rows_by: str = "mean", heads_by: str = "mean") -> Tensor | None:
        """Attention received from the tokens behind the prompt: [batch, kv_heads, length], or None (SPEC 13.1, `D`).

        Args:
            rows_by, heads_by: over the tokens, and before over a group's heads; one that the method asks for
                (`Needs.decoded`).
        """
        return self.decoded if rows_by == heads_by == "mean" else self.decoded_by.get((rows_by, heads_by))

    def window_attention(
        self,
        window: int,
        adjust: Callable[[Tensor], Tensor] | None = None,
        *,
        rows_by: str = "mean",
        heads_by: str = "mean",
    ) -> Tensor:
        """Attention received from the last `window` rows: [batch, kv_heads, length] (SPEC 2.1, `I`).

        Where tokens were decoded before the cut, theirs is mixed in as if it came from as many rows (SPEC 13.1).

        Args:
            adjust: what is done to the prompt's own part first, such as pooling; it may leave the last tokens off.
            rows_by: "mean": the sum over rows; "max": the largest of any row, of prompt and decoded tokens apart.
            heads_by: "mean" or "max" over the query heads of a group, before that.
        """
        received = self.prompt_attention(window, rows_by, heads_by)
        received = received if adjust is None else adjust(received)
        decoded = self.decoded_attention(rows_by, heads_by)
        if decoded is None:
            return received
        decoded = decoded[..., : received.shape[-1]]
        if rows_by == "mean":
            decoded = decoded * min(window, self.rows)
        return (1 - self.decoded_weight) * received + self.decoded_weight * decoded

    def prompt_attention(self, window: int, rows_by: str = "mean", heads_by: str = "mean") -> Tensor:
        """As `window_attention`, of the prompt's own rows alone: those at hand, or held (`hold_rows`)."""

        def compute() -> Tensor:
            queries, rule = self._window_rows(window)
            return statistics.window_attention(queries, self.keys, rule, window, rows_by, heads_by)

        return self.once(("window", window, rows_by, heads_by), compute)

    def _window_rows(self, window: int) -> tuple[Tensor, AttentionRule]:
        held = self.memo.get(("reference queries", window))
        if self.queries is not None or held is None:
            return self.all_queries(), self.rule
        queries, mask = held
        return queries, replace(self.rule, mask=None if mask is None else lambda low, high: mask[:, :, low:high])

    def received(self, rows_by: str, heads_by: str) -> Tensor:
        """Attention from all of the prompt's rows, over a group's heads first: [batch, kv_heads, length].

        With `rows_by="max"` the most that any one row pays (SPEC 13.2), with "mean" the sum.
        """
        return self.once(
            ("received", rows_by, heads_by),
            lambda: statistics.received(self.all_queries(), self.keys, self.rule, rows_by, heads_by),
        )

    def far_attention(self, rows: int, reach: int) -> Tensor:
        """The most that any of the prompt's last `rows` rows, and of a group's heads, pays to a token that lies
        `reach` tokens before it, or a quarter of the slots, or farther: [batch, kv_heads, length] (SPEC 17.7)."""

        def compute() -> Tensor:
            queries, rule = self.last_rows(rows)
            return statistics.received(queries, self.keys, rule, "max", "max", reach=min(reach, self.length // 4))

        return self.once(("far", rows, reach), compute)

    def column_sums(self) -> Tensor:
        """Attention received by each token from text and from visual rows: [batch, heads, 2, length]."""

        def compute() -> Tensor:
            visual = self.row_visual()
            kinds = torch.stack([~visual, visual], 1)
            return statistics.column_sums(self.all_queries(), self.keys, self.rule, kinds)

        return self.once("columns", compute)

    def column_mass(self, rows_by: str = "mean", heads_by: str = "mean") -> Tensor:
        """Attention received by each token from all rows: [batch, kv_heads, length] (SPEC 2.1, `C`).

        Where tokens were decoded before the cut, theirs is added (SPEC 13.1); of maxima both are mixed by weight.
        """
        if rows_by == heads_by == "mean":
            mass = self.once(
                "column mass", lambda: self.column_sums().sum(2).unflatten(1, (self.kv_heads, -1)).mean(2)
            )
        else:
            mass = self.received(rows_by, heads_by)
        decoded = self.decoded_attention(rows_by, heads_by)
        if decoded is None:
            return mass
        if rows_by == "max":
            return (1 - self.decoded_weight) * mass + self.decoded_weight * decoded
        odds = self.decoded_weight / (1 - self.decoded_weight)
        return mass + odds * DECODED_ROWS * decoded

    def reference_rows(self, rows: int) -> ReferenceRows:
        """The last `rows` prompt tokens and all decoded or probed ones, as SPEC 15.3 looks through them."""
        queries, mask = self.hold_rows(rows)
        return ReferenceRows.of(
            self.keys,
            queries,
            self.rule,
            mask=mask,
            bias=self.bias,
            empty=self.empty,
            decoded=self.decoded_queries,
            counted=self.decoded_counted,
            decoded_weight=self.decoded_weight,
        )

    def hold_rows(self, rows: int) -> tuple[Tensor, Tensor | None]:
        """Let `reference_rows` and `prompt_attention` of as many rows be asked for once queries are released."""
        rows_and_mask: tuple[Tensor, Tensor | None] = self.once(
            ("reference queries", rows), lambda: self._copied_rows(rows)
        )
        return rows_and_mask

    def _copied_rows(self, rows: int) -> tuple[Tensor, Tensor | None]:
        """Queries [batch, heads, n, dim] of the last tokens, and the model's mask of their rows or None."""
        queries, rule = self.last_rows(rows)
        mask = None if rule.mask is None else rule.mask(0, queries.shape[2]).clone()
        if mask is not None:
            mask = mask.expand(self.batch, *mask.shape[1:])
        return queries.clone(), mask

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
        queries, rule = self.some_rows(index)
        return self._flow(statistics.column_sums(queries, self.keys, rule, weight))

    def _flow(self, sums: Tensor) -> Flow:
        return statistics.flow_ratio(sums, self.visual, self.row_visual(), self.over_heads)

    def last_rows(self, rows: int) -> tuple[Tensor, AttentionRule]:
        """Queries of the last `rows` rows, all where there are fewer, and the rule by which they attend."""
        queries, mask = self.all_queries(), self.rule.mask
        first = max(0, queries.shape[2] - rows)
        if mask is None or not first:
            return queries[:, :, first:], self.rule
        return queries[:, :, first:], replace(self.rule, mask=lambda start, stop: mask(first + start, first + stop))

    def some_rows(self, index: Tensor) -> tuple[Tensor, AttentionRule]:
        """Queries of the rows `index` [batch, n], and the rule by which they attend as they did among all rows."""
        queries = self.all_queries()
        rows = queries.gather(2, index[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3]))
        first = self.length - queries.shape[2]
        columns = torch.arange(self.length, device=index.device)
        full_mask = self.rule.mask

        def mask(start: int, stop: int) -> Tensor:
            """What the drawn rows [start, stop) see: [batch, 1 or heads, stop - start, length]."""
            part = index[:, start:stop]
            if full_mask is None:
                return (columns <= first + part[..., None])[:, None]
            low, high = int(part.min()), int(part.max()) + 1
            block = full_mask(low, high).expand(len(part), -1, -1, -1)
            at = (part - low)[:, None, :, None].expand(-1, block.shape[1], -1, block.shape[3])
            return block.gather(2, at)

        return rows, replace(self.rule, mask=mask)

    def slot_weights(self) -> Tensor:
        """What a slot counts in a mean over slots: exp(bias), 0 where it is empty; [batch, kv_heads, length]."""
        weights = torch.ones_like(self.mass) if self.bias is None else self.bias.exp()
        return weights if self.empty is None else weights.masked_fill(self.empty, 0)

    def unit_tables(self, needed_by: str) -> tuple[Tensor, Tensor] | None:
        """Rotary tables on the unit circle, [batch, kv_heads, length, rotary_dim]; None: keys are not rotated.

        Args:
            needed_by: for the error where the tables are not at hand.
        """
        if not self.rotated:
            return None
        if self.rotary is None:
            raise ValueError(
                f"{needed_by} needs the rotary tables: compress_tensors takes them as rotary=(cos, sin), "
                "and this model does not hand them to its attention"
            )
        return unit_tables(*self.rotary)

    def cross_entropy(self, *, causal: bool, rows: int = 0) -> Tensor:
        """Entropy of attention restricted to the other modality, nats: [batch] (SPEC 7).

        Args:
            causal: over tokens that a row can see, else over all of the other modality.
            rows: estimate it from that many rows, drawn from text and visual ones in proportion, at least one of
                each; 0: from all.
        """
        return self.once(("entropy", causal, rows), lambda: self._cross_entropy(rows, causal=causal))

    def _cross_entropy(self, rows: int, *, causal: bool) -> Tensor:
        queries, rule, row_visual = self.all_queries(), self.rule, self.row_visual()
        if 0 < rows < self.rows:
            index, _ = stratified_rows(row_visual, max(2, rows), 0, self.layer)
            queries, rule = self.some_rows(index)
            row_visual = row_visual.gather(1, index)
        return spread.cross_entropy(queries, self.keys, rule, self.visual, row_visual, self.over_heads, causal=causal)

    def density(self, rows: int, share: float) -> Tensor:
        """Fraction of what the last `rows` see that reaches `share` of their maximum: [batch] (SPEC 10.6)."""

        def compute() -> Tensor:
            queries, rule = self.last_rows(rows)
            return spread.row_density(queries, self.keys, rule, share, self.over_heads)

        return self.once(("density", rows, share), compute)

    def text_step(self) -> Tensor:
        """The first of the last two text tokens that stand in neighbouring columns: int64 [batch, kv_heads].

        Where there are none, the last token but one.
        """
        pairs = ~self.visual[..., :-1] & ~self.visual[..., 1:]
        pairs = pairs & (self.positions[..., 1:] - self.positions[..., :-1] == 1) & (self.positions[..., :-1] >= 0)
        place = torch.arange(self.length - 1, device=pairs.device).expand_as(pairs)
        last = max(0, self.length - 2)
        if not place.numel():
            return torch.zeros_like(self.positions[..., 0])
        return torch.where(pairs.any(-1), place.masked_fill(~pairs, -1).amax(-1), last)

    @property
    def rows(self) -> int:
        """Rows whose queries are, or were, at hand."""
        return self.once("rows", lambda: self.all_queries().shape[2])

    def row_visual(self) -> Tensor:
        """Modality of those rows: bool [batch, rows]."""
        return self.visual[:, 0, self.length - self.rows :]

    def release_queries(self) -> None:
        """Forget the queries; statistics already computed stay, and how many rows there were."""
        if self.queries is not None:
            self.once("rows", lambda: self.all_queries().shape[2])
        self.queries = None

    def all_queries(self) -> Tensor:
        """Queries [batch, heads, rows, dim] of the last tokens, as long as they are at hand."""
        if self.queries is None:
            raise RuntimeError(
                "this statistic needs queries, and the method did not declare it (Needs.rows, Needs.statistics)"
            )
        return self.queries

    def remember_in(self, memo: dict[Any, Any]) -> None:
        """Look statistics up in `memo`, and put them there, before any has been computed."""
        self.memo = memo

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """What `compute` returned when it was first called for this key."""
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]
