"""What each method costs in numbers that no machine changes: `make guard` records them, a test holds methods to them.

Operations that torch dispatches, floating-point operations of its products, the most bytes held at a time, and how
often the host waits for a value, each of `compress_tensors` over two layers of one small prompt.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kvweave
from benchmarks import measure
from benchmarks.shapes import Shape, layer_of

RECORDED = Path(__file__).parents[1] / "tests" / "benchmarks" / "guard.json"
SHAPE, LENGTH, LAYERS, BUDGET = Shape(8, 4, 32), 512, 2, 0.2
VARIANTS = ("flowmm:flow_rows=0", "lookm:text_prior=union", "flowmm:mass_bias=True")


class Operations(TorchDispatchMode):
    """Counts what is dispatched, what of it makes or changes a tensor, and what makes a host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.launches = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        views = any(part.alias_info is not None and not part.alias_info.is_write for part in func._schema.returns)
        self.launches += not views and func is not torch.ops.aten.empty.memory_format
        unsized = torch.Tag.dynamic_output_shape in func.tags
        if func is torch.ops.aten.index.Tensor:  # by numbers the shape is known
            unsized = any(x is not None and x.dtype == torch.bool for x in args[1])
        self.waits += unsized or torch.Tag.data_dependent_output in func.tags
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted() -> Iterator[Operations]:
    """Counts, reads of whole tensors by the host (`tolist`, `numpy`) included."""
    plain = {name: getattr(Tensor, name) for name in ("tolist", "numpy")}
    with Operations() as operations, contextlib.ExitStack() as undo:
        for name, read in plain.items():

            def waits(self: Tensor, *args: Any, read: Any = read, **kwargs: Any) -> Any:
                operations.waits += 1
                return read(self, *args, **kwargs)

            setattr(Tensor, name, waits)
            undo.callback(setattr, Tensor, name, read)
        yield operations


def runs() -> dict[str, Callable[[], object]]:
    """Every registered method, and the options that take another path."""
    layers = [layer_of(SHAPE, LENGTH) for _ in range(LAYERS)]
    queries, keys, values = ([getattr(x, name) for x in layers] for name in ("queries", "keys", "values"))

    rotary = layers[0].rotary

    def compress(spelling: str) -> Callable[[], object]:
        method = kvweave.parse_method(spelling, budget=BUDGET)
        return lambda: kvweave.compress_tensors(method, queries, keys, values, visual=layers[0].visual, rotary=rotary)

    return {name: compress(name) for name in (*kvweave.list_methods(), *VARIANTS)}


def costs(run: Callable[[], object]) -> dict[str, int]:
    """The four numbers of one run."""
    with torch.inference_mode():
        run()  # what is made once for all
        with counted() as operations:
            run()
        with FlopCounterMode(display=False) as flops:
            run()
        return {
            "operations": operations.count,
            "flops": flops.get_total_flops(),
            "bytes": measure.peak_bytes(run),
            "waits": operations.waits,
        }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guard", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RECORDED, help="file of the record")
    out = parser.parse_args(arguments).out
    torch.set_num_threads(1)
    found = {name: costs(run) for name, run in runs().items()}
    before = json.loads(out.read_text())["methods"] if out.exists() else {}
    for name, now in found.items():
        was = before.get(name, {})
        said = [f"{key} {was.get(key, '-')} -> {now[key]}" for key in now if was.get(key) != now[key]]
        print(f"{name}: {', '.join(said) or 'as before'}")
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(numbers)}" for name, numbers in found.items())
    version = torch.__version__.partition("+")[0]
    out.write_text(f'{{\n "torch": {json.dumps(version)},\n "methods": {{\n{lines}\n }}\n}}\n')
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
