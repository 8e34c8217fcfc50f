"""Computes a plan's cells, in this process or in several, and resumes where it was interrupted."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvweave import models
from kvweave.evals.answer.answering import Answer, Batch, answer, prefill, prepare
from kvweave.evals.answer.fidelity import Reference
from kvweave.evals.answer.prefill import Prefill
from kvweave.evals.run import processes, store
from kvweave.evals.run.plan import FULL, Cell, Evaluation
from kvweave.evals.run.results import Result, full_result, partial_result
from kvweave.evals.scores.metrics import METRICS
from kvweave.evals.tasks.tasks import Example
from kvweave.methods import Method
from kvweave.models.loading import no_bars
from kvweave.ops.brief import brief
from kvweave.ops.budget import entries

#: Hears of a cell that is finished: its result, how many are, how many there are, and whether it was read from disk.
Progress = Callable[[Result, int, int, bool], None]
#: Hears what a cell at work in this process has come to: how many of its samples are done, of how many.
Tick = Callable[[Cell, int, int], None]
_BATCH_BYTES = 2**30  # bytes of prompts that a worker keeps, read, for the next methods
_PREFILL_BYTES = 2**31  # and of their prefills


def run(
    evaluation: Evaluation,
    out: Path,
    *,
    batch: int = 50,
    workers: int = 1,
    ray: str | None = None,
    device: str = "auto",
    command: str = "",
    progress: Progress | None = None,
    tick: Tick | None = None,
) -> list[Result]:
    """All cells' results, in the order of `evaluation.cells()`.

    A cell's file is written anew whenever a batch is answered, whole or not at all. What is in `out` is not computed
    again, unless it failed.

    Args:
        out: the folder of this evaluation, made if it is not there.
        batch: prompts that are answered together.
        workers: processes; 1: this one.
        ray: address of a Ray cluster whose machines share the cells and the folder `out` ("auto": the one at hand,
            "local": one of this machine's own); None: processes of this machine.
        device: "auto": CUDA where there is one.
        command: goes into the result files.

    Raises:
        ValueError: an option that is not allowed, or a folder that holds results of other options.
    """
    for name, value in (("batch", batch), ("workers", workers)):
        if not 1 <= value < 2**31:
            raise ValueError(f"{name}={brief(value)} is not allowed: allowed is an int >= 1, below 2**31")
    device = models.pick_device(device)
    evaluation.claim(out)
    cells = evaluation.cells()
    results = {n: done for n, cell in enumerate(cells) if (done := full_result(cell, out)) is not None}
    for count, result in enumerate(results.values(), 1):
        if progress:
            progress(result, count, len(cells), True)
    about = {"command": command, "batch": batch, "cpu": store.cpu(), "device": device, "versions": store.versions()}
    worker = Worker(evaluation, out, batch, device, about)
    phases = [  # what is compressed is held against the full cache's answers
        {n: cell for n, cell in enumerate(cells) if n not in results and cell.is_full == full}
        for full in (True, False)
    ]
    for n, result in _computed(worker, phases, workers, ray, tick):
        results[n] = result
        if progress:
            progress(result, len(results), len(cells), False)
    return [results[n] for n in range(len(cells))]


def _computed(
    worker: "Worker", phases: Sequence[dict[int, Cell]], workers: int, ray: str | None, tick: Tick | None
) -> Iterator[tuple[int, Result]]:
    workers = min(workers, max(map(len, phases)))
    if ray is not None and workers:
        yield from processes.on_ray(worker, phases, workers, ray)
    elif workers > 1:
        yield from processes.here(worker, phases, workers)
    else:
        for n, cell in (numbered for cells in phases for numbered in cells.items()):
            yield n, worker(cell, tick)


class Worker:
    """Computes cells one after the other; loads the model, reads a task's prompts, and prefills them, once."""

    def __init__(self, evaluation: Evaluation, out: Path, batch: int, device: str, about: dict[str, Any]) -> None:
        self.model, self.dtype, self.device = evaluation.model, evaluation.dtype, device
        self.fidelity, self.trusted = evaluation.fidelity, evaluation.trust_remote_code
        self.out, self.batch, self.about = out, batch, about
        self._loaded: tuple[Any, Any] | None = None
        self._read: tuple[Any, Sequence[Example], dict[tuple[str, ...], Batch]] | None = None
        self._prefills: dict[tuple[str, ...], Prefill] = {}

    def __call__(self, cell: Cell, tick: Tick | None = None) -> Result:
        """The cell's result, written to its file batch by batch."""
        start = time.perf_counter()
        examples, prepared = self._examples(cell)
        before = partial_result(cell, self.out) or {"samples": [], "seconds": 0.0}
        samples = {sample["id"]: sample for sample in before["samples"]}
        rest = [example for example in examples if example.id not in samples]
        failed: list[dict[str, Any]] = []
        result = self._result(cell, examples, samples, failed, before["seconds"])
        for batch in batches(rest, cell.protocol, self.batch):
            for example, outcome in zip(batch, self._answers(cell, batch, prepared), strict=True):
                if isinstance(outcome, str):
                    failed.append({"id": example.id, "error": outcome})
                else:
                    samples[example.id] = outcome
            seconds = before["seconds"] + time.perf_counter() - start
            result = self._result(cell, examples, samples, failed, seconds)
            store.write_json(cell.path(self.out), result)
            if tick:
                tick(cell, len(samples) + len(failed), len(examples))
        return result

    def _result(
        self,
        cell: Cell,
        examples: Sequence[Example],
        samples: dict[str, dict[str, Any]],
        failed: list[dict[str, Any]],
        seconds: float,
    ) -> Result:
        answers = [samples[example.id] for example in examples if example.id in samples]
        return {
            "cell": cell.key,
            "method": cell.method.to_dict(),
            "metrics": list(cell.task.metrics),
            "samples": answers,
            "failed": list(failed),
            "missing": len(examples) - len(answers) - len(failed),
            **_measured(cell, answers),
            "seconds": round(seconds, 3),
            **self.about,
        }

    def _model(self) -> tuple[Any, Any]:
        if self._loaded is None:
            with no_bars():
                self._loaded = models.load(self.model, self.dtype, self.device, trust_remote_code=self.trusted)
        return self._loaded

    def _examples(self, cell: Cell) -> tuple[Sequence[Example], dict[tuple[str, ...], Batch]]:
        """The cell's samples, and the batches that have been read; kept for the next cell."""
        key = cell.protocol, cell.task, cell.seed
        if self._read is None or self._read[0] != key:
            self._read = key, cell.task.examples(cell.seed), {}
            self._prefills.clear()
        return self._read[1:]

    def _answers(
        self, cell: Cell, examples: Sequence[Example], prepared: dict[tuple[str, ...], Batch]
    ) -> list[dict[str, Any] | str]:
        """What is to be stored, or an error in its place, for each sample: one does not take others along."""
        model, processor = self._model()
        if not models.reads_images(processor) and any(map(_shows_images, examples)):
            raise ValueError(f"model={self.model!r} reads text only: allowed here is a model that reads images")
        try:
            batch = self._prepared(processor, examples, cell.protocol, prepared)
            references = [Reference.load(cell.reference(self.out, example.id)) for example in examples]
            answers = answer(
                model,
                processor,
                cell.method,
                batch,
                cell.task.max_new_tokens,
                self._prefill(cell, batch),
                references=references if self.fidelity and not cell.is_full else (),
                refer=self.fidelity and cell.is_full,
                probed=cell.protocol == "probed",
            )
            for example, one in zip(examples, answers, strict=True):
                if one.reference is not None:
                    one.reference.save(cell.reference(self.out, example.id))
            return [_scored(cell.task.metrics, example, one) for example, one in zip(examples, answers, strict=True)]
        except Exception as error:
            if len(examples) == 1:
                return [f"{type(error).__name__}: {error}"]
        return [one for example in examples for one in self._answers(cell, [example], {})]

    def _prepared(
        self, processor: Any, examples: Sequence[Example], protocol: str, memo: dict[tuple[str, ...], Batch]
    ) -> Batch:
        key = tuple(example.id for example in examples)
        batch = memo.get(key) or prepare(processor, examples, protocol)
        if key not in memo and sum(other.nbytes for other in memo.values()) + batch.nbytes <= _BATCH_BYTES:
            memo[key] = batch
        return batch

    def _prefill(self, cell: Cell, batch: Batch) -> Prefill | None:
        """The batch's prefill, where there is room for it; the full cache's one answer needs none."""
        key = tuple(example.id for example in batch.examples)
        if key not in self._prefills and not cell.is_full:
            model = self._model()[0]
            room = _PREFILL_BYTES - sum(other.nbytes for other in self._prefills.values())
            if _prefill_bytes(model.config, batch, model.dtype.itemsize) > room:
                return None
            self._prefills[key] = prefill(model, batch, cell.task.max_new_tokens)
        return self._prefills.get(key)


def _prefill_bytes(config: Any, batch: Batch, itemsize: int) -> int:
    """What the prompt's keys, values and queries come to."""
    decoder = config.get_text_config(decoder=True)
    heads = decoder.num_attention_heads
    dim = getattr(decoder, "head_dim", None) or decoder.hidden_size // heads
    rows = heads + 2 * (getattr(decoder, "num_key_value_heads", None) or heads)
    return decoder.num_hidden_layers * rows * dim * itemsize * batch.inputs["input_ids"].numel()


def _shows_images(example: Example) -> bool:
    return any(piece["type"] == "image" for turn in example.messages for piece in turn["content"])


def batches(examples: Sequence[Example], protocol: str, size: int) -> list[list[Example]]:
    """Examples that are answered together: of so many prompts, all questions about a context in one batch."""
    groups: dict[str, list[Example]] = {}
    for n, example in enumerate(examples):
        alone = protocol == "seen" or not example.context
        groups.setdefault(f"{n}" if alone else example.context, []).append(example)
    rows = list(groups.values())
    return [[example for row in rows[at : at + size] for example in row] for at in range(0, len(rows), size)]


def _scored(metrics: Sequence[str], example: Example, reply: Answer) -> dict[str, Any]:
    return {
        "id": example.id,
        "answer": example.answer,
        "prediction": reply.text,
        "scores": {name: METRICS[name](reply.text, example.answer, example.choices) for name in metrics},
        "length": reply.length,
        "kept": reply.kept,
        "bytes": reply.bytes,
        "fidelity": asdict(reply.fidelity) if reply.fidelity else None,
    }


def _measured(cell: Cell, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of what the caches held, and whether it is what the budget allows, to the slot, in every sample."""
    if not samples:
        return {"length": None, "kept": [], "bytes": None, "equal": None}
    count, layers = len(samples), len(samples[0]["kept"])
    return {
        "length": sum(sample["length"] for sample in samples) / count,
        "kept": [sum(sample["kept"][layer] for sample in samples) / count for layer in range(layers)],
        "bytes": sum(sample["bytes"] for sample in samples) / count,
        "equal": all(_spent(cell.method, s["kept"]) == allowed(cell.method, s["length"]) for s in samples),
    }


def _spent(method: Method, kept: list[int]) -> float:
    """Mean entries of a layer; where all layers share, a layer's own count is a rounded mean of its heads."""
    mean, works = sum(kept) / len(kept), method.on_model(lambda: None)
    return round(mean) if works.pools or works.profiles else mean


def allowed(method: Method, length: int) -> int:
    """Entries a layer that a budget comes to; all of them for the full cache."""
    return length if method.name == FULL else entries(method.budget, length, 1)
