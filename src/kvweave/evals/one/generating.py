"""One generation, timed, with what became of each token of its prompt."""

import itertools
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvweave.methods.base import Method
from kvweave.models.loading import ModelError
from kvweave.seam.cache import CompressedCache
from kvweave.seam.entry import compress
from kvweave.seam.session import Session


@dataclass(frozen=True)
class Generation:
    """What a model made of a prompt.

    Attributes:
        text: the answer, without special tokens; tokens: how many there were, the end included.
        prefill_seconds: until the first token, image encoder included.
        step_seconds: from each token to the next.
        report: of the compression, as `Session.report`; empty without a method.
        fates: of each compressed layer int64 [kv_heads, length], the slot that each slot lives on in, -1: evicted;
            None where a layer kept everything.
    """

    text: str
    tokens: int
    prefill_seconds: float
    step_seconds: list[float]
    report: dict[str, Any] = field(default_factory=dict)
    fates: list[Tensor | None] = field(default_factory=list)


class Arrivals:
    """A streamer that notes when tokens arrive; `generate` hands the prompt over first."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock, self.times = clock, list[float]()

    def put(self, value: Tensor) -> None:
        self.times.append(self.clock())

    def end(self) -> None:
        """Nothing is left to do."""


def generate(
    model: Any, processor: Any, inputs: Any, method: Method | None, max_new_tokens: int, min_new_tokens: int = 0
) -> Generation:
    """Answer greedily, the cache compressed by `method`, or with None left to transformers as it is.

    Args:
        inputs: one prompt, as `encode` gives it, or a mapping like that.
        min_new_tokens: an answer may not end before.
    Raises:
        ModelError: kvweave cannot compress this model; the message says why.
    """
    clock = Arrivals()
    inputs = {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    lengths = {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}
    arguments = {**inputs, **lengths, "do_sample": False, "streamer": clock}
    report: dict[str, Any] = {}
    fates: list[Tensor | None] = []
    started = time.perf_counter()
    with torch.inference_mode():
        if method is None:
            out = model.generate(**arguments)
        else:
            session = _attached(model, method)
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "kvweave compressed no layer")  # the report says so, too
                    out = model.generate(**arguments)
            finally:
                session.detach()
            report = session.report
            _check_layers(report)
            layers: list[Any] = [] if session.cache is None else session.cache.layers
            for layer in report.get("layers", []):
                if layer["compressed"]:
                    fate = layers[layer["layer"]].fate
                    fates.append(fate[0].cpu() if fate else None)
    new = out[0, inputs["input_ids"].shape[1] :]
    tokens = clock.times[1:]
    return Generation(
        text=processor.decode(new, skip_special_tokens=True).strip(),
        tokens=len(new),
        prefill_seconds=tokens[0] - started,
        step_seconds=[after - before for before, after in itertools.pairwise(tokens)],
        report=report,
        fates=fates,
    )


def check_compressible(model: Any, method: Method) -> None:
    """Refuse a model that kvweave cannot compress, before it is run.

    Raises:
        ModelError: the message says why.
    """
    _attached(model, method).detach()
    cache = CompressedCache(model.config, method)
    if not cache.compressed_layers:
        _refuse(layer["kind"] for layer in cache.report["layers"])


def _attached(model: Any, method: Method) -> Session:
    session = compress(model, method, trace=True)
    try:
        return session.attach()
    except ValueError as error:
        raise ModelError(str(error)) from error


def _check_layers(report: dict[str, Any]) -> None:
    """What only a run tells: a model with a cache of its own, or one that transforms keys behind the cache."""
    if not report:
        raise ModelError("the model kept no cache: allowed is one that decodes with a KV cache")
    if not report["totals"]["layers"]:
        _refuse(layer["kind"] for layer in report["layers"])


def _refuse(kinds: Iterable[str]) -> None:
    raise ModelError(
        f"the model has no layer that can be compressed (its layers are {', '.join(sorted(set(kinds))) or 'none'}): "
        "allowed is one with full attention layers"
    )
