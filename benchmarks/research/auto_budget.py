"""How well the first tokens tell what a budget costs: `budget="auto:kl=..."`.

    python -m benchmarks.research.auto_budget collect lab weave:form=even,defer=2 20 7101 out/auto/dev.jsonl
    python -m benchmarks.research.auto_budget table out/auto/*.jsonl

For each sample and share of a grid the KL (nats) of each token along the full cache's own answer, at most 32, its end
included, all of them decoded from the cut cache. What the cut waited for is the estimate, the mean of all the truth.
"""

import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kvweave
from kvweave.evals.answer.prefill import Prefill
from kvweave.evals.tasks.sources import SOURCES
from kvweave.methods import Method
from kvweave.models import encode, load

GRID = (
    *(0.02, 0.03, 0.04, 0.05, 0.0625, 0.078, 0.1, 0.125, 0.155, 0.195),
    *(0.245, 0.305, 0.38, 0.475, 0.595, 0.745, 0.93),
)
TOKENS, TARGETS, FACTORS = 32, (0.02, 0.05, 0.1), (1, 2, 3, 5, 10)


@torch.inference_mode()
def divergences(model: Any, inputs: dict[str, Tensor], method: Method) -> list[list[float]]:
    """KL of each token at each share of the grid; empty where the reply is no longer than what the cut waits for."""
    told: list[Tensor] = []

    def answer(**kept: Any) -> Tensor:
        settings = {"do_sample": False, "max_new_tokens": TOKENS + 1, "output_logits": True}
        out = model.generate(**inputs, **kept, **settings, return_dict_in_generate=True)
        told.append(torch.stack(out.logits, 1)[0, 1:].float().log_softmax(-1))
        return out.sequences

    prefill, length = Prefill.recorded(model, answer), inputs["input_ids"].shape[1]
    full = told[0]
    tokens = prefill.tokens[:, length : length + len(full)]
    found = []
    for share in GRID if len(full) > method.defer else ():
        with kvweave.compress(model, dataclasses.replace(method, budget=share)) as session:
            with prefill.replayed(model):
                model(**{name: x for name, x in inputs.items() if not name.startswith("pixel_values")})
            cache = session.cache
            for n in range(method.defer):
                model(input_ids=tokens[:, n : n + 1], past_key_values=cache)
            cache.freeze()
            cache.crop(-method.defer)
            mine = model(input_ids=tokens, past_key_values=cache).logits[0].float().log_softmax(-1)
        found.append([round(x, 5) for x in (full.exp() * (full - mine)).sum(-1).tolist()])
    return found


def collect(name: str, spelling: str, count: int, seed: int, path: Path) -> None:
    """Append a line for each sample."""
    model, processor = load(name, dtype="bfloat16" if "smol" in name else "auto")
    source = SOURCES[name]
    method = kvweave.parse_method(spelling).on_model(lambda: None)
    size = 300 if source.unit == "tokens" else 12
    asked = [task.examples(seed) for task in source.make(source.tasks, -(-count // len(source.tasks)), size)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for one in [one for turn in zip(*asked, strict=True) for one in turn][:count]:
            found = divergences(model, dict(encode(processor, one.messages)), method)
            row = {"model": name, "method": spelling, "seed": seed, "defer": method.defer, "kl": found}
            print(json.dumps(row), file=file, flush=True)


def table(paths: list[Path]) -> str:
    """For each group of samples, target and factor: how many are under the target, and what they keep."""
    rows = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    lines = ["| model, method, seed | samples | target | factor | under it | median share | over the smallest |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|")
    groups = dict.fromkeys((row["model"], row["method"], row["seed"]) for row in rows)
    for group in groups:
        own = [row for row in rows if (row["model"], row["method"], row["seed"]) == group and row["kl"]]
        for target in TARGETS:
            for factor in FACTORS:
                taken = [judged(row["kl"], row["defer"], factor, target) for row in own]
                under = 100 * sum(kl <= target for _, _, kl in taken) / len(taken)
                share, ratio = (
                    statistics.median(x) for x in ([s for s, _, _ in taken], [s / b for s, b, _ in taken])
                )
                cells = [", ".join(map(str, group)), len(own), target, factor]
                lines.append(f"| {' | '.join(map(str, cells))} | {under:.0f} % | {share:.3f} | {ratio:.2f} |")
    return "\n".join(lines)


def judged(kl: list[list[float]], defer: int, factor: float, target: float) -> tuple[float, float, float]:
    """The share taken, by halving as the cache does; the smallest under the target; what the taken one costs."""
    low, high = 0, len(kl)
    while low < high:
        middle = (low + high) // 2
        if factor * statistics.mean(kl[middle][:defer]) <= target:
            high = middle
        else:
            low = middle + 1
    truth = [statistics.mean(tokens) for tokens in kl]
    least = next((share for share, cost in zip(GRID, truth, strict=True) if cost <= target), 1.0)
    return (GRID[low], least, truth[low]) if low < len(kl) else (1.0, least, 0.0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "collect":
        collect(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), Path(sys.argv[6]))
    else:
        print(table([Path(name) for name in sys.argv[2:]]))
