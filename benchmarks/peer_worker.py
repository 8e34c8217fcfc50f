"""One side of `benchmarks.peers`, in a process of its own: `python -m benchmarks.peer_worker kvpress|kvweave`.

Reads a line of JSON for each request from standard input, answers with a line of JSON:

    {"shape": [heads, kv_heads, dim], "length": 4096}   makes the tensors; answers their checksum and what can be run
    {"run": name, "measure": "seconds" or "bytes"}      answers {"value": number}

The kvpress side needs torch, transformers and kvpress; kvweave is not installed there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks import measure
from benchmarks.shapes import Layer, Shape, layer_of

REMOVED = 0.8
WINDOW = 32  # rows that vote in SnapKV: kvweave's default

Runs = dict[str, Callable[[], object]]


class _Module(nn.Module):
    """As much of Llama's attention as a press looks at; its hidden states are the queries themselves."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads)
        self.head_dim = shape.dim
        self.num_key_value_groups = shape.heads // shape.kv_heads
        self.layer_idx = 0
        self.q_proj = nn.Identity()


def kvpress_runs(shape: Shape, layer: Layer) -> Runs:
    """What kvpress does in its hook; where a press reads attention weights, the eager attention that makes them."""
    from kvpress import MergingPress, ObservedAttentionPress, SnapKVPress
    from transformers.models.llama.modeling_llama import eager_attention_forward

    module, length = _Module(shape).eval(), layer.length
    hidden = layer.queries.transpose(1, 2).reshape(1, length, -1)
    table = torch.ones(1, length, shape.dim)  # a rotation by nothing: the queries are rotated already
    given = {"position_embeddings": (table, torch.zeros_like(table))}
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]  # made once a model
    snapkv = SnapKVPress(REMOVED, window_size=WINDOW)
    merging = MergingPress(press=snapkv)
    observed = ObservedAttentionPress(REMOVED)

    def eager() -> Any:
        inputs = layer.queries, layer.keys, layer.values
        return eager_attention_forward(module, *inputs, mask, scaling=shape.dim**-0.5)[1]

    def press(one: Any, weights: Callable[[], Any] = lambda: None) -> Callable[[], object]:
        return lambda: one.compress(module, hidden, layer.keys, layer.values, weights(), given)

    return {
        "SnapKVPress": press(snapkv),
        "SnapKVPress, its default of 64 rows": press(SnapKVPress(REMOVED)),
        "MergingPress(SnapKVPress)": press(merging),
        "ObservedAttentionPress + eager attention": press(observed, eager),
    }


def kvweave_runs(shape: Shape, layer: Layer) -> Runs:
    """One SDPA call, and kvweave's statistics and methods."""
    from benchmarks import statistics

    return statistics.runs(shape, layer.length, statistics.FIRST)


def main() -> int:
    sides = {"kvpress": kvpress_runs, "kvweave": kvweave_runs}
    torch.set_num_threads(1)
    runs: Runs = {}
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed does not get among the answers
    with torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            if "shape" in request:
                shape = Shape(*request["shape"])
                layer = layer_of(shape, request["length"])
                runs = sides[sys.argv[1]](shape, layer)
                tensors = layer.queries, layer.keys, layer.values
                sums = [float(x.double().abs().sum()) for x in tensors]
                answer: dict[str, object] = {"runs": list(runs), "checksum": sums, "torch": torch.__version__}
                answer["transformers"] = measure.machine()["transformers"]
            else:
                run = runs[request["run"]]
                seconds = request["measure"] == "seconds"
                value = measure.interleaved({"": run}, 1)[""][0] if seconds else measure.peak_bytes(run)
                answer = {"value": value}
            print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
