"""What stands between a client and its tokens: `python -m benchmarks.handover`.

The gateway: one `kvweave serve`, asked directly and through a gateway by turns, so that both meet the same load. The
hand-off: a prompt of the real language model, exported at each budget, and read as vLLM's connector reads it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import openai
import torch
from safetensors import safe_open

import kvweave
from benchmarks import load, measure
from benchmarks.console import console as terminal
from benchmarks.console import show
from kvweave import lab, models
from kvweave.serve.engines.handoff import check_whole, described

#: From a name to requests at a time and requests a round.
LOADS = {"one at a time": (1, 8), "8 at once": (8, 32)}
IMAGES, TOKENS = 12, 24
MODEL, LENGTH, BUDGETS = "smol-text", 1000, (1.0, 0.2, 0.1, 0.05)
GATEWAY = [
    "asked",
    "requests",
    "first token ms p50 / p95",
    "requests/s",
    "tokens/s",
    "server, gateway: CPU ms a request",
]
HANDOFF = ["kept", "slots", "bytes", "of the full cache", "write, CPU ms", "read, CPU ms"]


@dataclass
class Asked:
    """One way to a server, under one load.

    Attributes:
        url: where it is asked.
        figures: of its requests; cpu: seconds of the server and of the gateway.
    """

    url: str
    figures: load.Figures
    cpu: list[float] = field(default_factory=lambda: [0.0, 0.0])

    async def round(self, requests: Sequence[dict[str, Any]], at_once: int) -> list[str]:
        """Streamed answers to all of them."""
        gate, started = asyncio.Semaphore(at_once), time.perf_counter()
        async with openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="-", max_retries=0, timeout=600) as client:

            async def one(request: dict[str, Any]) -> str:
                async with gate:
                    return await load.one(client, request, True, self.figures)

            answers = await asyncio.gather(*map(one, requests))
        self.figures.requests += len(requests)
        self.figures.seconds += time.perf_counter() - started
        return answers


def gateway_rows(rounds: int) -> list[list[str]]:
    """One server, asked directly and through a gateway by turns; the answers are compared."""
    requests = [
        {
            "messages": load.openai_messages(sample),
            "max_tokens": TOKENS,
            "extra_body": {"kvweave": {"ignore_eos": True}},
        }
        for sample in lab.samples("text_needle", max(count for _, count in LOADS.values()), IMAGES, 0)
    ]
    rows = []
    with (
        load.server("--method", load.EVEN) as (url, server),
        load.server("--replica", url, "--method", load.EVEN) as (through, gateway),
    ):
        while load.gateway_counts(through)["replicas_up"] < 1:
            time.sleep(0.2)
        for name, (at_once, count) in LOADS.items():
            ways = [Asked(url, load.Figures("directly", 0)), Asked(through, load.Figures("through the gateway", 0))]
            for number in range(rounds + 1):
                found = []
                for way in ways[:: -1 if number % 2 else 1]:
                    before = [load.computed(process) for process in (server, gateway)]
                    found.append(asyncio.run(way.round(requests[:count], at_once)))
                    after = [load.computed(process) for process in (server, gateway)]
                    way.cpu = [cpu + b - a for cpu, a, b in zip(way.cpu, before, after, strict=True)]
                if found[0] != found[1]:
                    raise RuntimeError("the gateway's answers are others")
                if not number:  # what a first request loads
                    for way in ways:
                        way.figures, way.cpu = load.Figures(way.figures.method, 0), [0.0, 0.0]
            rows += [cells(f"{way.figures.method}, {name}", way) for way in ways]
    return rows


def cells(name: str, way: Asked) -> list[str]:
    """A row of the gateway's table."""
    figures = way.figures
    first = [1000 * load.quantile(figures.first, share) for share in (0.5, 0.95)]
    each = [1000 * cpu / figures.requests for cpu in way.cpu]
    return [
        name,
        str(figures.requests),
        f"{first[0]:.0f} / {first[1]:.0f}",
        f"{figures.requests / figures.seconds:.1f}",
        f"{figures.tokens / figures.seconds:.0f}",
        f"{each[0]:.0f}, {each[1]:.1f}",
    ]


def read(path: Path) -> None:
    """As vLLM's connector does, short of its own write into blocks."""
    os.utime(path)  # or it would be known that the file is whole
    check_whole(str(path))
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  a file, not a dict
            file.get_slice(name)[:].transpose(0, 1).contiguous()


def handoff_rows(rounds: int) -> list[list[str]]:
    """One prompt, kept to each budget."""
    model, _ = models.load(MODEL, dtype="bfloat16")
    ids = torch.randint(5, model.config.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), kvweave.attach(model):
        full = 0
        for budget in BUDGETS:
            method = kvweave.parse_method("full" if budget == 1 else "snapkv", budget=budget)
            cache = kvweave.CompressedCache(model.config, method)
            model(input_ids=ids, past_key_values=cache)
            path = Path(folder, f"{cache.export(folder, model)['digest']}.safetensors")
            runs = {"write": partial(cache.export, folder, model), "read": partial(read, path)}
            runs["write"]()
            seconds = measure.interleaved(runs, rounds)
            size = path.stat().st_size
            full = full or size
            rows.append(
                [
                    f"{budget:.0%}",
                    str(described(str(path))["slots"]),
                    f"{size:,}",
                    f"{size / full:.1%}",
                    *(f"{1000 * statistics.median(seconds[name]):.1f}" for name in ("write", "read")),
                ]
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.handover", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    handed, asked = handoff_rows(options.rounds), gateway_rows(options.rounds)
    text = (
        "# What stands between a client and its tokens\n\n"
        f"**The gateway.** The lab's model, prompts of {IMAGES} pictures, {TOKENS} tokens streamed; one server, "
        f"asked directly and through `kvweave serve --replica URL` by turns (rounds: {options.rounds}, behind one "
        "that is not counted); every answer is the same both ways. Server, gateway and client share the machine's "
        "cores with other work: the clock's figures are of that load, the CPU's are the processes' own.\n\n"
        f"{measure.markdown_table(GATEWAY, asked)}\n"
        f"**The hand-off to vLLM.** {MODEL}, bfloat16, a prompt of {LENGTH:,} tokens, kept by snapkv: `cache.export` "
        "(keys turned, digest, file), and what vLLM's connector reads of it (digest checked, slots of each layer), "
        f"its write into vLLM's blocks not counted; the process' own seconds, medians of {options.rounds}.\n\n"
        f"{measure.markdown_table(HANDOFF, handed)}"
    )
    console = terminal()
    show(console, "Gateway", GATEWAY, asked)
    show(console, "Hand-off", HANDOFF, handed)
    data = {"gateway": [dict(zip(GATEWAY, row, strict=True)) for row in asked]}
    data["handoff"] = [dict(zip(HANDOFF, row, strict=True)) for row in handed]
    for path in measure.write("handover", measure.machine(), data, text, options.out):
        console.print(f"wrote {path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
