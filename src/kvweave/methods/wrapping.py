"""Methods around a method: one decides, another goes on from there.

Spelled `fold:method=snapkv,window=8,budget=0.2`: options that are not the wrapper's own are the method's; where
names meet, the wrapper's win. Inside another wrapper, brackets: `regress:method=[fold:method=h2o,spare=0],rows=16`.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from kvweave.methods.base import ANALYSIS, COMMON, Method
from kvweave.methods.merging import MergingMethod
from kvweave.methods.needs import Needs
from kvweave.methods.options import Option, wrapped
from kvweave.methods.registry import get_method, list_methods, method_class, method_from_dict
from kvweave.methods.scored import ScoredMethod
from kvweave.methods.snapkv import SnapKV
from kvweave.plan import Plan
from kvweave.view import LayerView

_SHARED = ("budget", *COMMON, *ANALYSIS)  # options that are the inner method's


@dataclass(frozen=True)
class Wrapper(Method):
    """Base of methods around a method. The budget is the inner method's; so are `defer`, `defer_weight` and
    `redecode`.

    `method` may be a name, a method, or its dictionary.
    """

    budget: Any = field(default=None, kw_only=True)  # None, here and below: the inner method's
    defer: Any = field(default=None, kw_only=True)
    redecode: Any = field(default=None, kw_only=True)
    method: Method = wrapped(SnapKV, help="what decides")

    #: The method inside where none is named.
    default_method: ClassVar[str] = "snapkv"

    def __post_init__(self) -> None:
        method: Any = self.method
        if isinstance(method, str):
            method = get_method(method)
        elif isinstance(method, dict):
            method = method_from_dict(method)
        if not isinstance(method, Method) or not self.accepts(method):
            name = method.name if isinstance(method, Method) else method
            raise ValueError(f"method={name!r} is not allowed for {self.name}: allowed is {self.allowed()}")
        common = {name: getattr(self, name) for name in _SHARED if getattr(self, name) is not None}
        method = dataclasses.replace(method, **common)
        object.__setattr__(self, "method", method)
        for name in _SHARED:
            object.__setattr__(self, name, getattr(method, name))
        super().__post_init__()
        if method.coarse_cut is not None and not self.needs.by_slot:
            raise ValueError(
                f"coarse is not allowed inside {self.name}, which looks through the whole prompt's rows: "
                "allowed is coarse=0"
            )

    @classmethod
    def accepts(cls, method: Method) -> bool:
        """Whether the wrapper takes it inside."""
        return isinstance(method, Method)

    @classmethod
    def allowed(cls) -> str:
        """The methods that it takes, for errors."""
        return "one of " + ", ".join(name for name in list_methods() if cls.accepts(method_class(name)()))

    @classmethod
    def options(cls) -> list[tuple[str, Option]]:
        return [(name, option) for name, option in super().options() if name not in _SHARED]

    @classmethod
    def takes(cls, values: dict[str, Any]) -> dict[str, Option]:
        name = values.get("method", cls.default_method)
        bare = isinstance(name, str) and not name.startswith("[")
        inside = method_class(name).takes({}) if bare else {n: o for n, o in Method.options() if n in _SHARED}
        return inside | dict(cls.options())

    @classmethod
    def build(cls, **options: Any) -> "Wrapper":
        own = {name: options.pop(name) for name, _ in cls.options() if name in options}
        shared = {name: options.pop(name) for name in _SHARED if name in options}
        method = own.pop("method", cls.default_method)
        if isinstance(method, str):
            method = get_method(method, **options, **shared)  # what one of its options allows may hang on another
        elif options:
            raise ValueError(
                f"{', '.join(options)}: not allowed beside a method that is already made; allowed are options of "
                f"{cls.name}: {', '.join(name for name, _ in cls.options())}"
            )
        return cls(method=method, **own, **shared)

    def to_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name, _ in self.options()}
        return {"name": self.name, **own, "method": self.method.to_dict()}

    def spelling(self) -> str:
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        own = {name: getattr(self, name) for name, _ in self.options() if name != "method"}
        changed = [f"{key}={value}" for key, value in own.items() if value != defaults[key]]
        inside = self.method.spelling()
        name, _, options = inside.partition(":")
        theirs = {item.partition("=")[0] for item in options.split(",")}
        if isinstance(self.method, Wrapper) or theirs & set(own):
            return f"{self.name}:" + ",".join([f"method=[{inside}]", *changed])
        return f"{self.name}:" + ",".join([f"method={name}", *changed, options])

    def on_model(self, profile: Callable[[], str | None]) -> "Wrapper":
        return self._around(self.method.on_model(profile))

    @property
    def without_model(self) -> "Wrapper":
        return self._around(self.method.without_model)

    def _around(self, inside: Method) -> "Wrapper":
        common: dict[str, Any] = dict.fromkeys(_SHARED)  # the inner method's own
        return self if inside is self.method else dataclasses.replace(self, method=inside, **common)

    # What the inner method says.

    @property
    def layer_adaptive(self) -> bool:
        return self.method.layer_adaptive

    @property
    def uses_modality(self) -> bool:
        return self.method.uses_modality

    @property
    def biases_logits(self) -> bool:
        return self.method.biases_logits

    @property
    def profiles(self) -> tuple[str, ...]:
        return self.method.profiles

    @property
    def pools(self) -> bool:
        return self.method.pools

    @property
    def needs(self) -> Needs:
        return self.method.needs

    @property
    def coarse_cut(self) -> Method | None:
        return self.method.coarse_cut

    @property
    def coarse_refusal(self) -> str:
        return self.method.coarse_refusal

    def coarse_budgets(self, budget: int, length: int, layers: int) -> list[Any] | None:
        return self.method.coarse_budgets(budget, length, layers)

    def prepare(self, view: LayerView, budget: int) -> None:
        super().prepare(view, budget)
        self.method.prepare(view, budget)

    def plan(self, view: LayerView, budget: int) -> Plan:
        return self.method.plan(view, budget)

    def plan_heads(self, view: LayerView, counts: tuple[int, ...]) -> Plan:
        return self.method.plan_heads(view, counts)

    def layer_budgets(self, budget: int, length: int, layers: int) -> list[Any]:
        return self.method.layer_budgets(budget, length, layers)

    def layer_weight(self, view: LayerView) -> Tensor:
        return self.method.layer_weight(view)

    def observe(self, view: LayerView) -> Any:
        self.needs.compute(view)
        return self.method.observe(view)

    def allocate(self, weights: list[Any], budget: int, length: int) -> list[Any]:
        return self.method.allocate(weights, budget, length)


@dataclass(frozen=True)
class ScoredWrapper(Wrapper):
    """Base of wrappers that go on from a scored method's selection."""

    @property
    def inside(self) -> ScoredMethod:
        """The method that selects."""
        assert isinstance(self.method, ScoredMethod)
        return self.method

    @classmethod
    def accepts(cls, method: Method) -> bool:
        return isinstance(method, ScoredMethod) and not isinstance(method, MergingMethod)

    def plan(self, view: LayerView, budget: int) -> Plan:
        return self.planned(view, budget)

    def plan_heads(self, view: LayerView, counts: tuple[int, ...]) -> Plan:
        return self.planned(view, counts)

    def planned(self, view: LayerView, budget: int | tuple[int, ...]) -> Plan:
        """Either of the two."""
        raise TypeError(f"{type(self).__name__} does not define planned(view, budget)")
