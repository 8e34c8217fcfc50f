"""Methods that only tests need; not registered, so that other tests do not list them."""

from dataclasses import dataclass

import torch

from kvweave import LayerView, Method, Plan, SnapKV
from kvweave.methods.needs import Needs
from kvweave.methods.options import integer
from kvweave.ops.select import top_and_recent


@dataclass(frozen=True)
class Heavier(Method):
    """Layer-adaptive: each layer's budget grows with its number, whatever the statistics say; window scores."""

    name = "heavier"
    layer_adaptive = True

    window: int = integer(4, minimum=1, help="last rows that vote")

    @property
    def needs(self) -> Needs:
        return Needs(self.window)

    def layer_weight(self, view: LayerView):
        view.window_attention(self.window)
        return (view.layer + 1.0) * view.keys.new_ones(view.batch)

    def allocate(self, weights, budget, length):
        """Each two layers of neighbouring weight: one gives three entries to the other."""
        order = sorted(range(len(weights)), key=lambda i: weights[i])
        shares = [budget] * len(weights)
        for light, heavy in zip(order[::2], order[1::2], strict=False):
            moved = max(0, min(3, budget - 1, length - budget))
            shares[light] -= moved
            shares[heavy] += moved
        return shares

    def plan(self, view: LayerView, budget: int) -> Plan:
        return Plan(top_and_recent(view.window_attention(self.window), budget, budget // 2))


@dataclass(frozen=True)
class Biased(Method):
    """Keeps the first and the last tokens and adds to each entry's logit a number of its column and head."""

    name = "biased"

    def plan(self, view: LayerView, budget: int) -> Plan:
        first = budget // 2
        slots = torch.cat([torch.arange(first), torch.arange(view.length - (budget - first), view.length)])
        keep = slots.expand(view.batch, view.kv_heads, -1)
        return Plan(keep, bias=self.bias(view.positions.gather(-1, keep)))

    @staticmethod
    def bias(columns: torch.Tensor) -> torch.Tensor:
        """Of columns [batch, kv_heads, n]."""
        head = torch.arange(columns.shape[1])[None, :, None]
        return ((columns * 7 + head * 3) % 5 - 2.0) / 2


HEARD: dict[int, torch.Tensor] = {}  # by layer


@dataclass(frozen=True)
class Listening(SnapKV):
    """Notes in `HEARD` what decoded tokens are said to attend to."""

    name = "listening"

    def plan(self, view: LayerView, budget: int) -> Plan:
        if view.decoded is not None:
            HEARD[view.layer] = view.decoded
        return super().plan(view, budget)
