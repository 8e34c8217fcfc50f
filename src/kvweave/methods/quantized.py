"""A quantised cache around any method: what it keeps is stored in 8, 4 or 2 bits (KIVI, Liu et al., 2402.02750)."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kvweave.methods.base import COMMON, Method
from kvweave.methods.full import Full
from kvweave.methods.options import Option, integer, one_of, wrapped
from kvweave.methods.registry import get_method, method_class, method_from_dict, register
from kvweave.ops.budget import Budget
from kvweave.ops.quantize import BITS, Quantization
from kvweave.plan import Plan
from kvweave.view import LayerView

_SHARED = ("budget", *COMMON)  # options that are the inner method's


@register("quantized", wrapper=True)
@dataclass(frozen=True)
class Quantized(Method):
    """Lets another method decide, and stores what it keeps in few bits.

    Keys are quantised by channel within groups of tokens, values by token within groups of channels; the youngest
    slots stay in full precision, and are packed in whole groups as decoding goes on. The budget is the inner
    method's: it counts entries as if they were not quantised; so are `defer`, `defer_weight` and `redecode`.

    Spelled `quantized:method=flowmm,bits=4,budget=0.2,theta=0.3`: options that are not its own are the method's.
    """

    budget: Budget | None = field(default=None, kw_only=True)  # type: ignore[assignment]  # None: the inner method's
    defer: int | None = field(default=None, kw_only=True)  # type: ignore[assignment]
    redecode: bool | None = field(default=None, kw_only=True)  # type: ignore[assignment]
    method: Method = wrapped(
        Full, allowed="a method that is not quantized", help="what decides", check=lambda m: _decides(m)
    )
    bits: int = one_of(4, *BITS, help="of a stored number")
    group: int = integer(32, minimum=1, help="tokens that share a channel's scale, channels that share a token's")
    residual: int = integer(32, minimum=0, help="youngest slots that stay in full precision, at least")

    def __post_init__(self) -> None:
        inner: Method = Full()
        if _decides(self.method):
            given = {name: getattr(self, name) for name in _SHARED if getattr(self, name) is not None}
            inner = dataclasses.replace(self.method, **given)
            object.__setattr__(self, "method", inner)
        for name in _SHARED:
            object.__setattr__(self, name, getattr(inner, name))
        super().__post_init__()  # says so if the method is none

    @classmethod
    def options(cls) -> list[tuple[str, Option]]:
        return [(name, option) for name, option in super().options() if name not in COMMON]

    @classmethod
    def takes(cls, given: dict[str, Any]) -> dict[str, Option]:
        inner = given.get("method", "full")
        decides = method_class(inner) if isinstance(inner, str) else cls
        return dict(cls.options()) | ({} if issubclass(decides, Quantized) else decides.takes(given))

    @classmethod
    def build(cls, **options: Any) -> "Quantized":
        own = {name: options.pop(name) for name, _ in cls.options() if name in options}
        inner = own.pop("method", "full")
        if cls.name in (inner, inner.get("name") if isinstance(inner, dict) else None):
            raise ValueError(dict(cls.options())["method"].refusal("method", cls.name, cls.name))
        if isinstance(inner, str):
            inner = get_method(inner, **options)
        elif options:
            raise ValueError(f"{', '.join(options)}: not allowed beside a method that is already made")
        return cls(method=method_from_dict(inner) if isinstance(inner, dict) else inner, **own)

    def to_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name, _ in self.options()}
        return {"name": self.name, **own, "method": self.method.to_dict()}

    def spelling(self) -> str:
        own = {f.name: f.default for f in dataclasses.fields(self) if f.name in ("bits", "group", "residual")}
        changed = [f"{key}={getattr(self, key)}" for key, default in own.items() if getattr(self, key) != default]
        inner = self.method.spelling().partition(":")[2]
        return f"{self.name}:" + ",".join([f"method={self.method.name}", *changed, inner])

    # What the inner method says.

    @property
    def storage(self) -> Quantization:
        return Quantization(self.bits, self.group, self.residual)

    @property
    def layer_adaptive(self) -> bool:  # type: ignore[override]
        return self.method.layer_adaptive

    @property
    def uses_modality(self) -> bool:  # type: ignore[override]
        return self.method.uses_modality

    @property
    def plans_rows_alone(self) -> bool:
        return self.method.plans_rows_alone

    @property
    def turns_keys(self) -> bool:
        return self.method.turns_keys

    @property
    def biases_logits(self) -> bool:
        return self.method.biases_logits

    @property
    def decoded_temperature(self) -> float:
        return self.method.decoded_temperature

    @property
    def query_rows(self) -> int:
        return self.method.query_rows

    @property
    def probed_rows(self) -> int:
        return self.method.probed_rows

    def plan(self, view: LayerView, budget: int) -> Plan:
        return self.method.plan(view, budget)

    def layer_budgets(self, budget: int, length: int, layers: int) -> list[int]:
        return self.method.layer_budgets(budget, length, layers)

    def layer_weight(self, view: LayerView) -> Tensor:
        return self.method.layer_weight(view)

    def observe(self, view: LayerView) -> Tensor:
        return self.method.observe(view)

    def allocate(self, weights: list[float], budget: int, length: int) -> list[int]:
        return self.method.allocate(weights, budget, length)


def _decides(method: Any) -> bool:
    return isinstance(method, Method) and not isinstance(method, Quantized)
