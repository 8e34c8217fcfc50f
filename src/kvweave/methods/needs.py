"""What a method needs: declared once, and read by whoever runs it, with a model or without."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import methodcaller

from kvweave.view import LayerView

#: `Needs.rows` of a method that needs the queries of all rows.
ALL_ROWS = -1
#: How attention is reduced over rows, and before that over a group's heads.
Reduction = tuple[str, str]
#: `D` of SPEC 13.1.
MEANS: Reduction = ("mean", "mean")


@dataclass(frozen=True)
class Needs:
    """What a method is to be given beside keys and values.

    Attributes:
        rows: queries of how many of the prompt's last rows; 0: none; `ALL_ROWS`: all.
        statistics: functions of a view; what they ask of it is computed before queries are released, where the cut
            comes later. `plan` may then ask the same.
        probed_rows: `rows` where probes are answered before the cut; None: as many.
        decoded: how the attention of tokens behind the prompt is reduced, (rows_by, heads_by) each.
        probed_decoded: the same, further ones, where those tokens are answers to probes.
        temperature: divides decoded tokens' logits before they become attention that counts.
        decoded_queries: those tokens' queries too (`LayerView.decoded_queries`).
        rotary: the rotary tables.
        projection: the layer's output projection (`LayerView.projection`).
        replay: where the user names no probes, the prompt is read again before it is cut (SPEC 15.5).
        images: what is read again are the images too, as the decoder was given them, and not the text alone.
        by_slot: statistics are of single slots, [batch, kv_heads, length], so that those of some may be had alone: a
            coarse cut asks that (`Method.coarse_cut`).
        surprise: nats; a row of a prompt that is read again counts by how surprising the text behind it was when it
            was first read, up to so many; 0: all rows count alike.
        unasked: so it is where it is cut, though its cut would wait for a reply, before one has begun.
        alone: rows of a batch are planned one at a time: counts depend on what a row holds, not only on its length.
            So they are wherever layers share a budget.
    """

    rows: int = 0
    statistics: tuple[Callable[[LayerView], object], ...] = ()
    probed_rows: int | None = None
    decoded: tuple[Reduction, ...] = (MEANS,)
    probed_decoded: tuple[Reduction, ...] = ()
    temperature: float = 1.0
    decoded_queries: bool = False
    rotary: bool = False
    projection: bool = False
    replay: bool = False
    images: bool = False
    by_slot: bool = False
    unasked: bool = False
    surprise: float = 0.0
    alone: bool = False

    @property
    def rows_with_probes(self) -> int:
        """`rows`, where probes are answered before the cut."""
        return self.rows if self.probed_rows is None else self.probed_rows

    def reductions(self, *, probed: bool) -> tuple[Reduction, ...]:
        """How the attention of tokens behind the prompt is reduced; `probed`: they answer probes."""
        return tuple(dict.fromkeys((*self.decoded, *(self.probed_decoded if probed else ()))))

    def compute(self, view: LayerView) -> None:
        """Let the view know the statistics."""
        for statistic in self.statistics:
            statistic(view)

    def with_reference(self, rows: int) -> "Needs":
        """The same, and what `LayerView.reference_rows(rows)` looks through."""
        return replace(
            self,
            rows=_more(self.rows, rows),
            probed_rows=None if self.probed_rows is None else _more(self.probed_rows, rows),
            statistics=(*self.statistics, methodcaller("hold_rows", rows)),
            decoded_queries=True,
            by_slot=False,
        )


def _more(one: int, other: int) -> int:
    return ALL_ROWS if ALL_ROWS in (one, other) else max(one, other)
