"""GRKV: the values of what a method keeps, regressed on what the rows saw of the whole prompt (2605.31105;
SPEC 17.4)."""

from dataclasses import dataclass

import torch

from kvweave.methods.base import Method
from kvweave.methods.entries import cap_option, fitted, ridge_option, rows_option
from kvweave.methods.needs import Needs
from kvweave.methods.options import flag, integer, wrapped
from kvweave.methods.quantized import Quantized
from kvweave.methods.registry import register
from kvweave.methods.snapkv import SnapKV
from kvweave.methods.wrapping import Wrapper
from kvweave.ops.fit import Settings
from kvweave.plan import Plan
from kvweave.view import LayerView


@register("regress", wrapper=True)
@dataclass(frozen=True)
class Regress(Wrapper):
    """Fits the values of any method's entries by ridge regression on the last rows and those that were decoded or
    probed.

    Keys, positions and biases stay the method's. The last tokens are never changed. With a gate a head is fitted only
    if that helps rows that were held out.
    """

    source = "2605.31105"

    method: Method = wrapped(SnapKV, help="what decides")
    rows: int = rows_option()
    fixed: int = integer(32, minimum=0, help="last tokens whose values stay, at most half of the budget")
    ridge: float = ridge_option()
    cap: float | None = cap_option(0.1)
    gate: bool = flag(True, help="fit a head only if its error on rows held out falls")

    @classmethod
    def accepts(cls, method: Method) -> bool:
        return isinstance(method, Method) and not isinstance(method, Quantized)

    @property
    def needs(self) -> Needs:
        return super().needs.with_reference(self.rows)

    def plan(self, view: LayerView, budget: int) -> Plan:
        return self.fitted(view, super().plan(view, budget), view.mean_budget or budget)

    def plan_heads(self, view: LayerView, counts: tuple[int, ...]) -> Plan:
        return self.fitted(view, super().plan_heads(view, counts), view.mean_budget)

    def fitted(self, view: LayerView, plan: Plan, budget: int) -> Plan:
        """The plan with fitted values."""
        last = view.length - min(self.fixed, budget // 2)
        mutable = torch.arange(view.length, device=view.keys.device) < last
        rows, settings = view.reference_rows(self.rows), Settings(self.ridge, self.cap)
        return fitted(view, plan, rows, mutable, ("none", "values"), settings, gate=self.gate)
