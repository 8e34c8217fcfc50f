"""Everything that needs a GPU, in one call of under ten minutes: `make gpu`.

1. The statistics, matching and merging on the GPU against float64 on the CPU.
2. What each method adds to the prefill of Qwen2.5-VL-7B (28 layers, 28 heads, 4 KV heads of 128, bfloat16), and its
   peak memory, beside one flash-attention prefill of all layers.
3. Decode by budget: attention of all layers over what is kept, its memory, and the time that reading it takes at
   the bandwidth that a copy reaches.
4. A decoded token through the whole language model (Qwen2.5-VL-7B's shapes, random weights): full cache and 20 %,
   as it is and as a CUDA graph on reserved room, at batch 8 and at the batch that fits.
5. The marks: what is asked, what was measured, met or not.
6. Training steps of the lab per second.

Needs torch, transformers and numpy, nothing else. Without CUDA: one line and exit code 2, or `--device cpu --quick`
to see that it runs. Each part has a time limit, and what is done is written as soon as it is done, so that a run cut
short leaves its results.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

import kvweave
from benchmarks import measure
from kvweave.memory.slots import Slots
from kvweave.methods.base import ALL_ROWS
from kvweave.ops.match import nearest
from kvweave.ops.merge import merge, merge_weights
from kvweave.ops.select import complement
from kvweave.ops.statistics import AttentionRule, column_sums, flow_ratio, window_attention

BUDGETS = (1.0, 0.6, 0.4, 0.2, 0.1, 0.05)
BUDGET = 0.2  # of the methods in the prefill table
FLASHCACHE = {2048: 1.66, 4096: 3.86, 8192: 6.77}  # milliseconds that its paper adds to a prefill
ROOFLINE, FASTER = 0.8, 1.8  # of the bytes kept; than the full cache, end to end
LIMITS = {"checks": 60, "decode": 90, "end to end": 120, "prefill": 210, "training": 60}  # seconds


@dataclass(frozen=True)
class Plan:
    """How much is run."""

    device: torch.device
    dtype: torch.dtype
    heads: int = 28
    kv_heads: int = 4
    dim: int = 128
    layers: int = 28
    sampled: int = 4  # layers that the prefill is measured on; the rest is alike
    prefill: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    decode: tuple[int, ...] = (8192, 32768)
    batches: tuple[int, ...] = (1, 8)
    rounds: int = 5
    checked: int = 1500  # tokens in the numerical checks
    copied: int = 2**31  # bytes of the copy that measures bandwidth
    training: float = 45.0  # seconds
    hidden: int = 3584
    mlp: int = 18944
    vocabulary: int = 152064
    whole: tuple[int, int] = (32768, 8)  # prompt and batch of the end-to-end decode
    steps: int = 24
    patience: float = 4.0  # seconds a round may take; a method slower than that is not run at longer prompts

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)


QUICK = {
    "layers": 2, "sampled": 2, "prefill": (64, 128), "decode": (64,), "batches": (1, 2), "rounds": 2, "checked": 150,
    "copied": 2**20, "training": 0.0, "patience": math.inf,
    "hidden": 64, "mlp": 64, "vocabulary": 128, "whole": (64, 2), "steps": 3,
}  # fmt: skip


@dataclass
class Report:
    """Tables done so far."""

    folder: Path
    facts: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def table(self, name: str, title: str, columns: Sequence[str], rows: list[list[str]], note: str = "") -> None:
        """Keep a table, print it, write everything so far."""
        self.data[name] = [dict(zip(columns, row, strict=True)) for row in rows]
        self.text[name] = f"## {title}\n\n{note}{chr(10) * 2 if note else ''}{measure.markdown_table(columns, rows)}"
        print(self.text[name], flush=True)
        self.write()

    def write(self) -> list[Path]:
        data = {**self.data, "failures": self.failures}
        return measure.write("gpu", self.facts, data, "\n".join(["# On a GPU\n", *self.text.values()]), self.folder)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part that fails, or takes longer than it may, is reported and does not take the others with it."""
        started = time.perf_counter()
        before = signal.signal(signal.SIGALRM, _too_long)
        signal.setitimer(signal.ITIMER_REAL, LIMITS.get(name, 0))
        try:
            yield
        except Exception as error:
            self.failures.append(f"{name}: {type(error).__name__}: {error}")
            self.text[f"{name} failed"] = f"## {name}: failed\n\n{type(error).__name__}: {error}\n"
            print(self.failures[-1], file=sys.stderr, flush=True)
            self.write()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        print(f"[{name}: {time.perf_counter() - started:.1f} s]\n", flush=True)


def _too_long(*_: object) -> None:
    raise TimeoutError("its time is up")


# ------------------------------------------------------------------------------------------- numerical checks


def checks(plan: Plan, report: Report) -> None:
    """Errors of each operation on the device against float64 on the CPU, over the same (rounded) inputs."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for what, error, limit in _errors(plan, dtype):
            verdict = "ok" if error <= limit else "WRONG"
            if error > limit:
                report.failures.append(f"check: {what}, {dtype}: error {error:.2e} > {limit:.0e}")
            rows.append([what, str(dtype).removeprefix("torch."), f"{error:.1e}", f"{limit:.0e}", verdict])
    report.table("checks", "Against float64 on the CPU", ["", "inputs", "error", "allowed", "verdict"], rows)


def _errors(plan: Plan, dtype: torch.dtype) -> Iterator[tuple[str, float, float]]:
    """(operation, largest error relative to the largest value, allowed)."""
    batch, heads, kv_heads, dim, length = 2, 14, 2, 64, plan.checked
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (
        torch.randn(batch, n, length, dim, generator=generator).to(dtype) for n in (heads, kv_heads, kv_heads)
    )
    visual = torch.rand(batch, length, generator=generator) < 0.6
    seen = (torch.rand(batch, 1, length, length, generator=generator) < 0.8).tril()
    seen |= torch.eye(length, dtype=torch.bool)
    sinks = torch.linspace(-1, 3, heads)

    def rule(name: str, device: torch.device) -> AttentionRule:
        plain = AttentionRule(dim**-0.5)
        mask = seen.to(device)
        rules = {
            "causal": plain,
            "mask": replace(plain, mask=lambda start, stop: mask[:, :, start:stop]),
            "softcap": replace(plain, softcap=2.0),
            "sinks": replace(plain, sinks=sinks.to(device)),
        }
        return rules[name]

    def both(compute: Callable[[torch.device, Callable[[Tensor], Tensor]], Tensor]) -> float:
        cpu = torch.device("cpu")
        exact = compute(cpu, lambda x: x.double() if x.is_floating_point() else x)
        fast = compute(plan.device, lambda x: x.to(plan.device)).cpu().double()
        return float((fast - exact).abs().max() / exact.abs().max())

    kinds = torch.stack([~visual, visual], 1)
    for name in ("causal", "mask", "softcap", "sinks"):
        yield (
            f"column sums, {name}",
            both(lambda d, to, name=name: column_sums(to(queries), to(keys), rule(name, d), to(kinds))),
            1e-4,
        )
        yield (
            f"window attention, {name}",
            both(lambda d, to, name=name: window_attention(to(queries), to(keys), rule(name, d), 32)),
            1e-4,
        )

    def flow(device: torch.device, to: Callable[[Tensor], Tensor]) -> Tensor:
        sums = column_sums(to(queries), to(keys), rule("causal", device), to(kinds))
        ratios = flow_ratio(sums, to(visual)[:, None].expand(-1, kv_heads, -1), to(visual))
        return torch.stack([ratios.literal, ratios.balanced, ratios.nosink])

    yield "flow ratio", both(flow), 1e-4

    keep = torch.rand(batch, kv_heads, length, generator=generator).argsort(-1)[..., : length // 5].sort(-1).values
    source = complement(keep, length)
    allowed = torch.rand(batch, kv_heads, 2, keep.shape[-1], generator=generator) < 0.5
    label = visual[:, None].expand(-1, kv_heads, -1).gather(-1, source).long()

    def match(part: int) -> Callable[[torch.device, Callable[[Tensor], Tensor]], Tensor]:
        return lambda _, to: nearest(to(keys), to(source), to(keep), to(allowed), to(label))[part]

    yield "matching: cosines", both(match(1)), 1e-4
    index = [
        nearest(keys.to(d), source.to(d), keep.to(d), allowed.to(d), label.to(d))[0].cpu()
        for d in ("cpu", plan.device)
    ]
    yield "matching: share of other targets", float((index[0] != index[1]).double().mean()), 1e-3
    target, cosine = nearest(keys, source, keep, allowed, label)
    weights = merge_weights("similarity", target, cosine, torch.ones_like(cosine), torch.ones(keep.shape))
    yield (
        "merging",
        both(lambda _, to: merge(to(values), to(keep), to(source), to(target), *map(to, weights))),
        1e-2 if dtype == torch.bfloat16 else 1e-4,
    )


# ------------------------------------------------------------------------------------------- prefill


def prefill(plan: Plan, report: Report, deadline: float) -> None:
    """Added latency of each method over all layers, beside attention itself; peak memory above the inputs."""
    methods = {name: kvweave.get_method(name, budget=BUDGET) for name in kvweave.list_methods() if name != "full"}
    scale = plan.layers / plan.sampled
    times: dict[str, dict[int, str]] = {name: {} for name in ("attention", *methods)}
    peaks: dict[str, dict[int, str]] = {name: {} for name in ("attention", *methods)}
    slow: set[str] = set()
    for length in plan.prefill:
        queries = [plan.normal(1, plan.heads, length, plan.dim) for _ in range(plan.sampled)]
        keys, values = (
            [plan.normal(1, plan.kv_heads, length, plan.dim) for _ in range(plan.sampled)] for _ in range(2)
        )
        visual = torch.zeros(1, length, dtype=torch.bool, device=plan.device)
        visual[:, length // 8 : length * 3 // 4] = True
        rotary = _rotary(plan, length)

        def attention(
            q: Sequence[Tensor] = queries, k: Sequence[Tensor] = keys, v: Sequence[Tensor] = values
        ) -> None:
            for layer in zip(q, k, v, strict=True):
                F.scaled_dot_product_attention(*layer, is_causal=True, enable_gqa=True)

        runs: dict[str, Callable[[], Any]] = {"attention": attention}
        for name, method in methods.items():
            run = _compression(method, queries, keys, values, visual, rotary)
            if name in slow or time.perf_counter() > deadline:
                continue
            try:
                run()  # warms up
                took = measure.interleaved({name: run}, 1, plan.device)[name][0]
            except Exception as error:
                times[name][length] = type(error).__name__
                report.failures.append(f"prefill: {name} at {length}: {type(error).__name__}: {error}")
                slow.add(name)
                continue
            if took > plan.patience:
                slow.add(name)
                times[name][length] = f"{1e3 * took * scale:.0f} (once)"
                continue
            runs[name] = run
        attention()
        seconds = measure.interleaved(runs, plan.rounds, plan.device)
        for name, run in runs.items():
            times[name][length] = f"{1e3 * statistics.median(seconds[name]) * scale:.2f}"
            peaks[name][length] = f"{measure.peak_bytes(run, plan.device) / measure.MIB:.1f}"
        _prefill_tables(plan, report, times, peaks)


def _prefill_tables(
    plan: Plan, report: Report, times: dict[str, dict[int, str]], peaks: dict[str, dict[int, str]]
) -> None:
    columns = ["", *(f"L={n}" for n in plan.prefill)]
    note = (
        f"Milliseconds for {plan.layers} layers, measured on {plan.sampled}, at budget {BUDGET:g}; `attention` is "
        "the prefill's own. Papers' figures at 2k/4k/8k: FlashCache 1.66/3.86/6.77, SnapKV 2.53/4.95/9.57, "
        "H2O 3.83/10.29/27.62."
    )
    rows = [[name, *(times[name].get(n, "-") for n in plan.prefill)] for name in times]
    report.table("prefill_ms", "Added prefill latency", columns, rows, note)
    rows = [[name, *(peaks[name].get(n, "-") for n in plan.prefill)] for name in peaks]
    note = f"MiB above the inputs, while {plan.sampled} layers are compressed one after another, results included."
    report.table("prefill_mib", "Peak memory", columns, rows, note)


def _compression(
    method: Any, queries: list[Tensor], keys: list[Tensor], values: list[Tensor], visual: Tensor, rotary: Any
) -> Callable[[], Any]:
    return lambda: kvweave.compress_tensors(method, queries, keys, values, visual=visual, rotary=rotary)


def _rotary(plan: Plan, length: int) -> tuple[Tensor, Tensor]:
    """Qwen2.5's tables, for methods that turn keys: (cos, sin), [1, length, dim]."""
    rate = 1e6 ** -(torch.arange(0, plan.dim, 2, device=plan.device) / plan.dim)
    angle = torch.arange(length, device=plan.device)[:, None] * rate
    return tuple(x.repeat(1, 2)[None] for x in (angle.cos(), angle.sin()))  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------- decode


def decode(plan: Plan, report: Report) -> None:
    """Attention of one new token over what each budget keeps, all layers; the roofline of the bytes beside it."""
    bandwidth = measure.copy_bandwidth(plan.copied, plan.device)
    report.data["bandwidth"] = bandwidth
    ways = ("GQA", "grouped", "biased", "matmul")
    columns = ["", "KV GiB", *(f"ms, {way}" for way in ways), "ms, roofline", "of roofline", "faster than full"]
    note = (
        f"{plan.layers} layers' attention alone, a token each. GQA: torch's `enable_gqa`; grouped: the query heads "
        "of a KV head as rows of one call, so that each key is read once; biased: the same with a bias on the slots' "
        "logits, as `mass_bias` and reserved room have it; matmul: the same as two products and a softmax. Of "
        f"roofline, and faster: grouped. Roofline: bytes kept over {bandwidth / 1e9:.1f} GB/s, what a copy reaches."
    )
    rows: list[list[str]] = []
    for length in plan.decode:
        for batch in plan.batches:
            full: float | None = None
            for budget in BUDGETS:
                kept = max(1, int(budget * length + 1e-9))
                keys, values = (
                    [plan.normal(batch, plan.kv_heads, kept, plan.dim) for _ in range(plan.layers)] for _ in range(2)
                )
                held = sum(x.numel() * x.element_size() for x in (*keys, *values))
                seconds = _decode_seconds(plan, keys, values, batch)
                ours = seconds["grouped"]
                full = full or ours
                roofline = held / bandwidth
                rows.append(
                    [
                        f"L={length} batch {batch}, {100 * budget:g} %",
                        f"{held / 2**30:.3f}",
                        *(f"{1e3 * seconds[way]:.3f}" for way in ways),
                        f"{1e3 * roofline:.3f}",
                        f"{100 * roofline / ours:.0f} %",
                        f"{full / ours:.2f}x",
                    ]
                )
                del keys, values
            report.table("decode", "Decode", columns, rows, note)


def _decode_seconds(plan: Plan, keys: list[Tensor], values: list[Tensor], batch: int) -> dict[str, float]:
    """Seconds of all layers' attention, by the way it is computed."""
    query = plan.normal(batch, plan.heads, 1, plan.dim)
    grouped = query.view(batch, plan.kv_heads, plan.heads // plan.kv_heads, plan.dim)
    bias = plan.normal(batch, plan.kv_heads, 1, -(-keys[0].shape[2] // 64) * 64)[..., : keys[0].shape[2]]

    def over(attend: Callable[[Tensor, Tensor], object]) -> Callable[[], object]:
        def run() -> None:
            for k, v in zip(keys, values, strict=True):
                attend(k, v)

        return _captured(run, plan.device)

    def matmul(k: Tensor, v: Tensor) -> Tensor:
        logits = grouped @ k.transpose(-1, -2) * plan.dim**-0.5 + bias
        return logits.float().softmax(-1).to(v.dtype) @ v

    sdpa = F.scaled_dot_product_attention
    runs = {
        "GQA": over(lambda k, v: sdpa(query, k, v, enable_gqa=True)),
        "grouped": over(lambda k, v: sdpa(grouped, k, v)),
        "biased": over(lambda k, v: sdpa(grouped, k, v, attn_mask=bias)),
        "matmul": over(matmul),
    }
    for run in runs.values():
        run()
    seconds = measure.interleaved(runs, 2 * plan.rounds + 1, plan.device)
    return {way: statistics.median(took) for way, took in seconds.items()}


def _captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`run` as a CUDA graph, so that launches do not count; as it is on a CPU."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# ------------------------------------------------------------------------------------------- end to end


def end_to_end(plan: Plan, report: Report) -> None:
    """A decoded token through the whole language model, over a full cache and over what a budget keeps of it."""
    model = _language_model(plan)
    length, batch = plan.whole
    entry = 2 * plan.layers * plan.kv_heads * plan.dim * 2
    rows: list[list[str]] = []
    columns = ["", "batch", "KV GiB", "ms a step", "tokens/s", "faster"]
    note = (
        f"{plan.layers} layers of hidden size {plan.hidden}, random weights, prompts of {length} tokens. Graph: a "
        "captured CUDA graph (on a CPU: not captured). Faster: than transformers' cache run the same way. On a GPU "
        "the last rows hold as many prompts as fit."
    )
    slow: dict[bool, float] = {}
    for graph in (False, True):
        for budget in (1.0, BUDGET):
            milliseconds = 1e3 * _step_seconds(plan, model, batch, budget, graph=graph)
            slow.setdefault(graph, milliseconds)
            kept = int(budget * length)
            what = f"{'full' if budget == 1 else f'{100 * budget:g} %'}, {'graph' if graph else 'eager'}"
            gib = f"{kept * batch * entry / 2**30:.2f}"
            faster = f"{slow[graph] / milliseconds:.2f}x"
            rows.append([what, str(batch), gib, f"{milliseconds:.2f}", f"{1e3 * batch / milliseconds:.0f}", faster])
            report.table("end_to_end", "End to end", columns, rows, note)
    if plan.device.type != "cuda":
        return
    for budget in (1.0, BUDGET):
        kept = int(budget * length)
        torch.cuda.empty_cache()
        fits = 0.8 * torch.cuda.mem_get_info(plan.device)[0] / (kept * entry)  # room is made by copying a layer
        most = min(256, 2 ** int(math.log2(fits)))
        milliseconds = 1e3 * _step_seconds(plan, model, most, budget, graph=False)
        gib = f"{kept * most * entry / 2**30:.2f}"
        what = f"{'full' if budget == 1 else f'{100 * budget:g} %'}, batch that fits"
        rows.append([what, str(most), gib, f"{milliseconds:.2f}", f"{1e3 * most / milliseconds:.0f}", ""])
        report.table("end_to_end", "End to end", columns, rows, note)


def _language_model(plan: Plan) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        hidden_size=plan.hidden,
        intermediate_size=plan.mlp,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.kv_heads,
        head_dim=plan.dim,
        vocab_size=plan.vocabulary,
        max_position_embeddings=plan.whole[0] + 1024,
    )
    with plan.device:
        before = torch.get_default_dtype()
        torch.set_default_dtype(plan.dtype)
        try:
            return Qwen2ForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)


def _step_seconds(plan: Plan, model: Qwen2ForCausalLM, batch: int, budget: float, *, graph: bool) -> float:
    """Median seconds of a decode step; the full cache is transformers' own, with its own attention."""
    length = plan.whole[0]
    kept = max(1, int(budget * length))
    ids = torch.zeros(batch, 1, dtype=torch.long, device=plan.device)
    position = torch.full((batch, 1), length, device=plan.device)
    shape = batch, plan.kv_heads, kept, plan.dim
    if budget == 1:
        full = DynamicCache(config=model.config)
        for layer in range(plan.layers):
            full.update(plan.normal(*shape), plan.normal(*shape), layer)
        return _timed_step(plan, lambda: model(ids, past_key_values=full, position_ids=position), graph)
    cache = kvweave.CompressedCache(model.config, kvweave.get_method("snapkv", budget=budget))
    columns = torch.arange(length - kept, length, device=plan.device).expand(shape[:3])
    nothing = torch.zeros(batch, length, dtype=torch.bool, device=plan.device)
    cache.conversation.prompt = kvweave.Prompt(nothing, ~nothing)
    cache.conversation.end = length
    for one in cache.compressed_layers:
        one.blocks = [Slots(plan.normal(*shape), plan.normal(*shape), columns, torch.ones(shape[:3]).to(plan.device))]
        one.seen = length
        one.lazy_initialization(one.blocks[0].keys, one.blocks[0].values)  # type: ignore[union-attr]
    handle = kvweave.attach(model)
    try:
        if graph:
            cache.reserve(2 * plan.steps + 8)
        return _timed_step(plan, lambda: model(ids, past_key_values=cache, position_ids=position), graph)
    finally:
        handle.detach()


def _timed_step(plan: Plan, step: Callable[[], object], graph: bool) -> float:
    for _ in range(2):
        step()
    run = _captured(step, plan.device) if graph else step
    return statistics.median(measure.interleaved({"step": run}, plan.steps, plan.device)["step"])


# ------------------------------------------------------------------------------------------- marks


def marks(plan: Plan, report: Report) -> None:
    """What the project asks of itself, and what was measured here."""
    rows: list[list[str]] = []

    def judge(mark: str, measured: float, limit: float, unit: str, *, below: bool) -> None:
        met = measured <= limit if below else measured >= limit
        rows.append([mark, f"{measured:.2f}{unit}", "met" if met else "not met"])

    for row in report.data.get("prefill_ms", []):
        name = row[""]
        if name == "attention" or kvweave.get_method(name, budget=BUDGET).query_rows == ALL_ROWS:
            continue
        for length, limit in FLASHCACHE.items():
            took = row.get(f"L={length}", "-").split()[0]
            if took[0].isdigit():
                judge(f"{name} adds <= {limit} ms at {length}", float(took), limit, " ms", below=True)
    for row in report.data.get("decode", []):
        share = float(row["of roofline"].split()[0]) / 100
        judge(f"decode >= {ROOFLINE:.0%} of roofline, {row['']}", share, ROOFLINE, "", below=False)
    for row in report.data.get("end_to_end", []):
        if row[""].startswith(f"{100 * BUDGET:g} %") and row["faster"]:
            what = f"{row['']}, L={plan.whole[0]} batch {row['batch']}"
            judge(f"end to end >= {FASTER}x, {what}", float(row["faster"][:-1]), FASTER, "x", below=False)
    report.table("marks", "Marks", ["mark", "measured", ""], rows)


# ------------------------------------------------------------------------------------------- the lab


def training(plan: Plan, report: Report) -> None:
    """Training steps of the lab per second, its first stage as it is."""
    try:
        from kvweave.lab.train import CURRICULUM, Trainer
    except ImportError as error:
        report.text["training"] = f"## Training the lab\n\nNot run: {error}\n"
        return
    first = CURRICULUM[0] if plan.training else replace(CURRICULUM[0], tokens=1)
    warm = 3 if plan.training else 0
    with torch.inference_mode(False), torch.enable_grad():
        trainer = Trainer(0, (first,), plan.device, compiled=False)
        for _ in range(warm):
            trainer.advance()
        measure.synchronize(plan.device)
        started, steps = time.perf_counter(), 0
        while steps < 1 or time.perf_counter() - started < plan.training:
            trainer.advance()
            steps += 1
        measure.synchronize(plan.device)
        rate = steps / (time.perf_counter() - started)
        trainer.close()
    rows = [[f"{first.tokens} tokens a step", f"{rate:.2f}", f"{rate * first.tokens:.0f}"]]
    report.table("training", "Training the lab", ["", "steps/s", "tokens/s"], rows, "The first stage, not compiled.")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to see that it runs")
    parser.add_argument("--quick", action="store_true", help="everything small")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no further method is measured")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or measure.RESULTS), help="folder")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu needs CUDA, and torch finds none here: --device cpu --quick shows that it runs")
        return 2

    if device.type == "cpu":
        torch.set_num_threads(1)
    deadline = time.perf_counter() + 60 * options.minutes
    plan = Plan(device, torch.bfloat16, **(QUICK if options.quick else {}))
    report = Report(options.out, measure.machine(device))
    with torch.inference_mode():
        with report.part("checks"):
            checks(plan, report)
        with report.part("decode"):
            decode(plan, report)
        with report.part("end to end"):
            end_to_end(plan, report)
        with report.part("prefill"):
            prefill(plan, report, deadline - 60 - plan.training)
        with report.part("marks"):
            marks(plan, report)
        if time.perf_counter() + plan.training < deadline:
            with report.part("training"):
                training(plan, report)
    for path in report.write():
        print(f"wrote {path}")
    for failure in report.failures:
        print(failure, file=sys.stderr)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
