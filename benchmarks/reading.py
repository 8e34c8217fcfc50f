"""How hard the code is to read, in numbers: `python -m benchmarks.reading`.

Follows a SnapKV prefill of two layers, and one decoded token, through kvweave's files: which ones control passes
through, and how often it goes from one to another, calls and returns alike. Then the sizes of files and functions.
"""

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import kvweave

PACKAGE = Path(kvweave.__file__).parent
SEAM = ("memory/block.py", "seam/names.py", "seam/turn.py", "seam/layer.py", "seam/attention.py", "seam/session.py")


@dataclass
class Walk:
    """Files that control passed through, in order, each as often as it was entered."""

    files: list[str] = field(default_factory=list)

    @property
    def visited(self) -> list[str]:
        return sorted(set(self.files))

    @property
    def switches(self) -> int:
        return max(0, len(self.files) - 1)


@contextmanager
def walking() -> Iterator[Walk]:
    """Note each change of file inside kvweave while the block runs."""
    walk, stack = Walk(), [""]

    def note(frame: Any, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE not in path.parents:
            return
        if event == "call":
            stack.append(str(path.relative_to(PACKAGE)))
        elif event == "return" and len(stack) > 1:
            stack.pop()
        if stack[-1] and (not walk.files or walk.files[-1] != stack[-1]):
            walk.files.append(stack[-1])

    sys.setprofile(note)
    try:
        yield walk
    finally:
        sys.setprofile(None)


def walks() -> tuple[Walk, Walk]:
    """A SnapKV prefill of 64 tokens over two layers, and one decoded token."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, num_hidden_layers=2, **sizes)).eval()
    ids = torch.arange(64)[None]
    with kvweave.compress(model, kvweave.SnapKV(budget=0.25, window=8)), torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        model(input_ids=ids[:, :1], past_key_values=cache)  # everything is imported, and room is made
        with walking() as prefill:
            cache = model(input_ids=ids, use_cache=True).past_key_values
        model(input_ids=ids[:, :1], past_key_values=cache)
        with walking() as token:
            model(input_ids=ids[:, :1], past_key_values=cache)
    return prefill, token


def main() -> None:
    for name, walk in zip(("SnapKV prefill, two layers", "one decoded token"), walks(), strict=True):
        print(f"{name}: {len(walk.visited)} files, {walk.switches} switches: {' '.join(walk.visited)}")
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in PACKAGE.rglob("*.py")}
    seam = {name: lines[PACKAGE / name] for name in SEAM if PACKAGE / name in lines}
    print(f"the seam: {sum(seam.values())} lines: {' '.join(f'{name} {count}' for name, count in seam.items())}")
    longest = max(lines, key=lines.__getitem__)
    print(f"longest file: {longest.relative_to(PACKAGE)}, {lines[longest]} lines")
    texts = [path.read_text(encoding="utf-8") for path in lines]
    functions = [node for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    long = [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= 60]
    print(f"functions over 60 lines: {len(long)}: {' '.join(long)}")
    print(f"type: ignore: {sum(text.count('# type: ignore') for text in texts)}")


if __name__ == "__main__":
    main()
