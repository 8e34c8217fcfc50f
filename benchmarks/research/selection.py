"""What it costs to decide and to cut, of a real prefill: `python -m benchmarks.research.selection`.

smol-text reads a prompt of 1,000 tokens on one thread and decodes until the prompt is cut. Counted is the process's
own time inside kvweave: when attention has been read, when a prefill ends, and in the cut that was deferred; medians
over rounds, the methods by turns, against the median of the plain model's prefill in the same rounds. Needs
`kvweave lab fetch smol`.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import kvweave
from benchmarks import measure
from kvweave import models
from kvweave.evals.tasks.text import text_tasks
from kvweave.models.chat import encode
from kvweave.seam.cache import CompressedCache
from kvweave.seam.layer import CompressedLayer

METHODS = {
    "weave, with the model's profile": "weave",
    "weave, its heads competing": "weave:form=lent",
    "weave, half by the profile": "weave:form=lent,allocation=profile,profile=smol-text",
    "weave, equal counts": "weave:form=even",
    "weave, the former defaults": "weave:form=spelled",
    "snapkv": "snapkv",
}
_PARTS = ((CompressedLayer, "after_attention"), (CompressedCache, "finish_pass"))


@contextmanager
def _counted(spent: list[float]) -> Iterator[None]:
    """Add the time that the library's parts take."""
    own = [getattr(kind, name) for kind, name in _PARTS]

    def timed(part: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return part(*args, **kwargs)
            finally:
                spent[0] += time.process_time() - start

        return call

    for (kind, name), part in zip(_PARTS, own, strict=True):
        setattr(kind, name, timed(part))
    try:
        yield
    finally:
        for (kind, name), part in zip(_PARTS, own, strict=True):
            setattr(kind, name, part)


@torch.inference_mode()
def _prefill(model: Any, inputs: dict[str, Any]) -> float:
    start = time.process_time()
    model(**inputs, use_cache=True, logits_to_keep=1)
    return time.process_time() - start


@torch.inference_mode()
def _selection(model: Any, inputs: dict[str, Any], method: str, budget: float) -> float:
    """Seconds of deciding and cutting."""
    spent = [0.0]
    with _counted(spent), kvweave.compress(model, kvweave.parse_method(method, budget=budget)) as session:
        model(**inputs, use_cache=True, logits_to_keep=1)
        cache = session.cache
        token = inputs["input_ids"][:, -1:]
        while cache is not None and cache.waits:
            model(input_ids=token, past_key_values=cache)
    return spent[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path("out/research"), help="folder")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = models.load("smol-text", dtype=given.dtype)
    example = text_tasks(["needle"], 1, 2 * given.tokens)[0].examples(0)[0]
    inputs = {name: x[:, : given.tokens] for name, x in encode(processor, example.messages).items()}
    assert inputs["input_ids"].shape[1] == given.tokens
    prefills, taken = [], defaultdict(list)
    for _ in range(given.rounds + 1):
        prefills.append(_prefill(model, inputs))
        for name, method in METHODS.items():
            taken[name].append(_selection(model, inputs, method, given.budget))
    whole = statistics.median(prefills[1:])  # the first round warms up
    seconds = {name: statistics.median(found[1:]) for name, found in taken.items()}
    rows = [
        [f"{name}, `{METHODS[name]}`", f"{1000 * spent:.0f}", f"{spent / whole:.1%}"]
        for name, spent in seconds.items()
    ]
    text = (
        "# What deciding and cutting cost\n\n"
        f"{given.tokens} tokens, {given.budget:.0%} kept, one thread, medians of {given.rounds}; the prefill takes "
        f"{whole:.2f} s.\n\n" + measure.markdown_table(["method", "ms", "of the prefill"], rows)
    )
    print(text)
    data = {"prefill": whole, "seconds": seconds, "methods": METHODS}
    measure.write("selection", measure.machine(), data, text, given.out)


if __name__ == "__main__":
    main()
