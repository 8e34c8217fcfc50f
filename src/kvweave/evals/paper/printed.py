"""The papers' own numbers (`printed.json`), where they may stand beside ours: same model, same data."""

import json
from importlib import resources
from typing import Any

_MODEL = "Qwen2.5-VL-7B"  # whose numbers all printed tables have


def printed(table: str, model: str, data: str) -> dict[str, float]:
    """What the paper printed, in [0, 1], by "method, task"; empty where model or data are others.

    Args:
        table: of `printed.json`; model: as typed; data: name of the data, "" for the lab's.
    """
    if not (table and data and _MODEL.lower() in model.lower()):
        return {}
    figures = read(table)
    if table == "table1":
        rows = figures["scores"][_MODEL]
        return {
            f"{method}, {task}": value / 100
            for method, values in rows.items()
            for task, value in zip(figures["tasks"], values, strict=True)
        }
    if table == "table3":
        return {
            f"theta {theta:g}, {task}": value / 100
            for task in ("TextNeedleInAHaystack", "ALFRED")
            for theta, value in zip(figures["theta"], figures[task], strict=True)
        }
    names = {
        "full": "full",
        "flowmm": "FlowMM",
        "without_flow": "without information flow",
        "without_sensitivity": "without sensitivity",
        "without_both": "without both",
    }
    return {
        f"{name}, {task}": value / 100
        for key, name in names.items()
        for task, value in zip(figures["tasks"], figures[key], strict=True)
    }


def read(table: str) -> dict[str, Any]:
    """One table as it was printed."""
    text = resources.files("kvweave.evals.paper").joinpath("printed.json").read_text(encoding="utf-8")
    return dict(json.loads(text)[table])


def remark(table: str, model: str, data: str) -> str:
    """Why the paper's numbers do not stand here, or where they come from."""
    if not table:
        return "No numbers of the paper are at hand for this one."
    if not data:
        return f"The paper's numbers are of other models on MileBench; these are of `{model}` on the lab's questions."
    if _MODEL.lower() not in model.lower():
        return f"The paper's numbers at hand are of {_MODEL}; these are of `{model}`."
    return "Columns named *paper* hold what the paper printed, as shares."
