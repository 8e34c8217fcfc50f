"""The whole language model with random weights: decoded tokens per second, prefill, memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

import kvweave
from benchmarks import measure
from benchmarks.gpu import clock
from benchmarks.gpu.decode import UNEVEN
from benchmarks.gpu.plan import BUDGET, BUDGETS, Case, Plan
from benchmarks.gpu.report import Report
from kvweave.memory.heads import block_of
from kvweave.memory.packed import packed
from kvweave.memory.slots import Slots
from kvweave.ops.quantize import Quantization

#: Of the prefill through the whole model; the other methods are measured on their own.
METHODS = (
    "flashcache",
    "snapkv",
    "streaming_llm",
    "adakv",
    "mixkv",
    "weave",
    "weave:form=even,defer=0",
    "h2o",
    "flowmm",
)
FULL = "full"


@dataclass(frozen=True)
class Setting:
    """How a decode is run: what the cache holds of a prompt, how, and whether the step is a CUDA graph."""

    budget: float
    kind: str  # "transformers": its DynamicCache; "slots", "uneven", "4 bits": kvweave's
    graph: bool

    def __str__(self) -> str:
        how = {"transformers": ", transformers' cache", "slots": ""}.get(self.kind, f", {self.kind}")
        return f"{100 * self.budget:g} %{how}, {'graph' if self.graph else 'eager'}"


GRAPHS = tuple(Setting(budget, "slots", True) for budget in BUDGETS)
OTHERS = (
    Setting(1.0, "transformers", False),
    Setting(BUDGET, "slots", False),
    Setting(BUDGET, "uneven", True),
    Setting(BUDGET, "4 bits", False),
)


def language_model(plan: Plan) -> Qwen2ForCausalLM:
    """Qwen2.5-VL's decoder, its weights random."""
    config = Qwen2Config(
        hidden_size=plan.hidden,
        intermediate_size=plan.mlp,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.kv_heads,
        head_dim=plan.dim,
        vocab_size=plan.vocabulary,
        max_position_embeddings=max(case.length for case in plan.whole) + 1024,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(plan.dtype)
    try:
        with plan.device:
            return Qwen2ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


# ------------------------------------------------------------------------------------------- decode


def end_to_end(plan: Plan, report: Report, model: Qwen2ForCausalLM) -> None:
    """A decoded token through the whole model, over a full cache and over what a budget keeps of it."""
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    read = weights - model.get_input_embeddings().weight.numel() * plan.dtype.itemsize  # of those a row is looked up
    bandwidth = report.data.get("bandwidth") or measure.copy_bandwidth(plan.copied, plan.device)
    columns = ["", "KV GiB", "ms a step", "tokens/s", "ms, roofline", "faster", "bandwidth allows", "of that"]
    note = (
        f"{plan.layers} layers of hidden size {plan.hidden} with random weights ({weights / 2**30:.1f} GiB), "
        "over caches of random tensors; prompt length x batch. Graph: a captured CUDA graph over reserved room (on a "
        "CPU not captured). Faster: than the full cache, in a graph against the full cache in a graph, without one "
        "against transformers' own. Roofline, and what bandwidth allows: weights (without the input embedding) and "
        f"cache read once at {bandwidth / 1e9:.0f} GB/s."
    )
    rows: list[list[str]] = []
    for case in plan.whole:
        full: dict[bool, float] = {}
        for setting in (*GRAPHS, *OTHERS):
            if not _worth(plan, case, setting):
                continue
            held = plan.entry * int(setting.budget * case.length) * case.batch
            if setting.kind == "4 bits":
                held = held * 9 // 32  # 4 bits of 16, and a scale and a zero for 32 numbers
            whole = plan.entry * case.length * case.batch
            clock.freed()
            if not _fits(plan, held, setting):
                rows.append([f"{case}, {setting}", f"{held / 2**30:.2f}", "does not fit", *["-"] * 5])
                continue
            try:
                seconds = _step_seconds(plan, model, case, setting)
            except TimeoutError:
                raise
            except Exception as error:
                report.fail(f"end to end: {case}, {setting}", error)
                continue
            if setting.budget == 1:
                full[setting.graph] = seconds
            faster = full[setting.graph] / seconds if setting.graph in full else math.nan
            allowed = (read + whole) / (read + held)
            rows.append(
                [
                    f"{case}, {setting}",
                    f"{held / 2**30:.2f}",
                    f"{1e3 * seconds:.2f}",
                    f"{case.batch / seconds:.0f}",
                    f"{1e3 * (read + held) / bandwidth:.2f}",
                    f"{faster:.2f}x",
                    f"{allowed:.2f}x",
                    f"{100 * faster / allowed:.0f} %",
                ]
            )
            report.table("end_to_end", "End to end", columns, rows, note)


def _worth(plan: Plan, case: Case, setting: Setting) -> bool:
    """The large cases show the graphs alone: transformers' cache is copied at each step."""
    return setting in GRAPHS or case.length * case.batch <= 8 * plan.whole[0].length


def _fits(plan: Plan, held: int, setting: Setting) -> bool:
    """Known before anything is allocated; what is packed or copied lies there twice for a moment."""
    if not plan.cuda:
        return True
    return int(held * (1.1 if setting.graph else 2.2)) + 2**31 < torch.cuda.mem_get_info(plan.device)[0]


def _step_seconds(plan: Plan, model: Qwen2ForCausalLM, case: Case, setting: Setting) -> float:
    """Median seconds of a decode step."""
    kept = max(1, int(setting.budget * case.length))
    ids = torch.zeros(case.batch, 1, dtype=torch.long, device=plan.device)
    position = torch.full((case.batch, 1), case.length, device=plan.device)
    shape = case.batch, plan.kv_heads, kept, plan.dim
    if setting.kind == "transformers":
        full = DynamicCache(config=model.config)
        for layer in range(plan.layers):
            full.update(plan.normal(*shape), plan.normal(*shape), layer)
        return _timed(plan, lambda: model(ids, past_key_values=full, position_ids=position), setting.graph)
    cache = _filled(plan, model, case, kept, setting)
    handle = kvweave.attach(model)
    try:
        return _timed(plan, lambda: model(ids, past_key_values=cache, position_ids=position), setting.graph)
    finally:
        handle.detach()


def _filled(plan: Plan, model: Qwen2ForCausalLM, case: Case, kept: int, setting: Setting) -> kvweave.CompressedCache:
    """A compressed cache of random slots, as after a prompt."""
    cache = kvweave.CompressedCache(model.config, kvweave.get_method("snapkv", budget=setting.budget))
    nothing = torch.zeros(case.batch, case.length, dtype=torch.bool, device=plan.device)
    cache.shared.turn.begin(kvweave.Prompt(nothing, ~nothing), case.length, 0)
    for layer in cache.compressed_layers:
        shares = UNEVEN if setting.kind == "uneven" else (1.0,)
        heads = plan.kv_heads // len(shares)
        blocks = [_block(plan, case, max(1, int(share * kept)), heads) for share in shares]
        layer.lazy_initialization(blocks[0].keys, blocks[0].values)
        few = setting.kind == "4 bits"
        layer.hold(
            block_of([packed(block, Quantization(4, 32, 32)) for block in blocks] if few else blocks), case.length
        )
        if setting.graph:
            layer.reserve(4 * plan.steps)  # a layer at a time: its slots are copied
    return cache


def _block(plan: Plan, case: Case, kept: int, heads: int) -> Slots:
    shape = case.batch, heads, kept, plan.dim
    columns = torch.arange(case.length - kept, case.length, device=plan.device).expand(shape[:3])
    return Slots(plan.normal(*shape), plan.normal(*shape), columns, torch.ones(shape[:3], device=plan.device))


def _timed(plan: Plan, step: Callable[[], Any], graph: bool) -> float:
    if graph:
        run = clock.captured(step, plan.device)
        run()
    else:
        run = step
        for _ in range(2):
            run()
    if not plan.cuda:
        return clock.seconds({"": run}, plan.rounds, plan.device)[""]
    took = []
    for _ in range(3):
        torch.cuda.synchronize(plan.device)
        started = time.perf_counter()
        for _ in range(plan.steps):
            run()
        torch.cuda.synchronize(plan.device)
        took.append((time.perf_counter() - started) / plan.steps)
        if sum(took) * plan.steps > 4:
            break
    return statistics.median(took)


# ------------------------------------------------------------------------------------------- prefill and memory


def prefill_and_memory(plan: Plan, report: Report, model: Qwen2ForCausalLM) -> None:
    """A prompt through the whole model: what a method adds to its time, and what memory holds then."""
    columns = ["", "ms", "added ms", "cache MiB", "of full", "held MiB", "peak MiB"]
    note = (
        f"Prompts of batch 1 through the model, budget {BUDGET:g}, interleaved rounds. Cache: keys and values after "
        "the cut; held: what torch's allocator holds then beside the weights; peak: most that it held meanwhile, "
        "beside the weights."
    )
    rows: list[list[str]] = []
    for length in plan.prefill:
        ids = torch.randint(plan.vocabulary, (1, length), device=plan.device)
        took: dict[str, list[float]] = {name: [] for name in (FULL, *METHODS)}
        memory: dict[str, list[str]] = {}
        for turn in range(1 + plan.rounds):
            for name in took:
                seconds, sizes = _prefill(plan, model, ids, name)
                if turn:  # the first one warms up
                    took[name].append(seconds)
                memory[name] = sizes
        full = statistics.median(took[FULL])
        held = float(memory[FULL][0])
        for name, seconds_of in took.items():
            seconds = statistics.median(seconds_of)
            share = f"{100 * float(memory[name][0]) / held:.0f} %"
            cache, *others = memory[name]
            added = f"{1e3 * (seconds - full):.2f}"
            rows.append([f"L={length}, {name}", f"{1e3 * seconds:.2f}", added, cache, share, *others])
        report.table("whole_model", "Prefill and memory of the whole model", columns, rows, note)


def _prefill(plan: Plan, model: Qwen2ForCausalLM, ids: torch.Tensor, name: str) -> tuple[float, list[str]]:
    """Seconds, and MiB: of the cache, held, at the peak."""
    device = plan.device
    visual = torch.zeros(ids.shape, dtype=torch.bool, device=device)
    visual[:, ids.shape[1] // 8 : ids.shape[1] * 3 // 4] = True
    plain = name == FULL
    session = None if plain else kvweave.compress(model, kvweave.parse_method(name, budget=BUDGET), visual=visual)
    with session or nullcontext():
        cache: Any = DynamicCache(config=model.config) if plain else None
        measure.synchronize(device)
        if plan.cuda:
            torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) if plan.cuda else 0
        started = time.perf_counter()
        model(ids, past_key_values=cache, logits_to_keep=1)
        measure.synchronize(device)
        seconds = time.perf_counter() - started
    cache = cache if session is None else session.cache
    if plain:
        kept = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    else:
        kept = sum(layer.nbytes for layer in cache.compressed_layers)
    held = torch.cuda.memory_allocated(device) - before if plan.cuda else kept
    peak = torch.cuda.max_memory_allocated(device) - before if plan.cuda else kept
    return seconds, [f"{x / measure.MIB:.1f}" for x in (kept, held, peak)]
