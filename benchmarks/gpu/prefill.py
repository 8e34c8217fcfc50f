"""What each method adds to a prefill, and what column sums cost beside the attention that they repeat."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import kvweave
from benchmarks import measure
from benchmarks.gpu import clock
from benchmarks.gpu.plan import BUDGET, Plan
from benchmarks.gpu.report import Report
from kvweave.methods.needs import ALL_ROWS
from kvweave.ops.statistics import AttentionRule, column_sums

FIRST = (
    "flashcache",
    "snapkv",
    "weave",
    "streaming_llm",
    "knorm",
    "adakv",
    "pyramidkv",
    "mixkv",
    "h2o",
    "flowmm",
    "lookm",
)
FLASHCACHE = {2048: 1.66, 4096: 3.86, 8192: 6.77}  # milliseconds that its paper adds to a prefill


def visual_part(plan: Plan, length: int) -> Tensor:
    """Text, images, text: bool [1, length]."""
    visual = torch.zeros(1, length, dtype=torch.bool, device=plan.device)
    visual[:, length // 8 : length * 3 // 4] = True
    return visual


def column_sums_beside_attention(plan: Plan, report: Report) -> None:
    """Time of one layer's column sums over the time of its attention."""
    rows: list[list[str]] = []
    columns = ["", "attention ms", "column sums ms", "times attention"]
    note = "One layer, both kinds of rows apart, CUDA graphs; attention is torch's own choice of a kernel."
    for length in plan.prefill:
        queries = plan.normal(1, plan.heads, length, plan.dim)
        keys, values = (plan.normal(1, plan.kv_heads, length, plan.dim) for _ in range(2))
        visual = visual_part(plan, length)
        kinds = torch.stack([~visual, visual], 1)
        rule = AttentionRule(plan.dim**-0.5)

        def attention(q: Tensor = queries, k: Tensor = keys, v: Tensor = values) -> object:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        def sums(q: Tensor = queries, k: Tensor = keys, rule: AttentionRule = rule, kinds: Tensor = kinds) -> object:
            return column_sums(q, k, rule, kinds)

        for run in (attention, sums):
            run()
        runs = {"attention": clock.captured(attention, plan.device), "sums": clock.captured(sums, plan.device)}
        took = clock.seconds(runs, plan.rounds, plan.device)
        ratio = took["sums"] / took["attention"]
        rows.append([f"L={length}", f"{1e3 * took['attention']:.3f}", f"{1e3 * took['sums']:.3f}", f"{ratio:.2f}x"])
        report.table("column_sums", "Column sums beside attention", columns, rows, note)


def methods(plan: Plan, report: Report) -> None:
    """Added latency of each method over all layers, and peak memory above the inputs.

    Those that are looked at first run at all lengths before any other, which time may not suffice for.
    """
    others = [name for name in kvweave.list_methods() if name not in ("full", *FIRST)]
    others.sort(key=lambda name: kvweave.get_method(name, budget=BUDGET).needs.rows == ALL_ROWS)  # light ones first
    cells: dict[str, dict[str, dict[int, str]]] = {
        table: {name: {} for name in (*FIRST, *others)}
        for table in ("prefill_ms", "prefill_alone", "prefill_mib", "prefill_waits")
    }
    slow: set[str] = set()
    for length, chosen in [(length, names) for names in (FIRST, others) for length in plan.prefill]:
        layers = [
            (
                plan.normal(1, plan.heads, length, plan.dim),
                *(plan.normal(1, plan.kv_heads, length, plan.dim) for _ in range(2)),
            )
            for _ in range(plan.layers)
        ]
        visual, rotary = visual_part(plan, length), _rotary(plan, length)
        for name in chosen:
            if name in slow:
                continue
            run = _compression(kvweave.get_method(name, budget=BUDGET), layers, visual, rotary)
            try:
                run()  # warms up
                started = time.perf_counter()
                run()
                measure.synchronize(plan.device)
                took = time.perf_counter() - started
                rounds = min(3, plan.rounds) if took < 0.2 else 1
                if took > plan.patience:
                    slow.add(name)
                alone = clock.seconds({name: run}, rounds, plan.device)[name]
                cells["prefill_alone"][name][length] = f"{1e3 * alone:.2f}"
                cells["prefill_mib"][name][length] = f"{measure.peak_bytes(run, plan.device) / measure.MIB:.0f}"
                if plan.cuda:
                    added = clock.behind_work(run, plan.busy, rounds, plan.device)
                    if length == plan.prefill[0]:
                        cells["prefill_waits"][name][length] = str(clock.waits(run))
                else:
                    added = alone
                cells["prefill_ms"][name][length] = f"{1e3 * added:.2f}"
            except TimeoutError:
                raise
            except Exception as error:
                slow.add(name)
                cells["prefill_ms"][name][length] = type(error).__name__
                report.fail(f"prefill: {name} at {length}", error)
        _tables(plan, report, cells)
        del layers
        clock.freed()


def _tables(plan: Plan, report: Report, cells: dict[str, dict[str, dict[int, str]]]) -> None:
    said = {
        "prefill_ms": (
            "Added prefill latency",
            f"Milliseconds for {plan.layers} layers at budget {BUDGET:g}, called while the device is busy, as in a "
            "prefill: launches do not count, waiting for the device does. FlashCache's paper adds 1.66 / 3.86 / 6.77 "
            "at 2k / 4k / 8k, SnapKV in it 2.53 / 4.95 / 9.57, H2O 3.83 / 10.29 / 27.62.",
        ),
        "prefill_alone": ("The same, alone", "Milliseconds on a device with nothing else to do: launches count."),
        "prefill_waits": ("Waits for the device", f"How often the host waits in {plan.layers} layers."),
        "prefill_mib": (
            "Peak memory",
            f"MiB above the inputs while {plan.layers} layers are compressed one after another, results included.",
        ),
    }
    for table, (title, note) in said.items():
        lengths = plan.prefill[:1] if table == "prefill_waits" else plan.prefill
        columns = ["", *(f"L={n}" for n in lengths)]
        rows = [[name, *(row.get(n, "-") for n in lengths)] for name, row in cells[table].items()]
        report.table(table, title, columns, rows, note)


def _compression(
    method: Any, layers: Sequence[tuple[Tensor, ...]], visual: Tensor, rotary: tuple[Tensor, Tensor]
) -> Callable[[], Any]:
    queries, keys, values = (list(part) for part in zip(*layers, strict=True))
    return lambda: kvweave.compress_tensors(method, queries, keys, values, visual=visual, rotary=rotary)


def _rotary(plan: Plan, length: int) -> tuple[Tensor, Tensor]:
    """Qwen2.5's tables, for methods that turn keys: (cos, sin), [1, length, dim]."""
    rate = 1e6 ** -(torch.arange(0, plan.dim, 2, device=plan.device) / plan.dim)
    angle = torch.arange(length, device=plan.device)[:, None] * rate
    cos, sin = (x.repeat(1, 2)[None] for x in (angle.cos(), angle.sin()))
    return cos, sin
