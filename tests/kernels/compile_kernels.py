"""Compile every kernel for an H100 or H200, where there is none: the compiler refuses what the interpreter lets pass.

Prints a line for each: its name, registers, bytes of stack. Runs in a process without TRITON_INTERPRET.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvweave.ops import decode, kernels

HOPPER = GPUTarget("cuda", 90, 32)
NUMBERS = {"queries", "keys", "values", "bias", "x", "key_scale", "key_zero", "value_scale", "value_zero"}
POINTERS = {
    "sums": "*fp32", "norms": "*fp32", "normal": "*fp32", "weights": "*fp32", "norm": "*fp32", "weight": "*fp32",
    "own": "*fp32", "cosine": "*fp32", "table": "*i64", "source": "*i64", "target": "*i64", "label": "*i64",
    "index": "*i64", "keep": "*i64", "member": "*i64", "start": "*i64", "allowed": "*u8", "scaling": "fp32",
}  # fmt: skip
UNKNOWN = {
    "slots", "tail", "run", "before", "splits", "rows", "length", "sources", "targets", "kept", "members", "heads",
    "kv_heads", "group", "kinds", "labels", "parts",
}  # fmt: skip  # of no known divisor

HALF = {"width": 128, "precision": "tf32"}
TOKEN = {"rows": 16, "value_width": 128, **HALF}


def compiled(kernel, constants, out="*fp32", codes=False):
    """Registers and bytes of stack of a kernel over bfloat16."""
    blocks = dict(constants)
    options = {name: blocks.pop(name) for name in ("num_warps", "num_stages") if name in blocks}
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        kind = "*bf16" if name in NUMBERS else POINTERS.get(name, "i32")
        kind = out if name == "out" else "*u8" if codes and name in ("keys", "values") else kind
        signature[name] = "constexpr" if name in blocks else kind
        if kind[0] == "*" or (kind == "i32" and name not in UNKNOWN):
            attributes[(place,)] = [["tt.divisibility", 16]]
    known = {(kernel.arg_names.index(name),): value for name, value in blocks.items()}
    attributes = {at: said for at, said in attributes.items() if at not in known}
    source = ASTSource(kernel, signature, constexprs=known, attrs=attributes)
    binary = triton.compile(source, target=HOPPER, options=options).asm["cubin"]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()


CASES = {
    "log-sum-exp": (kernels._log_sum_exp, kernels._NORMS | HALF, {}),
    "column sums": (kernels._column_sums, kernels._SUMS | HALF, {}),
    "nearest": (kernels._nearest, kernels._MATCH | HALF | {"restricted": True}, {}),
    "merge": (kernels._merge, {"width": 128, "block_rows": 16}, {"out": "*bf16"}),
    **{
        f"part, biased {biased}, uneven {uneven}": (
            decode._part,
            TOKEN | {"biased": biased, "uneven": uneven, "aligned": 16, "tile": decode._SLOTS},
            {},
        )
        for biased, uneven in ((False, False), (True, True))
    },
    **{
        f"part, {bits} bits": (
            decode._packed_part,
            TOKEN | {"biased": True, "bits": bits, "tile": 32, "share": 32},
            {"codes": True},
        )
        for bits in (8, 4, 2)
    },
    "together": (decode._together, {"rows": 16, "value_width": 128, "tile": 64}, {"out": "*bf16"}),
}

if __name__ == "__main__":
    for name, (kernel, constants, options) in CASES.items():
        print(name, *compiled(kernel, constants, **options), sep=": ", flush=True)
