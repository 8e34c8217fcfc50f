"""The kernels on the device: their tests, and each operation's error against float64 on the CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.plan import LIMITS, Plan
from benchmarks.gpu.report import Report
from kvweave.memory.attend import attend
from kvweave.memory.heads import attend_uneven
from kvweave.memory.packed import PackedSlots, packed
from kvweave.memory.slots import Slots
from kvweave.ops.match import nearest
from kvweave.ops.merge import merge, merge_weights
from kvweave.ops.quantize import Quantization
from kvweave.ops.select import complement
from kvweave.ops.statistics import AttentionRule, column_sums, flow_ratio, window_attention

ROOT = Path(__file__).parents[2]
ON_CPU = 500  # tokens
TESTS = "tests/kernels"

Move = Callable[[Tensor], Tensor]


def tests(report: Report) -> None:
    """The kernels' own tests, in a process of their own."""
    if importlib.util.find_spec("pytest") is None:
        report.data["tests"] = "pytest is not installed"
        return
    spread = ["-n", "8"] if importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= 8 else []
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *spread, TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMITS["tests"] - 5)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    report.data["tests"] = lines[-1] if lines else done.stderr[-500:]
    report.text["tests"] = f"## Tests of the kernels\n\n{TESTS}: {report.data['tests']}\n"
    if done.returncode:
        report.failures.append(f"tests: exit code {done.returncode}\n{done.stdout[-6000:]}{done.stderr[-2000:]}")
        print(report.failures[-1], file=sys.stderr, flush=True)
    report.write()


def errors(plan: Plan, report: Report) -> None:
    """Errors of each operation on the device against torch in float64, over the same (rounded) inputs."""
    rows: list[list[str]] = []
    note = (
        "Largest error over the largest value, shapes as batch, heads, KV heads, channels, tokens. Float64: torch's, "
        f"on the CPU up to {ON_CPU} tokens, above on the device."
    )
    for shape in plan.checked:
        for dtype in (torch.float32, torch.bfloat16):
            for what, error, limit in _errors(plan, shape, dtype):
                good = error <= limit  # not a number is not good
                if not good:
                    report.failures.append(f"check: {what}, {shape}, {dtype}: error {error:.2e} > {limit:.0e}")
                verdict = "ok" if good else "WRONG"
                name = str(dtype).removeprefix("torch.")
                rows.append([what, " ".join(map(str, shape)), name, f"{error:.1e}", f"{limit:.0e}", verdict])
        columns = ["", "shape", "inputs", "error", "allowed", "verdict"]
        report.table("checks", "Against float64", columns, rows, note)


def _errors(
    plan: Plan, shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> Iterator[tuple[str, float, float]]:
    """(operation, largest error relative to the largest value, allowed)."""
    batch, heads, kv_heads, dim, length = shape
    generator = torch.Generator().manual_seed(length)
    queries, keys, values = (
        torch.randn(batch, n, length, dim, generator=generator).to(dtype) for n in (heads, kv_heads, kv_heads)
    )
    visual = torch.rand(batch, length, generator=generator) < 0.6
    kinds = torch.stack([~visual, visual], 1)
    sinks = torch.linspace(-1, 3, heads)
    home = torch.device("cpu") if length <= ON_CPU else plan.device

    def wide(x: Tensor) -> Tensor:
        return x.to(home, torch.float64 if x.is_floating_point() else x.dtype)

    def both(compute: Callable[[torch.device, Move], Tensor]) -> float:
        exact = compute(home, wide)
        fast = compute(plan.device, lambda x: x.to(plan.device)).to(home, torch.float64)
        return float((fast - exact).abs().max() / exact.abs().max())

    plain = AttentionRule(dim**-0.5)
    rules: dict[str, Callable[[torch.device], AttentionRule]] = {"causal": lambda _: plain}
    if length < 2000:
        seen = (torch.rand(batch, 1, length, length, generator=generator) < 0.8).tril()
        seen |= torch.eye(length, dtype=torch.bool)

        def masked(device: torch.device) -> AttentionRule:
            mask = seen.to(device)
            return replace(plain, mask=lambda start, stop: mask[:, :, start:stop])

        rules["mask"] = masked
        rules["softcap"] = lambda _: replace(plain, softcap=2.0)
        rules["sinks"] = lambda device: replace(plain, sinks=sinks.to(device))
    for name, rule in rules.items():
        yield (
            f"column sums, {name}",
            both(lambda d, to, rule=rule: column_sums(to(queries), to(keys), rule(d), to(kinds))),  # type: ignore
            1e-4,
        )
        yield (
            f"window attention, {name}",
            both(lambda d, to, rule=rule: window_attention(to(queries), to(keys), rule(d), 32)),  # type: ignore
            1e-4,
        )

    def flow(device: torch.device, to: Move) -> Tensor:
        sums = column_sums(to(queries), to(keys), plain, to(kinds))
        ratios = flow_ratio(sums, to(visual)[:, None].expand(-1, kv_heads, -1), to(visual))
        return torch.stack([ratios.literal, ratios.balanced, ratios.nosink])

    yield "flow ratio", both(flow), 1e-4

    keep = torch.rand(batch, kv_heads, length, generator=generator).argsort(-1)[..., : length // 5].sort(-1).values
    source = complement(keep, length)
    allowed = torch.rand(batch, kv_heads, 2, keep.shape[-1], generator=generator) < 0.5
    label = visual[:, None].expand(-1, kv_heads, -1).gather(-1, source).long()

    def match(_: torch.device, to: Move) -> Tensor:
        return nearest(to(keys), to(source), to(keep), to(allowed), to(label))[1]

    yield "matching: cosines", both(match), 1e-4
    target, cosine = (x.cpu() for x in nearest(*map(wide, (keys, source, keep, allowed, label))))
    cosine = cosine.float()
    found = nearest(*(x.to(plan.device) for x in (keys, source, keep, allowed, label)))[0].cpu()
    yield "matching: share of other targets", float((found != target).double().mean()), 1e-3
    weights = merge_weights("similarity", target, cosine, torch.ones_like(cosine), torch.ones(keep.shape))
    loose = 1e-2 if dtype == torch.bfloat16 else 1e-4
    yield (
        "merging",
        both(lambda _, to: merge(to(values), to(keep), to(source), to(target), *map(to, weights))),
        loose,
    )
    yield from _attention(plan, queries[:, :, -1:], keys, values, generator, loose)


def _attention(
    plan: Plan, query: Tensor, keys: Tensor, values: Tensor, generator: torch.Generator, limit: float
) -> Iterator[tuple[str, float, float]]:
    """One token's attention as decoding calls it: biased or not, heads of different counts, slots in few bits."""
    device, (batch, kv_heads, length, dim) = plan.device, keys.shape
    bias = torch.randn(batch, kv_heads, length, generator=generator).to(keys.dtype)
    bias[:, :, ::3] = torch.finfo(keys.dtype).min

    def exact(keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        rows = query.double().view(batch, kv_heads, -1, dim)
        mask = None if mask is None else mask.double()
        return F.scaled_dot_product_attention(rows, keys.double(), values.double(), mask).view(batch, -1, dim)

    def error(fast: Tensor, wanted: Tensor) -> float:
        return float((fast[:, 0].cpu().double() - wanted).abs().max() / wanted.abs().max())

    moved = [x.to(device) for x in (query, keys, values)]
    yield "attention of a token", error(attend(*moved, None, None), exact(keys, values)), limit
    fast = attend(*moved, bias[:, :, None].to(device), None)
    yield "attention of a token, biased", error(fast, exact(keys, values, bias[:, :, None])), limit

    counts = [length - 1 - 13 * head for head in range(kv_heads)]
    blocks = []
    for head, count in enumerate(counts):
        part = [x[:, head : head + 1] for x in moved[1:]]
        slots = Slots(part[0][:, :, :count], part[1][:, :, :count])
        blocks.append(slots.append(part[0][:, :, count : count + 1], part[1][:, :, count : count + 1], count))
    together = attend_uneven(moved[0], blocks, None)
    if together is not None:
        hidden = torch.arange(length) > torch.tensor(counts)[:, None, None]
        mask = torch.zeros(1, kv_heads, 1, length).masked_fill(hidden, -torch.inf)
        yield "attention of a token, uneven heads", error(together, exact(keys, values, mask)), limit

    for bits in (8, 4, 2):
        few = packed(Slots(moved[1], moved[2]), Quantization(bits, 32, 32))
        assert isinstance(few, PackedSlots)
        numbers = [
            replace(x, scale=x.scale.double(), zero=x.zero.double()).unpacked() for x in (few.keys, few.values)
        ]
        parts = numbers[0].flatten(2, 3), numbers[1].flatten(3)
        rest = few.rest.keys, few.rest.values
        whole = [torch.cat([old, young.double()], 2).cpu() for old, young in zip(parts, rest, strict=True)]
        # numbers of few bits are rounded once more
        yield (
            f"attention of a token, {bits} bits",
            error(few.attend(moved[0], None, None), exact(*whole)),
            2 * limit,
        )
