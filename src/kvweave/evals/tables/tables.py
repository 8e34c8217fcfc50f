"""From cells to tables: seeds pooled, tasks averaged, methods compared in pairs; JSON, CSV, Markdown."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvweave.evals.run import store
from kvweave.evals.run.plan import FULL, PROTOCOLS, Evaluation
from kvweave.evals.tables.intervals import RESAMPLES, compare, estimate, holm

Row = dict[str, Any]
_DETAIL = 0.2  # the budget that the papers' tables are made at
_FIDELITY = {
    "kl": "KL divergence from the full cache's next token, nats, along its answer",
    "top1": "Next token the same as the full cache's, share of its answer",
    "same": "Answers the same as the full cache's, token for token",
}


def summarise(
    evaluation: Evaluation,
    results: Sequence[dict[str, Any]],
    *,
    baseline: str | None = None,
    command: str = "",
    seconds: float | None = None,
) -> dict[str, Any]:
    """All that the tables say, JSON-able.

    `scores`: protocol x method x budget x task, seeds pooled. `means`: over tasks. `fidelity`: to the full cache,
    over tasks. `tests`: each method against `baseline` (a label of `evaluation.labels`) on the same samples.
    `unequal`: cells whose caches did not hold the slots that the budget allows. `failed`: samples without a score.
    """
    cells = _pooled(results)
    scores = [_score_row(place, cells[place]) for place in cells]
    means, fidelity, tests = [], [], []
    for protocol in evaluation.protocols:
        for method in evaluation.labels:
            for budget in _budgets(evaluation, method):
                by_task = {task.name: _by_id(cells[protocol, method, budget, task.name]) for task in evaluation.tasks}
                overall = estimate([list(by_id.values()) for by_id in by_task.values()])
                place = {"protocol": protocol, "method": method, "budget": budget}
                counts = {"samples": sum(map(len, by_task.values()))}
                counts["failed"] = sum(
                    len(result["failed"])
                    for task in evaluation.tasks
                    for result in cells[protocol, method, budget, task.name]
                )
                means.append({**place, **_numbers(overall), **counts})
                if method != FULL and evaluation.fidelity:
                    pooled = [cells[protocol, method, budget, task.name] for task in evaluation.tasks]
                    fidelity.append({**place, **_fidelity(pooled)})
                if baseline is None or method in (baseline, FULL):
                    continue
                at = budget if baseline != FULL else 1.0
                other = {task.name: _by_id(cells[protocol, baseline, at, task.name]) for task in evaluation.tasks}
                compared = compare(by_task, other)
                if compared is not None:
                    tests.append({**place, "baseline": baseline, **asdict(compared)})
    for protocol in evaluation.protocols:
        family = [test for test in tests if test["protocol"] == protocol]
        for test, p in zip(family, holm([test["p"] for test in family]), strict=True):
            test["p_holm"] = p
    return {
        "about": _about(evaluation, results, command, seconds),
        "scores": scores,
        "means": means,
        "fidelity": fidelity,
        "tests": tests,
        "unequal": [result["cell"] for result in results if result["equal"] is False],
        "failed": [{**result["cell"], **failure} for result in results for failure in result["failed"]],
    }


def _about(
    evaluation: Evaluation, results: Sequence[dict[str, Any]], command: str, seconds: float | None
) -> dict[str, Any]:
    """How the results came about."""
    return {
        "command": command,
        "model": evaluation.model,
        "tasks": [task.to_dict() for task in evaluation.tasks],
        "seeds": list(evaluation.seeds),
        "batch": sorted({result["batch"] for result in results}),
        "cpu": sorted({result["cpu"] for result in results}),
        "device": sorted({result["device"] for result in results}),
        "versions": store.versions(),
        "seconds": seconds,
        "seconds_of_cells": round(sum(result["seconds"] for result in results), 1),
    }


def _budgets(evaluation: Evaluation, method: str) -> tuple[float | int, ...]:
    return (1.0,) if method == FULL else evaluation.budgets


def _pooled(results: Sequence[dict[str, Any]]) -> dict[tuple[str, str, float | int, str], list[dict[str, Any]]]:
    """Results of all seeds together."""
    cells: dict[tuple[str, str, float | int, str], list[dict[str, Any]]] = {}
    for result in results:
        cell = result["cell"]
        cells.setdefault((cell["protocol"], cell["method"], cell["budget"], cell["task"]), []).append(result)
    return cells


def _by_id(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {s["id"]: s["scores"][result["metrics"][0]] for result in results for s in result["samples"]}


def _fidelity(tasks: Sequence[Sequence[dict[str, Any]]]) -> Row:
    """Means over tasks, with intervals, of what is known of each sample's fidelity to the full cache."""
    rows_with = [
        [sample["fidelity"] for result in results for sample in result["samples"] if sample["fidelity"]]
        for results in tasks
    ]
    row: Row = {
        name: _numbers(estimate([[float(one[name]) for one in task] for task in rows_with], shares=name != "kl"))
        for name in ("kl", "top1", "same")
    }
    return {**row, "samples": sum(map(len, rows_with))}


def _numbers(overall: Any) -> Row:
    if overall is None:
        return {"score": None, "low": None, "high": None}
    return {"score": overall.mean, "low": overall.low, "high": overall.high}


def _score_row(place: tuple[str, str, float | int, str], results: Sequence[dict[str, Any]]) -> Row:
    samples = [sample for result in results for sample in result["samples"]]
    count = len(samples)
    protocol, method, budget, task = place
    layers = list(zip(*(sample["kept"] for sample in samples), strict=True))
    return {
        "protocol": protocol,
        "method": method,
        "budget": budget,
        "task": task,
        "metric": results[0]["metrics"][0],
        **_numbers(estimate([list(_by_id(results).values())])),
        "besides": {
            name: sum(sample["scores"][name] for sample in samples) / count if count else None
            for name in results[0]["metrics"][1:]
        },
        "samples": count,
        "failed": sum(len(result["failed"]) for result in results),
        "length": sum(sample["length"] for sample in samples) / count if count else None,
        "kept": [sum(layer) / count for layer in layers],
        "bytes": sum(sample["bytes"] for sample in samples) / count if count else None,
        "equal": all(result["equal"] is not False for result in results),
    }


# -------------------------------------------------------------------- as files


def write_tables(summary: dict[str, Any], out: Path) -> None:
    """`table.json`, `table.csv` and `table.md` under `out`."""
    store.write_json(out / "table.json", summary)
    store.write_text(out / "table.csv", as_csv(summary))
    store.write_text(out / "table.md", markdown(summary))


def as_csv(summary: dict[str, Any]) -> str:
    """One line for each protocol, method, budget and task."""
    text = io.StringIO()
    rows = [
        {**row, "kept": sum(row["kept"]) / len(row["kept"]) if row["kept"] else None} for row in summary["scores"]
    ]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown(summary: dict[str, Any]) -> str:
    """The tables with what made them, fit for a README."""
    parts = ["\n".join(f"- {line}" for line in about(summary))]
    for title, head, rows in tables(summary):
        lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] + ["--:"] * (len(head) - 1), *rows)]
        parts += [f"**{title}**", "\n".join(lines)]
    for note, items in notes(summary):
        parts += [note, *(["\n".join(f"- {item}" for item in items)] if items else [])]
    return "\n\n".join(parts) + "\n"


# -------------------------------------------------------------------- what they say


def about(summary: dict[str, Any]) -> list[str]:
    """Command, machine, versions, samples and seeds, a line each."""
    facts = summary["about"]
    counts = {row["samples"] + row["failed"] for row in summary["scores"]}
    lengths = [row["length"] for row in summary["scores"] if row["length"] is not None]
    lines = [
        f"Command: `{facts['command']}`",
        f"Machine: {', '.join(facts['cpu'])}, device {', '.join(facts['device'])}; "
        + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        f"Model `{facts['model']}`; {len(facts['tasks'])} tasks of {_range(counts)} samples, "
        f"prompts of {_range(lengths)} tokens (means of the tasks), seeds {', '.join(map(str, facts['seeds']))}, "
        f"batch {', '.join(map(str, facts['batch']))}",
    ]
    if facts["seconds"] is not None:
        lines.append(f"Took {facts['seconds']:.0f} s ({facts['seconds_of_cells']:.0f} s of computing)")
    return lines


def tables(summary: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of each table, as text."""
    texts = []
    for protocol in dict.fromkeys(row["protocol"] for row in summary["means"]):
        where = PROTOCOLS[protocol]
        means = [row for row in summary["means"] if row["protocol"] == protocol]
        methods = _by_score(means)
        budgets = list(dict.fromkeys(row["budget"] for row in means if row["method"] != FULL)) or [1.0]
        at = {(row["method"], row["budget"]): row for row in means}
        rows = [[m, *(interval(at.get((m, b)) or at.get((m, 1.0))) for b in budgets)] for m in methods]
        title = f"Mean over tasks by budget, 95 % interval ({where})"
        texts.append((title, ["method", *map(percent, budgets)], rows))

        tests = {(r["method"], r["budget"]): r for r in summary["tests"] if r["protocol"] == protocol}
        if tests:
            compared = [method for method in methods if any((method, b) in tests for b in budgets)]
            rows = [[m, *(_difference(tests.get((m, b))) for b in budgets)] for m in compared]
            base = next(iter(tests.values()))["baseline"]
            title = f"Difference to {base} on the same samples, 95 % interval, p ({where})"
            texts.append((title, ["method", *map(percent, budgets)], rows))

        measures = {(r["method"], r["budget"]): r for r in summary["fidelity"] if r["protocol"] == protocol}
        for name, title in _FIDELITY.items() if measures else ():
            compared = [method for method in methods if method != FULL]
            rows = [[m, *(interval(measures.get((m, b), {}).get(name)) for b in budgets)] for m in compared]
            texts.append((f"{title}, 95 % interval ({where})", ["method", *map(percent, budgets)], rows))

        budget = _DETAIL if _DETAIL in budgets else budgets[0]
        scores = [row for row in summary["scores"] if row["protocol"] == protocol]
        tasks = list(dict.fromkeys(row["task"] for row in scores))
        by_task = {(row["method"], row["task"]): row for row in scores if row["budget"] in (budget, 1.0)}
        by_task |= {(row["method"], row["task"]): row for row in scores if row["budget"] == budget}
        rows = [[m, *(interval(by_task.get((m, task))) for task in tasks)] for m in methods]
        besides = list(dict.fromkeys((row["task"], name) for row in scores for name in row["besides"]))
        rows = [[*row, *(_besides(by_task.get((row[0], task)), name) for task, name in besides)] for row in rows]
        head = ["method", *tasks, *(f"{task}, {name}" for task, name in besides)]
        texts.append((f"By task at {percent(budget)} ({where})", head, rows))
    return texts


def _by_score(means: Sequence[Row]) -> list[str]:
    """Methods, the full cache first, then the best of all budgets; what has no score comes last."""
    scores: dict[str, list[float]] = {}
    for row in means:
        scores.setdefault(row["method"], []).append(-1.0 if row["score"] is None else row["score"])
    return sorted(scores, key=lambda method: (method != FULL, -sum(scores[method]) / len(scores[method])))


def notes(summary: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """What a reader must know, with items: whether budgets were equal, what the tests are, what failed."""
    groups: list[tuple[str, list[str]]] = []
    if summary["unequal"]:
        cells = [", ".join(f"{name} {value}" for name, value in cell.items()) for cell in summary["unequal"]]
        groups.append(("Kept slots, measured in the cache, differ from floor(budget x length) in:", cells))
    else:
        equal = "Kept slots, measured in the cache, equal floor(budget x length) in every sample (mean over layers)."
        groups.append((equal, []))
    if summary["tests"]:
        tests = (
            f"Differences: intervals by a paired bootstrap within tasks ({RESAMPLES} resamples); p by the exact sign "
            "test on the samples that differ (McNemar's for right and wrong), after Holm's correction for all "
            "comparisons of a protocol"
        )
        groups.append((f"{tests}.", []))
    if summary["failed"]:
        alike: dict[str, list[str]] = {}
        for failure in summary["failed"]:
            where = f"{failure['protocol']} {failure['method']} at {percent(failure['budget'])}"
            alike.setdefault(f"{failure['id']}: {failure['error']}", []).append(where)
        each = [f"{what} ({'; '.join(where)})" for what, where in alike.items()]
        groups.append((f"{len(summary['failed'])} answers are missing, and have no score:", each))
    return groups


def _range(values: Iterable[float]) -> str:
    """The least and the largest of some numbers, once if they are alike."""
    values = list(values)
    ends = dict.fromkeys(f"{value:.0f}" for value in (min(values), max(values))) if values else ["no"]
    return "–".join(ends)


def percent(budget: float | int) -> str:
    """A budget as a table's head has it."""
    return f"{budget} tokens" if isinstance(budget, int) else f"{100 * budget:g} %"


def interval(row: Row | None) -> str:
    """A mean with its interval, and how many samples are missing from it."""
    if row is None or row["score"] is None:
        return "–"
    lost = f" ({row['failed']} missing)" if row.get("failed") else ""
    return f"{row['score']:.2f} [{row['low']:.2f}, {row['high']:.2f}]{lost}"


def _besides(row: Row | None, name: str) -> str:
    value = row["besides"].get(name) if row is not None else None
    return "–" if value is None else f"{value:.2f}"


def _difference(row: Row | None) -> str:
    if row is None:
        return "–"
    p = f"p={row['p_holm']:.3f}" if row["p_holm"] >= 0.001 else "p<0.001"
    return f"{row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}] {p}"
