"""Which tiles suit the card: the kernels' constants, one varied after the other. `--tiles`."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu import clock
from benchmarks.gpu.plan import BUDGET, Plan
from benchmarks.gpu.report import Report

_TILES = [
    {"block_rows": rows, "block_columns": columns, "num_warps": warps, "num_stages": stages}
    for rows, columns, warps, stages in (
        (128, 64, 4, 3), (64, 128, 8, 3), (64, 128, 4, 3), (128, 128, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3),
        (64, 64, 4, 4), (128, 64, 8, 3),
    )
]  # fmt: skip


def tiles(plan: Plan, report: Report) -> None:
    """Milliseconds at 8k tokens, for each setting of a pass's constants."""
    from kvweave.ops import decode, kernels

    length = plan.prefill[-1]
    queries = plan.normal(1, plan.heads, length, plan.dim)
    keys = plan.normal(1, plan.kv_heads, length, plan.dim)
    kinds = torch.ones(1, 2, length, device=plan.device)
    rows: list[list[str]] = []

    def tried(what: str, module: ModuleType, constants: dict[str, Any], run: clock.Run) -> None:
        try:
            with mock.patch.multiple(module, **constants):
                run()
                seconds = clock.seconds({"": clock.captured(run, plan.device)}, plan.rounds, plan.device)[""]
            took = f"{1e3 * seconds:.4f}"
        except Exception as error:
            if isinstance(error, TimeoutError):
                raise
            took = f"{type(error).__name__}: {error}".splitlines()[0][:60]
        said = ", ".join(f"{name}={value}" for name, value in constants.items())
        rows.append([what, said.replace("block_", ""), took])
        report.table("tiles", "Tiles", ["", "constants", "ms"], rows)

    for constant, tile in itertools.product(("_NORMS", "_SUMS"), _TILES):
        tried(
            "column sums", kernels, {constant: tile},
            lambda: kernels.column_sums(queries, keys, plan.dim**-0.5, kinds),
        )  # fmt: skip
    for batch, share in ((1, 1.0), (1, BUDGET), (8, BUDGET)):
        kept = int(share * plan.decode[1].length)
        layers = [[plan.normal(batch, plan.kv_heads, kept, plan.dim) for _ in range(2)] for _ in range(8)]
        query = plan.normal(batch, plan.kv_heads, plan.heads // plan.kv_heads, plan.dim)

        def token(layers: Any = layers, query: torch.Tensor = query) -> None:
            for k, v in layers:
                decode.attend(query, k, v, None, plan.dim**-0.5)

        for slots, warps, blocks in ((64, 4, 4), (32, 4, 4), (128, 4, 4), (64, 8, 4), (64, 4, 2), (64, 4, 8)):
            constants = {"_SLOTS": slots, "_WARPS": warps, "_BLOCKS": blocks}
            tried(f"a token, {kept} slots x {batch}, 8 layers", decode, constants, token)
