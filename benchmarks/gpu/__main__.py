"""Everything that needs a GPU, in one call of under seven minutes: `make gpu`.

At the shape of Qwen2.5-VL-7B's language model (28 layers, 28 heads, 4 KV heads of 128, bfloat16):

1. each operation against float64;
2. column sums beside the attention that they repeat;
3. decode by budget: attention over what is kept, beside the time that reading it takes at a copy's bandwidth; heads
   of different counts, slots in few bits;
4. decoded tokens through the whole model (random weights): full cache, 20 % and 5 %, in CUDA graphs on reserved room
   and without, beside what bandwidth allows;
5. what a method adds to a prefill of the whole model, and its memory;
6. the kernels' tests;
7. what each method's compression takes on its own, and its memory;
8. the marks: what is asked, what was measured, met or not;
9. where asked for (`--tiles`), which tiles of the kernels suit the card.

Needs torch, transformers and numpy; Triton for the kernels, pytest for their tests. Without CUDA: one line and exit
code 2, or `--device cpu --quick` to see that it runs. Each part has a time limit, and what is done is written as soon
as it is done, so that a run cut short leaves its results.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.gpu import clock, decode, kernels, model, prefill, tiles
from benchmarks.gpu.marks import marks
from benchmarks.gpu.plan import LIMITS, QUICK, Plan
from benchmarks.gpu.report import Report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to see that it runs")
    parser.add_argument("--quick", action="store_true", help="everything small")
    parser.add_argument("--parts", nargs="+", choices=list(LIMITS), default=list(LIMITS), help="only these")
    parser.add_argument("--tiles", action="store_true", help="try other tiles for the kernels, at the end")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or measure.RESULTS), help="folder")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu needs CUDA, and torch finds none here: --device cpu --quick shows that it runs")
        return 2

    if device.type == "cpu":
        torch.set_num_threads(1)
    plan = Plan(device, torch.bfloat16, **(QUICK if options.quick else {}))
    report = Report(options.out, measure.machine(device))
    with torch.inference_mode():
        run(plan, report, options.parts)
        if options.tiles:
            clock.freed()
            with report.part("tiles"):
                tiles.tiles(plan, report)
    for path in report.write():
        print(f"wrote {path}")
    for failure in report.failures:
        print(failure, file=sys.stderr)
    return 1 if report.failures else 0


def run(plan: Plan, report: Report, parts: Sequence[str]) -> None:
    """The parts, each for itself."""
    if "kernels" in parts:
        with report.part("kernels"):
            kernels.errors(plan, report)
    if "column sums" in parts:
        with report.part("column sums"):
            prefill.column_sums_beside_attention(plan, report)
    if "decode" in parts:
        with report.part("decode"):
            decode.decode(plan, report)
            decode.stored_otherwise(plan, report)
    whole = None
    if {"end to end", "whole model"} & set(parts):
        with report.part("random weights"):
            whole = model.language_model(plan)
    if "end to end" in parts and whole is not None:
        with report.part("end to end"):
            model.end_to_end(plan, report, whole)
    if "whole model" in parts and whole is not None:
        with report.part("whole model"):
            model.prefill_and_memory(plan, report, whole)
    if "tests" in parts and plan.cuda:
        with report.part("tests"):
            kernels.tests(report)
    if "prefill" in parts:
        with report.part("prefill"):
            prefill.methods(plan, report)
    with report.part("marks"):
        marks(report)


if __name__ == "__main__":
    sys.exit(main())
