"""Bounded over endless input: by which settings a cache is cut back to its budget again and again (SPEC 18)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from kvweave.memory.tables import Tables
from kvweave.methods.base import Method
from kvweave.ops.brief import brief
from kvweave.ops.budget import entries

_ENDLESS = 2**40  # tokens: no input is longer
SINKS = 4


@dataclass
class Stream:
    """What all layers of a bounded cache share.

    Attributes:
        every: columns after which the cache is cut.
        total: tokens of the whole input, where the budget is a share of it.
        sinks: first tokens of the whole input that stay.
        budget: entries that a layer is cut back to; None: nothing was seen.
        asks: probes are read before each cut.
        tables: rotary tables, where the method turns keys.
        warned: of positions that the model was not trained on.
        peak: most slots that attention read in a pass, mean over layers and KV heads.
    """

    every: int
    total: int | None = None
    sinks: int = SINKS
    budget: int | None = None
    asks: bool = False
    tables: Tables = field(default_factory=Tables)
    warned: bool = False
    peak: float = 0

    def anew(self) -> "Stream":
        """With the same settings, and nothing seen."""
        return Stream(self.every, self.total, self.sinks, asks=self.asks)

    def entries(self, method: Method, bytes_per_entry: int) -> int:
        """Entries that a layer is cut back to, found once.

        Args:
            bytes_per_entry: of keys and values, over all layers and all rows of the batch.
        """
        if self.budget is None:
            self.budget = entries(method.budget, self.length, bytes_per_entry)
        return self.budget

    @property
    def length(self) -> int:
        """Tokens of the whole input, or more than there will be."""
        return self.total or _ENDLESS

    def shares(self, method: Method, budgets: Sequence[int], layer: int, layers: int) -> list[Any]:
        """What a layer is cut back to, by row, where that is known beforehand: as if the input were one prompt.

        Args:
            budgets: mean entries of a layer, by row.
        """
        return [method.layer_budgets(budget, self.length, layers)[layer] for budget in budgets]

    def forced(self, method: Method, budget: int) -> int:
        """First tokens of the input that stay besides those that the method forces itself."""
        return min(max(0, self.sinks - getattr(decider(method), "sinks", 0)), budget // 2)


def decider(method: Method) -> Method:
    """The innermost of methods around methods."""
    while isinstance(inside := getattr(method, "method", None), Method):
        method = inside
    return method


def stream_of(
    method: Method,
    every: int | None,
    total: int | None,
    stream_sinks: int,
    *,
    trace: bool = False,
    hold: bool = False,
) -> tuple[Method, Stream | None]:
    """The method as a stream goes by it, and the stream; None: the cache is no stream.

    Raises:
        ValueError: settings that are not allowed, or do not go together.
    """
    for name, value, least in (("every", every, 1), ("total", total, 1), ("stream_sinks", stream_sinks, 0)):
        optional = name != "stream_sinks"
        if not (value is None and optional) and (type(value) is not int or not least <= value <= _ENDLESS):
            none = ", or None" if optional else ""
            raise ValueError(f"{name}={brief(value)} is not allowed: allowed is an int >= {least}{none}")
    if every is None:
        for name, value, default in (("total", total, None), ("stream_sinks", stream_sinks, SINKS)):
            if value != default:
                raise ValueError(f"{name}={value!r} is not allowed without every: allowed is every=n beside it")
        return method, None
    _check(method, every, total)
    for name, choice in (("trace", trace), ("hold", hold)):
        if choice:
            raise ValueError(f"{name}=True is not allowed with every={every}: allowed is one of them")
    return _undeferred(method) if method.defer else method, Stream(every, total, stream_sinks)


def _undeferred(method: Method) -> Method:
    """The method without the deferral that it has by default."""
    inside = getattr(method, "method", None)
    options: dict[str, Any] = {}
    if isinstance(inside, Method):
        options["method"] = _undeferred(inside)
    else:
        if getattr(method, "temperature", None) is not None and not _is_explicit(method, "temperature"):
            options["temperature"] = None
        if method.coarse_cut is not None:
            options["coarse"] = 0
    return replace(method, defer=0, **options)


def _is_explicit(method: Method, option: str) -> bool:
    """The option was given; where nobody noted that, it differs from its default."""
    default = next(field.default for field in fields(method) if field.name == option)
    value = getattr(method.without_model, option)
    return value != default and option in getattr(method, "_explicit", {option})


def _check(method: Method, every: int, total: int | None) -> None:
    """Refuse methods, or options of theirs, that no budget bounds or that look at what comes later."""
    beside, inside = f"is not allowed with every={every}", decider(method)
    if method.redecode:
        raise ValueError(f"redecode=True {beside}: allowed is redecode=False")
    if method.defer and _is_explicit(inside, "defer"):
        raise ValueError(f"defer={method.defer} {beside}, which cuts at once: allowed is defer=0")
    if method.coarse_cut is not None and _is_explicit(inside, "coarse"):
        raise ValueError(f"coarse {beside}, which cuts as it goes: allowed is coarse=0")
    for name, option, value, allowed in (
        ("kvmerger", "variant", "threshold", "budgeted"),
        ("lookm", "text_prior", "union", "exact or off"),
    ):
        if inside.name == name and getattr(inside, option) == value:
            raise ValueError(
                f"{option}={value!r} {beside}: {name} then keeps more than its budget; allowed is {allowed}"
            )
    if isinstance(method.budget, float) and total is None and inside.name != "full":
        raise ValueError(
            f"budget={method.budget} {beside}: a share of an endless input bounds nothing; allowed is tokens such as "
            "512, bytes such as '256MiB', or a share with total=, the tokens of the whole input"
        )
