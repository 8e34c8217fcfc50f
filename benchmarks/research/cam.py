"""What CaM adds to the values it keeps, on a real language model: docs/ERRATA.md quotes it.

    python -m benchmarks.research.cam

One needle in a short text is asked for from the cache that H2O leaves and from those of CaM's variants, which keep
the same tokens. Needs `kvweave lab fetch smol`; a minute of one core.
"""

import argparse
from dataclasses import replace

import torch

from kvweave import compress, models, parse_method
from kvweave.evals.answer.answering import prefill, prepare
from kvweave.evals.tasks.text import text_tasks

VARIANTS = ("h2o", "cam", "cam:mode=expected", "cam:window=1", "cam:against=largest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.2])
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--seed", type=int, default=31)
    given = parser.parse_args()
    model, processor = models.load("smol-text", dtype="bfloat16")
    (task,) = text_tasks(["needle"], 1, given.tokens)
    batch = prepare(processor, task.examples(given.seed), "seen")
    shared = prefill(model, batch, 1)
    length = batch.inputs["input_ids"].shape[1]
    print("| method | budget | added, of a kept value's norm | answer |\n| --- | --: | --: | --- |")
    for budget in given.budgets:
        plain: list[torch.Tensor] = []
        for spelling in VARIANTS:
            method = replace(parse_method(spelling), budget=budget)
            with torch.inference_mode(), compress(model, method) as session, shared.replayed(model):
                said = model.generate(**batch.inputs, max_new_tokens=16, do_sample=False)[0, length:]
            assert session.cache is not None
            values = [layer.values[0, :, : int(budget * length)].float() for layer in session.cache.layers]
            plain = plain or values
            added = [
                float(((v - p).norm(dim=-1) / p.norm(dim=-1)).mean()) for v, p in zip(values, plain, strict=True)
            ]
            answer = processor.decode(said, skip_special_tokens=True)
            print(f"| `{spelling}` | {budget:g} | {sum(added) / len(added):.2f} | {answer.strip()!r} |", flush=True)


if __name__ == "__main__":
    main()
