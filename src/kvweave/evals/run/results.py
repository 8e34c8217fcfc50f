"""A cell's result file, read and checked: it may have been torn, edited, or be another's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvweave.evals.run import store
from kvweave.evals.run.plan import Cell

Result = dict[str, Any]
_NUMBER = (int, float)
_ENTRIES: dict[str, Any] = {
    "cell": dict,
    "samples": list,
    "failed": list,
    "metrics": list,
    "missing": int,
    "seconds": _NUMBER,
    "batch": int,
    "cpu": str,
    "device": str,
    "equal": (bool, type(None)),
}
_SAMPLE = {"id": str, "answer": str, "prediction": str, "scores": dict, "length": int, "kept": list, "bytes": _NUMBER}
_FIDELITY = {"kl": _NUMBER, "top1": _NUMBER, "same": (bool,)}


def full_result(cell: Cell, out: Path) -> Result | None:
    """The result of a cell that was computed before, with no sample left to ask or to try again."""
    result = partial_result(cell, out)
    return None if result is None or result["failed"] or result["missing"] else result


def partial_result(cell: Cell, out: Path) -> Result | None:
    """What is there of a cell's result.

    Raises:
        ValueError: the file is damaged, or another cell's.
    """
    path = cell.path(out)
    if not path.exists():
        return None
    result = store.read_object(path, **_ENTRIES)
    if result["cell"] != cell.key or result["metrics"] != list(cell.task.metrics):
        raise ValueError(f"{path} holds another cell's result; delete it, and it is made again")
    wrong = [name for sample in result["samples"] if (name := _wrong(sample, cell.task.metrics))]
    wrong += ["failed" for failure in result["failed"] if _lacks(failure, {"id": str, "error": str})]
    if wrong:
        raise ValueError(f"{path} is damaged: {wrong[0]!r} of a sample; delete it, and it is made again")
    return result


def _wrong(sample: Any, metrics: Sequence[str]) -> str:
    """The entry of a sample that is not what it has to be; empty: all are."""
    if lost := _lacks(sample, _SAMPLE):
        return lost
    if _lacks(sample["scores"], dict.fromkeys(metrics, _NUMBER)):
        return "scores"
    if not all(type(count) is int for count in sample["kept"]):
        return "kept"
    fidelity = sample.get("fidelity", 0)
    return "" if fidelity is None or not _lacks(fidelity, _FIDELITY) else "fidelity"


def _lacks(entry: Any, kinds: dict[str, Any]) -> str:
    if not isinstance(entry, dict):
        return "samples"
    return next((name for name, kind in kinds.items() if not isinstance(entry.get(name), kind)), "")
