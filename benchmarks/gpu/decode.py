"""Attention of one new token over what each budget keeps, beside the time that reading it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import measure
from benchmarks.gpu import clock
from benchmarks.gpu.plan import BUDGET, BUDGETS, Case, Plan
from benchmarks.gpu.report import Report
from kvweave.memory.attend import attend
from kvweave.memory.heads import attend_uneven
from kvweave.memory.packed import PackedSlots, packed
from kvweave.memory.slots import Slots
from kvweave.ops.quantize import Quantization

#: Shares of the mean count that heads keep where they keep different counts.
UNEVEN = 0.4, 0.8, 1.2, 1.6
BITS = 8, 4, 2

_PLAIN, _BIASED = "kvweave", "kvweave, biased"


def decode(plan: Plan, report: Report) -> None:
    """All layers' attention by budget, in CUDA graphs."""
    bandwidth = measure.copy_bandwidth(plan.copied, plan.device)
    report.data["bandwidth"] = bandwidth
    ways = (_PLAIN, _BIASED, "torch, grouped", "torch, grouped, biased", "torch, GQA")
    columns = ["", "KV GiB", "ms, roofline", *(f"ms, {way}" for way in ways), "of roofline", "biased", "faster"]
    note = (
        f"{plan.layers} layers' attention alone, a token each, CUDA graphs; as many layers take turns as hold more "
        "than the chip's caches. Biased: with a bias on the slots' logits, as `mass_bias` and reserved room have it. "
        "Grouped: the query heads of a KV head as rows of torch's call; GQA: torch's `enable_gqa`. Of roofline, and "
        f"faster than the full cache: kvweave. Roofline: bytes kept over {bandwidth / 1e9:.0f} GB/s, a copy's."
    )
    rows: list[list[str]] = []
    for case in plan.decode:
        full: float | None = None
        for budget in BUDGETS:
            kept = max(1, int(budget * case.length + 1e-9))
            layers = [_slots(plan, case.batch, kept) for _ in range(_count(plan, case, kept))]
            held = plan.entry * kept * case.batch
            took = {way: s * plan.layers / len(layers) for way, s in _ways(plan, layers, case.batch).items()}
            full = full or took[_PLAIN]
            roofline = held / bandwidth
            rows.append(
                [
                    f"{case}, {100 * budget:g} %",
                    f"{held / 2**30:.3f}",
                    f"{1e3 * roofline:.3f}",
                    *(f"{1e3 * took[way]:.3f}" for way in ways),
                    f"{100 * roofline / took[_PLAIN]:.0f} %",
                    f"{100 * roofline / took[_BIASED]:.0f} %",
                    f"{full / took[_PLAIN]:.2f}x",
                ]
            )
            del layers
            report.table("decode", "Decode: attention over kept slots", columns, rows, note)
    clock.freed()


def _count(plan: Plan, case: Case, kept: int) -> int:
    """Layers that are measured: those of the model, and more where a chip's cache would hold them."""
    one = plan.entry // plan.layers * kept * case.batch
    return min(512, max(plan.layers, -(-plan.cold // one)))


def _slots(plan: Plan, batch: int, kept: int, kv_heads: int | None = None) -> Slots:
    shape = batch, kv_heads or plan.kv_heads, kept, plan.dim
    columns = torch.arange(kept, device=plan.device).expand(shape[:3])
    return Slots(plan.normal(*shape), plan.normal(*shape), columns, torch.ones(shape[:3], device=plan.device))


def _grown(plan: Plan, batch: int, kept: int) -> Slots:
    """Slots of one head in a buffer with room, as decoding leaves them."""
    token = [plan.normal(batch, 1, 1, plan.dim) for _ in range(2)]
    grown = _slots(plan, batch, kept - 1, 1).append(token[0], token[1], kept - 1)
    assert isinstance(grown, Slots)
    return grown


def _ways(plan: Plan, layers: Sequence[Slots], batch: int) -> dict[str, float]:
    """Seconds of all layers' attention, by the way it is computed."""
    query = plan.normal(batch, plan.heads, 1, plan.dim)
    grouped = query.view(batch, plan.kv_heads, plan.heads // plan.kv_heads, plan.dim)
    count = layers[0].count
    bias = plan.normal(batch, plan.kv_heads, 1, -(-count // 64) * 64)[..., :count]
    sdpa = F.scaled_dot_product_attention
    return _timed(
        plan,
        layers,
        {
            _PLAIN: lambda s: attend(query, s.keys, s.values, None, None),
            _BIASED: lambda s: attend(query, s.keys, s.values, bias, None),
            "torch, grouped": lambda s: sdpa(grouped, s.keys, s.values),
            "torch, grouped, biased": lambda s: sdpa(grouped, s.keys, s.values, attn_mask=bias),
            "torch, GQA": lambda s: sdpa(query, s.keys, s.values, enable_gqa=True),
        },
    )


def _timed(plan: Plan, layers: Sequence[Slots], ways: dict[str, Callable[[Slots], object]]) -> dict[str, float]:
    def over(attend: Callable[[Slots], object]) -> Callable[[], object]:
        def run() -> None:
            for slots in layers:
                attend(slots)

        return clock.captured(run, plan.device)

    return clock.seconds({way: over(attend) for way, attend in ways.items()}, plan.rounds, plan.device)


def stored_otherwise(plan: Plan, report: Report) -> None:
    """Heads of different counts, and slots in few bits, at the budget of the other tables."""
    columns = ["", "KV GiB", "ms", "ms, roofline", "of roofline", "times 16 bits"]
    note = (
        f"{plan.layers} layers' attention alone at budget {BUDGET:g}, CUDA graphs. Uneven heads keep "
        f"{', '.join(f'{x:g}' for x in UNEVEN)} times the mean. Few bits: groups of 32, the youngest 32 slots in "
        "full precision."
    )
    rows: list[list[str]] = []
    bandwidth = report.data["bandwidth"]
    for case in plan.decode:
        kept = max(64, int(BUDGET * case.length))
        count = _count(plan, case, kept)
        scale = plan.layers / count
        query = plan.normal(case.batch, plan.heads, 1, plan.dim)
        even = [_slots(plan, case.batch, kept) for _ in range(count)]
        plain = _timed(plan, even, {"": lambda s, q=query: attend(q, s.keys, s.values, None, None)})[""]  # type: ignore

        def add(what: str, seconds: float, held: int, scale: float, case: Case = case, plain: float = plain) -> None:
            roofline = held * scale / bandwidth
            rows.append(
                [
                    f"{case}, {what}",
                    f"{held * scale / 2**30:.3f}",
                    f"{1e3 * seconds * scale:.3f}",
                    f"{1e3 * roofline:.3f}",
                    f"{100 * roofline / (seconds * scale):.0f} %",
                    f"{seconds / plain:.2f}x",
                ]
            )
            report.table("stored", "Decode: uneven heads, few bits", columns, rows, note)

        add("16 bits", plain, sum(s.nbytes for s in even), scale)
        blocks = [[_grown(plan, case.batch, int(x * kept)) for x in UNEVEN] for _ in range(count)]
        add("uneven heads", _uneven(plan, blocks, query), sum(s.nbytes for heads in blocks for s in heads), scale)
        del blocks
        for bits in BITS:
            few = [packed(slots, Quantization(bits, 32, 32)) for slots in even]
            add(f"{bits} bits", _few_bits(plan, few, query), sum(s.nbytes for s in few), scale)
            del few
        del even
        clock.freed()


def _uneven(plan: Plan, blocks: Sequence[Sequence[Slots]], query: Tensor) -> float:
    parts = query.split(plan.heads // plan.kv_heads, 1)

    def run() -> None:
        for heads in blocks:
            if attend_uneven(query, heads, None) is None:
                for part, slots in zip(parts, heads, strict=True):
                    attend(part, slots.keys, slots.values, None, None)

    return clock.seconds({"": clock.captured(run, plan.device)}, plan.rounds, plan.device)[""]


def _few_bits(plan: Plan, layers: Sequence[Slots | PackedSlots], query: Tensor) -> float:
    def run() -> None:
        for slots in layers:
            assert isinstance(slots, PackedSlots)
            slots.attend(query, None, None)

    return clock.seconds({"": clock.captured(run, plan.device)}, plan.rounds, plan.device)[""]
