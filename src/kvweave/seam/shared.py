"""What all layers of a compressed cache share: the method, the turn, and where the layers' heads are."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from kvweave.cut.stream import Stream
from kvweave.cut.terms import Terms
from kvweave.methods.base import Method
from kvweave.methods.needs import Needs
from kvweave.ops.heads import HERE, Heads
from kvweave.seam.turn import Turn


@dataclass
class Shared:
    """What all layers of a cache share.

    Attributes:
        method: what decides.
        layers: how many are compressed.
        trace: keep each layer's fate, for pictures.
        hold: the cache was made to hold prompts whole until `CompressedCache.compress` is called.
        turn: when it is cut.
        attached: a model that knows how to read this cache is running.
        memo: views' statistics by what they are of, for caches that are filled with one and the same prompt.
        heads: processes that share each layer's heads, where the model is tensor parallel.
        query_heads: of a layer, in all of them.
        filled: some layer has been given keys since the forward pass began.
        needs: what the method declares.
        room: tokens to come for which memory is laid out once the prompt is cut, or None.
        stream: what keeps the cache bounded over endless input; None: each prompt is cut once.
    """

    method: Method
    layers: int = 0
    trace: bool = False
    hold: bool = False
    turn: Turn = field(default_factory=Turn)
    attached: bool = False
    memo: dict[Any, dict[Any, Any]] | None = None
    heads: Heads = HERE
    query_heads: int = 0
    room: int | None = None
    stream: Stream | None = None
    filled: bool = False
    needs: Needs = field(init=False)

    def __post_init__(self) -> None:
        self.go_by(self.method)
        if self.hold:
            self.turn.hold()

    def go_by(self, method: Method) -> None:
        """Let this method decide, the given one as it works on a model."""
        self.method = method
        self._terms = Terms.of(method, layers=self.layers, trace=self.trace)
        self.needs = self._terms.needs

    def __getstate__(self) -> dict[str, Any]:
        """What is copied, saved and sent: not what runs here."""
        return vars(self) | {"attached": False, "heads": HERE}

    def reset(self) -> None:
        """As it was made: nothing seen, nothing cut, nothing frozen."""
        stream = None if self.stream is None else self.stream.anew()
        fresh = Shared(self.method, layers=self.layers, trace=self.trace, hold=self.hold, stream=stream)
        vars(self).update(vars(fresh))

    def crop(self, length: int) -> None:
        """Forget the columns from `length` on."""
        if length:
            self.turn.crop(length)
            if self.stream is not None:
                self.stream.tables.crop(length)
            return
        frozen = self.turn.frozen
        self.reset()
        if frozen:
            self.turn.freeze()

    def select(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, in that order."""
        self.turn.select(rows)
        if self.stream is not None:
            self.stream.tables.select(rows)

    @property
    def query_rows(self) -> int:
        """Queries of how many of a prompt's last rows are needed."""
        probed = self.turn.on_request or (self.stream is not None and self.stream.asks)
        return self.needs.rows_with_probes if probed else self.needs.rows

    @property
    def may_replay(self) -> bool:
        """The prompt may be read again before it is cut."""
        return self.turn.on_request or self.needs.replay or self.needs.unasked

    @property
    def awaited(self) -> int:
        """Tokens behind the prompt whose queries are wanted."""
        return sum(self.turn.probe) or (0 if self.turn.on_request else self.method.defer)

    def terms(self, query_heads: int) -> Terms:
        """What the cut of a layer goes by that has as many query heads here."""
        turn = self.turn
        return replace(
            self._terms,
            heads=self._heads_of(query_heads),
            query_rows=self.query_rows,
            awaited=self.awaited,
            on_request=turn.on_request,
            probed=bool(turn.probes) or (self.stream is not None and self.stream.asks),
            rotary=turn.rotary if self.needs.rotary else None,
            interleaved=turn.interleaved,
            memo=self.memo,
            stream=self.stream,
        )

    def spread_over(self, model: Any) -> None:
        """Know where the layers' heads are, of a model that may be tensor parallel."""
        if (getattr(model, "_tp_size", None) or 1) > 1:
            mesh = model._device_mesh
            self.heads = Heads(mesh["tp"].get_group() if mesh.ndim > 1 else mesh.get_group())
            self.query_heads = model.config.get_text_config(decoder=True).num_attention_heads

    def _heads_of(self, query_heads: int) -> Heads:
        """Where a layer's other heads are that has as many query heads here: a plan may leave attention whole."""
        return self.heads if query_heads * self.heads.size == self.query_heads else HERE
