"""Results in MileBench's own file layout, so that its own scorer reads them.

    outputs/<model>-<method>-<budget>-<protocol>/<Task>/pred.json, eval.json, eval_score.json
    outputs/result.json, result.csv

A folder for each method at each budget stands where MileBench has one for each model. `eval.json` and the rest are
what its scorer writes, computed by `scores.milebench`; a task with failed samples has `pred.json` only, as its scorer
refuses it.
"""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvweave.evals.run import store
from kvweave.evals.run.plan import Evaluation
from kvweave.evals.scores import milebench
from kvweave.evals.tasks.milebench import MileBenchTask, Sample

_LEVELS = ("Few", "Medium", "Many")
_SEMANTIC = (
    *("ALFRED", "CLEVR-Change", "DocVQA", "IEdit", "MMCoQA", "MultiModalQA", "nuscenes"),
    *("OCR-VQA", "SlideVQA", "Spot-the-Diff", "TQA", "WebQA", "WikiVQA"),
)
_DIAGNOSTIC = ("GPR1200", "ImageNeedleInAHaystack", "TextNeedleInAHaystack")


def write_outputs(evaluation: Evaluation, results: Sequence[dict[str, Any]], out: Path) -> Path | None:
    """Write all of it under `out`; None where no task is MileBench's."""
    folder = out / "outputs"
    tasks = {task.name: task for task in evaluation.tasks if isinstance(task, MileBenchTask)}
    samples = {name: task.samples() for name, task in tasks.items()}
    evals: dict[str, dict[str, dict[str, Any]]] = {}
    for result in results:
        name = result["cell"]["task"]
        if name in tasks:
            entry = _entry(evaluation, result["cell"])
            rows = _written(folder / entry / name, entry, tasks[name], samples[name], result)
            evals.setdefault(entry, {}).setdefault(_category(name), {})[name] = rows
    if not evals:
        return None
    store.write_json(folder / "result.json", evals)
    store.write_text(folder / "result.csv", _table(evals))
    return folder


def _entry(evaluation: Evaluation, cell: dict[str, Any]) -> str:
    """What stands in the place of a model's name."""
    model = Path(evaluation.model).name
    seed = f"-seed{cell['seed']}" if len(evaluation.seeds) > 1 else ""
    return re.sub(r"[^\w.,=-]", "_", f"{model}-{cell['method']}-{cell['budget']}-{cell['protocol']}{seed}")


def _category(name: str) -> str:
    if name in _SEMANTIC:
        return "Realistic Semantic"
    return "Diagnostic" if name in _DIAGNOSTIC else "Realistic Temporal"


def _written(
    folder: Path, entry: str, task: MileBenchTask, samples: Sequence[Sample], result: dict[str, Any]
) -> dict[str, Any]:
    """One task's files; what `eval.json` holds, nothing if samples are missing."""
    replies = {sample["id"]: sample["prediction"] for sample in result["samples"]}
    seed = result["cell"]["seed"]
    pairs = [(sample, replies[key]) for sample in samples if (key := f"{task.name}/{seed}/{sample.id}") in replies]
    settings = {"max_new_tokens": task.max_new_tokens, "do_sample": False}
    predictions = [
        {
            "sample_id": sample.id,
            "image": list(sample.images),
            "question": sample.prompt,
            "gt_response": sample.response,
            "gen_model_id": entry,
            "pred_response": prediction,
            "gen_kwargs": settings,
        }
        for sample, prediction in sorted(pairs, key=lambda pair: len(pair[0].images))
    ]
    store.write_json(folder / "pred.json", predictions, indent=4)
    if len(pairs) < len(samples):
        return {}
    metric, scores = _official(task, pairs)
    levels: dict[str, list[float]] = {level: [] for level in _LEVELS}
    for (sample, _), score in zip(pairs, scores, strict=True):
        levels[sample.quantity].append(score)
    facts = {
        metric: float(np.mean(scores)),
        "image_quantity_level-Accuracy": {name: float(np.mean(x)) if x else 0 for name, x in levels.items()},
        "image_quantity_level-Result": {name: [sum(x), len(x)] for name, x in levels.items()},
    }
    store.write_json(folder / "eval.json", facts)
    each = [
        {"id": str(sample.id), "score": str(round(score, 3) if metric == "Rouge-L f" else int(score))}
        for (sample, _), score in zip(pairs, scores, strict=True)
    ]
    store.write_json(folder / "eval_score.json", each, indent=4)
    return facts


def _official(task: MileBenchTask, pairs: Sequence[tuple[Sample, str]]) -> tuple[str, list[float]]:
    """The metric's name in `eval.json`, and each sample's score, as MileBench's scorer picks and computes them."""
    name, score = {
        "rouge": ("Rouge-L f", milebench.rouge),
        "choice": ("Accuracy", milebench.choice),
        "needle": ("Accuracy", milebench.needle),
        "contains": ("Accuracy", milebench.contains),
    }[task.official]
    return name, [score(prediction, sample.response, sample.choices) for sample, prediction in pairs]


def _table(evals: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A line for each entry, a column for each task and metric, in percent."""
    rows = []
    for entry, categories in evals.items():
        row: dict[str, Any] = {"Model": entry}
        for tasks in categories.values():
            for name, lines in tasks.items():
                row |= {f"{name} ({m})": round(100 * x, 2) for m, x in lines.items() if isinstance(x, float)}
        rows.append(row)
    text = io.StringIO()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
