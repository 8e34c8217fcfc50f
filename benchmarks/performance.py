"""docs/PERFORMANCE.md and its picture, from what the other benchmarks wrote under benchmarks/results.

python -m benchmarks.performance
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import launches, long, measure
from kvweave.report.charts import Curve, Lines, quantities

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results", ROOT / "docs/PERFORMANCE.md"
PICTURE = ROOT / "docs/images/performance.png"
CPU, GPU = "amd-epyc-2-cores", "nvidia-h200"
SHAPE, LENGTH = "H=28 KV=4 D=128", 4096
MARKED = ("snapkv", "flowmm", "h2o", "weave", "flashcache")
_STEP = ("ms a step", "faster", "bandwidth allows")
DECODED = ("snapkv", "adakv", "flowmm")


def read(name: str) -> dict[str, Any]:
    """What a benchmark wrote."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def decoding(figures: Iterable[dict[str, Any]]) -> list[Curve]:
    """How many times faster than the full cache a token is, by budget in %."""
    rows = [row for row in figures if row["length"] == LENGTH and row["batch"] == 1 and row["what"] in DECODED]
    curves = []
    for name in DECODED:
        own = sorted((100 * row["budget"], row["ratio"]) for row in rows if row["what"] == name and row["ratio"])
        curves.append(Curve(name, [x for x, _ in own], [y for _, y in own], marked=True))
    return curves


def prefilling(figures: Iterable[dict[str, Any]]) -> list[Curve]:
    """What deciding takes of one attention call, by length."""
    rows = [row for row in figures if row["shape"] == SHAPE]
    methods = [name for name in dict.fromkeys(row["what"] for row in rows) if name in known()]
    curves = []
    for name in methods:
        own = sorted((row["length"], row["ratio"]) for row in rows if row["what"] == name and row["ratio"])
        curves.append(Curve(name, [x for x, _ in own], [y for _, y in own], marked=name in MARKED))
    return curves


def known() -> Sequence[str]:
    """Names of methods; other rows are statistics."""
    from kvweave.methods import list_methods

    return list_methods()


def marks(found: dict[str, Any]) -> list[str]:
    """A line for each mark that is not met, of one machine."""
    verdict = "verdict" if "verdict" in found["marks"][0] else ""
    return [f"| {row['mark']} | {row['measured']} |" for row in found["marks"] if row[verdict] == "not met"]


def long_prompts() -> str:
    """Seconds and MiB by length, of one layer of very long prompts."""
    found = read(f"long-{CPU}")
    told = f"`{found['machine']['command']}`, {found['machine']['date']}, one thread of an {found['machine']['cpu']}"
    return f"""## Very long prompts

Deciding and cutting one layer of {found["shape"]} in float32, {found["budget"]:.0%} kept: seconds · MiB above its
inputs ({told}). `weave` is `weave:form=spelled`, which matches what it merges; h2o's sums are of every row.

{measure.markdown_table(*long.table(found["figures"]))}"""


def short_prompts() -> str:
    """Launches, waits and microseconds of the host."""
    found = read(f"launches-{CPU}")
    return f"""## What a short prompt pays

On a GPU a prompt of two thousand tokens takes as long as its launches, and what a method adds to it are more of them:
of a tiny model, a prompt of {launches.LENGTH} tokens and {launches.DECODED} decoded ones, a layer's share on one
thread of an {found["machine"]["cpu"]} (`{found["machine"]["command"]}`, {found["machine"]["date"]}).

{measure.markdown_table(*launches.table(found["figures"]))}"""


def page() -> str:
    """The page."""
    decode, statistics, gpu = read(f"decode-{CPU}"), read(f"statistics-{CPU}"), read(f"gpu-{GPU}")
    whole = read(f"gpu-end-to-end-{GPU}")
    told = [f"`{found['machine']['command']}`, {found['machine']['date']}" for found in (decode, statistics, whole)]
    steps = [row for row in whole["end_to_end"] if row[""].endswith("graph") and " 100 %" not in row[""]]
    lines = [f"| {row[''].removesuffix(', graph')} | {' | '.join(row[name] for name in _STEP)} |" for row in steps]
    unmet = f"{len(marks(gpu))} of {len(gpu['marks'])}"
    return f"""# Performance

Written by `python -m benchmarks.performance` from the figures under
[benchmarks/results](../benchmarks/results), which are written by a command each. What a GPU measured, at length:
[On a GPU](GPU.md).

![Left, decoding by budget; right, the cost of deciding by length](images/performance.png)

**Left**: a decoded token over what is kept against one over the full cache, through the same kernel, at the shape of
Qwen2.5-VL-7B's language model (28 layers, {SHAPE}), {LENGTH:,} tokens, one thread of an {decode["machine"]["cpu"]}
({told[0]}). **Right**: deciding and cutting one layer, in attention calls of the same shape, on the same machine
({told[1]}).

## A whole model on a GPU

Qwen2.5-VL-7B's language model with random weights in bfloat16, decoding in a CUDA graph on one
{gpu["machine"]["gpu"]} ({told[2]}): how many times faster than the full cache, and what bandwidth
allows if weights and cache are read once.

| prompts and budget | ms a token | faster | bandwidth allows |
|---|--:|--:|--:|
{chr(10).join(lines)}

At batch 1 weights are nearly all that is read, so that a smaller cache cannot bring more than 1.13x; what papers
report beyond it there is time of the framework.

{long_prompts()}
{short_prompts()}
## Marks that are not met

`meda` with all rows: its entropy is of rows over the other modality's later tokens too, which no causal pass
multiplies: 1.47 of h2o's products where five tokens of eight are visual. One pass for both was no faster than two.
`entropy_rows=256` meets the mark.

On the CPU:

| mark | measured |
|---|--:|
{chr(10).join([*marks(decode), *marks(statistics)])}

On the GPU ({unmet}): see [On a GPU](GPU.md#what-does-not-meet-its-mark), with what stands in the way.
"""


def main() -> None:
    """Write both."""
    panels = [
        Lines(
            "faster than the full cache",
            "share of the cache kept, %",
            "times",
            decoding(read(f"decode-{CPU}")["figures"]),
        ),
        Lines(
            "added to a layer's prefill",
            "tokens",
            "attention calls",
            prefilling(read(f"statistics-{CPU}")["figures"]),
        ),
    ]
    quantities(panels, PICTURE)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
