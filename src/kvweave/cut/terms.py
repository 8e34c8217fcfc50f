"""What the cut of a layer goes by beside its slots, and a layer between its attention and its cut."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kvweave.cut.coarse import Coarse
from kvweave.cut.rows import Group
from kvweave.cut.stream import Stream
from kvweave.memory.slots import Slots
from kvweave.methods.base import Method
from kvweave.methods.needs import Needs
from kvweave.ops.heads import HERE, Heads
from kvweave.ops.quantize import Quantization


@dataclass(frozen=True)
class Terms:
    """What a layer's cut goes by, beside its slots.

    Attributes:
        method: what decides; needs: what it declares; storage: how it wants slots stored, None: as they are.
        adaptive: the layers' budgets depend on what was observed of all; alone: rows are planned one at a time.
        layers: how many layers share the budget.
        heads: where the layer's other heads are.
        query_rows: queries of how many of the prompt's last rows are needed.
        awaited: tokens behind the prompt whose queries are wanted.
        on_request: the cut waits until it is asked for; probed: probes have been answered.
        rotary: (cos, sin), [batch, columns, rotary_dim] each, where the method needs them.
        interleaved: how it pairs channels.
        trace: keep each slot's fate.
        memo: statistics that other caches filled with the same prompt have computed, by what they are of.
        stream: the cache is bounded over endless input; None: each prompt is cut once.
    """

    method: Method
    needs: Needs
    storage: Quantization | None
    adaptive: bool
    alone: bool
    layers: int = 1
    heads: Heads = HERE
    query_rows: int = 0
    awaited: int = 0
    on_request: bool = False
    probed: bool = False
    rotary: tuple[Tensor, Tensor] | None = None
    interleaved: bool = False
    trace: bool = False
    memo: dict[Any, dict[Any, Any]] | None = None
    stream: Stream | None = None

    @classmethod
    def of(cls, method: Method, **more: Any) -> "Terms":
        """What the method says of itself, and what else is known."""
        needs, adaptive = method.needs, method.layer_adaptive
        return cls(method, needs, method.storage, adaptive, adaptive or needs.alone, **more)


@dataclass
class Pending:
    """A layer between its attention and its cut.

    Attributes:
        groups: what the method sees, rows of equal length together.
        budgets, lengths: mean entries of a layer and real tokens, by row of the batch.
        prompt: the prompt's slots; behind: those behind it, which are not cut; None: there are none.
        valid: bool [batch, columns], real tokens of the prompt.
        weights: what was observed of each group, for layer-adaptive methods.
        coarse: what a first cut of the prompt did, of which these are the slots left; None: there was none.
    """

    groups: list[Group]
    budgets: list[int]
    lengths: list[int]
    prompt: Slots
    behind: Slots | None
    valid: Tensor
    weights: list[Any] = field(default_factory=list)
    coarse: Coarse | None = None
