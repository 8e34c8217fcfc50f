"""A served model under load: `make load`.

`kvweave serve` in a process of its own, asked by the official client: a thousand requests, 32 at once, half of them
streamed, each with an album and a needle of its own. Every answer is compared with what `kvweave.compress` and
`generate` answer to that prompt alone, so that none is lost, cut short or mixed with another. All methods run on the
same server under the same limit of memory. Replies go on past their end (`ignore_eos`), so that they overlap.

Then the same of two replicas behind one address, one of which is killed in the middle.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai
import torch

import kvweave
from benchmarks import measure
from benchmarks.console import console as terminal
from benchmarks.console import show
from kvweave import lab, models
from kvweave.serve.limits import DEFAULT_METHOD

EVEN = f"{DEFAULT_METHOD},defer=0"
#: What is asked, and of how many of the requests: the first is the one that memory is watched over.
METHODS = {EVEN: 1.0, "full": 0.1, DEFAULT_METHOD: 0.05, "weave:form=spelled,defer=0": 0.05}
BUDGET, TOKENS = 0.2, 32
KILLED = 0.3  # of the requests go to two replicas, one of which is killed
FLAT = 0.05  # that resident memory may grow from request 200 to the last


@dataclass
class Figures:
    """One method under load.

    Attributes:
        lost, mixed: requests without an answer, or with another's or a wrong one.
        first, between: seconds to the first token, and between two, of streamed replies.
        rows: most replies that were decoded at a time.
        cpu: seconds that the server computed; resident: its bytes after so many requests.
        told: what the gateway counted, where there is one.
    """

    method: str
    requests: int
    decoded: str = ""
    lost: list[str] = field(default_factory=list)
    mixed: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    seconds: float = 0.0
    cpu: float = 0.0
    tokens: int = 0
    rows: int = 0
    kept: int = 0
    whole: int = 0
    resident: dict[int, int] = field(default_factory=dict)
    told: dict[str, float] = field(default_factory=dict)


@contextlib.contextmanager
def server(*options: str, replicas: int = 1) -> Iterator[tuple[str, int]]:
    """`kvweave serve` on a port that is free, once so many replicas answer; where it is, and its process."""
    command = [sys.executable, "-m", "kvweave", "serve", "--port", "0", "--budget", str(BUDGET), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"running on (http://\S+)", line):
                break
        else:
            raise RuntimeError("the server does not start")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # or its log would fill the pipe
        while replicas > 1 and gateway_counts(found[1])["replicas_up"] < replicas:
            time.sleep(0.5)
        yield found[1], process.pid
    finally:
        process.terminate()
        process.wait(timeout=60)


def gateway_counts(url: str) -> dict[str, float]:
    """What a gateway counts."""
    told = httpx2.get(f"{url}/metrics").raise_for_status().text
    return {name: float(x) for name, x in re.findall(r"^kvweave_gateway_(\w+) (\S+)$", told, re.MULTILINE)}


def children(process: int) -> list[int]:
    """Processes that a process has started."""
    return [int(one) for one in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def resident(process: int) -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def computed(process: int) -> float:
    """Seconds that a process has computed, and all that it has started, those that have ended too."""
    ticks = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:15]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK") + sum(map(computed, children(process)))


def openai_messages(sample: Any) -> list[dict[str, Any]]:
    """A question as OpenAI's clients write it."""

    def part(piece: dict[str, Any]) -> dict[str, Any]:
        if piece["type"] == "text":
            return piece
        raw = io.BytesIO()
        piece["image"].save(raw, "PNG")
        url = "data:image/png;base64," + base64.b64encode(raw.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": url}}

    return [{**turn, "content": [*map(part, turn["content"])]} for turn in sample.messages()]


def truths(model: Any, processor: Any, samples: Sequence[Any], method: str, lengths: Sequence[int]) -> list[str]:
    """What each prompt is answered without a server; a row of a batch is what it is alone."""
    found = []
    for start in range(0, len(samples), 25):
        few = samples[start : start + 25]
        inputs = models.encode(processor, *(sample.messages() for sample in few))
        with torch.inference_mode(), kvweave.compress(model, kvweave.parse_method(method, budget=BUDGET)):
            out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
        replies = out[:, inputs["input_ids"].shape[1] :].tolist()
        some = lengths[start : start + len(few)]
        cut = [ids[:length] for ids, length in zip(replies, some, strict=True)]
        found += [processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in cut]
    return found


async def one(client: openai.AsyncOpenAI, request: dict[str, Any], streamed: bool, figures: Figures) -> str:
    """A request; returns its answer."""
    asked = {"model": "lab", "temperature": 0, **request}
    if not streamed:
        told = await client.chat.completions.create(**asked)
        figures.tokens += told.usage.completion_tokens
        note(figures, told.kvweave)
        return told.choices[0].message.content
    text, last, started = "", 0.0, time.perf_counter()
    stream = await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    async for chunk in stream:
        now = time.perf_counter()
        if chunk.usage:
            figures.tokens += chunk.usage.completion_tokens
            note(figures, chunk.kvweave)
            continue
        if last:
            figures.between.append(now - last)
        else:
            figures.first.append(now - started)
        last = now
        text += chunk.choices[0].delta.content or ""
    return text


def note(figures: Figures, told: dict[str, Any]) -> None:
    figures.decoded = told["decoded"]
    figures.kept += told["kept_bytes"]
    figures.whole += told["prompt_bytes"]


async def loaded(
    url: str,
    process: int,
    figures: Figures,
    requests: Sequence[dict[str, Any]],
    right: Sequence[str],
    at_once: int,
    advance: Any,
    kill_after: int | None = None,
) -> None:
    """All requests, so many at once.

    Args:
        kill_after: so many answers one of the gateway's replicas is killed; None: there is none.
    """
    gate, done = asyncio.Semaphore(at_once), 0

    async def asked(number: int) -> None:
        nonlocal done
        async with gate:
            try:
                answer = await one(client, requests[number], bool(number % 2), figures)
                figures.mixed += answer != right[number]
            except Exception as error:
                figures.lost.append(f"{type(error).__name__}: {error}"[:200])
        done += 1
        if done in (200, len(requests)):
            figures.resident[done] = resident(process)
        if done == kill_after:
            guard, *_ = children(process)
            os.kill(children(guard)[0], signal.SIGKILL)
        advance()

    async def watched() -> None:
        async with httpx2.AsyncClient() as watcher:
            while True:
                told = (await watcher.get(f"{url}/metrics")).text
                rows = re.findall(r"^kvweave_rows_\w+(?:{.*})? ([\d.]+)$", told, re.MULTILINE)
                figures.rows = max(figures.rows, int(sum(map(float, rows))))
                await asyncio.sleep(0.2)

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=600) as client:
        watch = asyncio.create_task(watched())
        started, cpu = time.perf_counter(), computed(process)
        await asyncio.gather(*map(asked, range(len(requests))))
        figures.seconds, figures.cpu = time.perf_counter() - started, computed(process) - cpu
        watch.cancel()


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))] if values else float("nan")


def cells(figures: Figures) -> list[str]:
    """A row of the table."""

    def both(values: Sequence[float]) -> str:
        return f"{1000 * quantile(values, 0.5):.0f} / {1000 * quantile(values, 0.95):.0f}"

    return [
        figures.method,
        str(figures.requests),
        f"{len(figures.lost)} / {figures.mixed}",
        "alone" if figures.decoded.startswith("alone") else "together",
        f"{100 * figures.kept / max(1, figures.whole):.0f} %",
        str(figures.rows),
        both(figures.first),
        both(figures.between),
        f"{figures.requests / figures.seconds:.1f}",
        f"{figures.tokens / figures.seconds:.0f}",
        f"{1000 * figures.cpu / figures.requests:.0f}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    from rich.progress import Progress

    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--images", type=int, default=12, help="in each prompt")
    parser.add_argument("--memory", default="9MiB", help="of the server: eight full caches of 12 images")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = terminal()
    chance = random.Random(0)
    samples = lab.samples("text_needle", options.requests, options.images, 0)
    if len({(sample.answer, sample.question) for sample in samples}) < len(samples) // 2:
        raise RuntimeError("the needles are not each their own")
    lengths = [chance.randint(8, TOKENS) for _ in samples]
    model, processor = models.load("lab")

    def measured(figures: Figures, url: str, process: int, kill_after: int | None = None) -> Figures:
        method, count = figures.method, figures.requests
        right = truths(model, processor, samples[:count], method, lengths)
        requests = [
            {
                "messages": openai_messages(sample),
                "max_tokens": length,
                "extra_body": {"kvweave": {"method": method, "ignore_eos": True}},
            }
            for sample, length in zip(samples[:count], lengths, strict=False)
        ]
        with Progress(console=terminal(stderr=True)) as bar:
            task = bar.add_task(method, total=count)
            asyncio.run(
                loaded(url, process, figures, requests, right, options.at_once, lambda: bar.advance(task), kill_after)
            )
        return figures

    def some(share: float) -> int:
        return max(1, int(share * options.requests))

    served = ["--rows", str(options.at_once), "--queue", "64", "--memory", options.memory]
    served += [word for method in METHODS for word in ("--method", method)]
    with server(*served) as (url, process):
        found = [measured(Figures(method, some(share)), url, process) for method, share in METHODS.items()]
    with server(*served, "--replicas", "2", replicas=2) as (url, process):
        killed = measured(Figures(EVEN, some(KILLED)), url, process, some(KILLED) // 3)
        killed.told = gateway_counts(url)
    found.append(killed)

    columns = [
        "method",
        "requests",
        "lost / mixed",
        "decoded",
        "kept",
        "most rows",
        "first token ms p50 / p95",
        "between ms p50 / p95",
        "requests/s",
        "tokens/s",
        "CPU ms a request",
    ]
    rows = [cells(figures) for figures in found]
    rows[-1][0] += ", two replicas, one killed"
    first = found[0]
    after, end = (first.resident.get(n, 0) for n in (200, options.requests))
    grown = end / after - 1 if after else float("nan")
    good = all(not figures.lost and not figures.mixed for figures in found) and not grown > FLAT
    good = good and killed.told["went_on_total"] > 0
    prompt = statistics.mean(figures.whole / figures.requests for figures in found)
    command = f"kvweave serve --model lab --budget {BUDGET} --memory {options.memory} --rows {options.at_once}"
    note = (
        f"`{command}`, asked by the official openai client on the same machine, {options.at_once} requests at once, "
        f"half of them streamed. Each has {options.images} pictures and a needle of its own "
        f"({prompt / 2**10:.0f} KiB of keys and values) and 8 to {TOKENS} tokens to decode. `mixed`: answers that "
        "differ from what `kvweave.compress` and `generate` answer to that prompt alone. `most rows`: replies that "
        "were decoded at a time under the limit of memory. The CPU's time is the server's. Resident memory after 200 "
        f"requests of the first method {after / 2**20:.0f} MiB, after {options.requests} {end / 2**20:.0f} MiB "
        f"({100 * grown:+.1f} %). Of two replicas (`--replicas 2`) one was killed after {some(KILLED) // 3} answers: "
        f"{killed.told['again_total']:.0f} requests went on to the other, {killed.told['went_on_total']:.0f} of them "
        f"streams that had begun; the longest wait for a token of a stream was {max(killed.between):.1f} s."
    )
    text = f"# A served model under load\n\n{note}\n\n{measure.markdown_table(columns, rows)}"
    show(console, "Load", columns, rows)
    console.print(note)
    for figures in found:
        for lost in figures.lost[:3]:
            console.print(f"{figures.method}: {lost}")
    data = {"figures": [asdict(figures) | {"first": None, "between": None} for figures in found], "grown": grown}
    for path in measure.write("load", measure.machine(), data, text, options.out):
        console.print(f"wrote {path}", soft_wrap=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
