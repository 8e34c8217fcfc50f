"""Score tables: methods by task, methods by budget, variants by task; with intervals and paired tests."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kvweave.evals.paper.printed import printed, remark
from kvweave.evals.paper.recipe import Recipe
from kvweave.evals.paper.sheet import Sheet, Table
from kvweave.evals.paper.subject import Subject
from kvweave.evals.run.plan import FULL, PROTOCOLS
from kvweave.evals.tables.tables import about, interval, percent
from kvweave.methods.registry import method_class
from kvweave.report import charts

Summary = dict[str, Any]
_ORACLE = (
    "`oracle` keeps what the full cache's answer will look at: an analysis of how far eviction could go at that "
    "budget, not a method to use."
)
_TESTS = "p: paired tests on the same samples, not corrected for their number."


def by_task(recipe: Recipe, subject: Subject, summary: Summary) -> Sheet:
    """Methods down, tasks across, at one budget."""
    (budget,) = recipe.budgets
    own = printed(recipe.printed, subject.model, subject.data)
    names = _names(recipe)
    tables, panels = [], []
    for protocol in recipe.protocols:
        means = _means(summary, protocol)
        scores, tasks = _scores(summary, protocol)
        at = {method: 1.0 if method == FULL else budget for method in names}
        order = sorted(names, key=lambda method: (method != FULL, -(means[method, at[method]]["score"] or 0)))
        rows = [
            [names[m], interval(means[m, at[m]]), *(interval(scores[m, at[m], task]) for task in tasks)]
            for m in order
        ]
        beside = [task for task in tasks if any(key.endswith(f", {task}") for key in own)]
        if protocol == "seen":
            rows = [[*row, *(_share(own.get(f"{row[0]}, {task}")) for task in beside)] for row in rows]
        else:
            beside = []
        head = ["method", "mean", *tasks, *(f"{task}, paper" for task in beside)]
        tables.append(Table(f"At {percent(budget)}, 95 % interval ({PROTOCOLS[protocol]})", head, rows))
        cells = [[means[m, at[m]]["score"], *(scores[m, at[m], task]["score"] for task in tasks)] for m in order]
        panels.append(charts.Grid(PROTOCOLS[protocol], [names[m] for m in order], ["mean", *tasks], cells))
    return _sheet(recipe, subject, summary, tables, partial(charts.grids, panels), [_ORACLE])


def by_budget(recipe: Recipe, subject: Subject, summary: Summary) -> Sheet:
    """Methods down, budgets across, the mean over tasks."""
    budgets = recipe.budgets
    names = _names(recipe)
    tables, panels = [], []
    for protocol in recipe.protocols:
        means = _means(summary, protocol)
        coloured = {*recipe.marked, _best_published(names, means, recipe)}
        rows = [[names[m], *(interval(means.get((m, b)) or means[m, 1.0]) for b in budgets)] for m in names]
        title = f"Mean over tasks by budget, 95 % interval ({PROTOCOLS[protocol]})"
        tables.append(Table(title, ["method", *map(percent, budgets)], rows))
        curves = [
            charts.Curve(
                names[m],
                [100 * b for b in budgets],
                [means[m, b]["score"] for b in budgets],
                [means[m, b]["low"] for b in budgets],
                [means[m, b]["high"] for b in budgets],
                marked=names[m] in coloured,
                limit=m == "oracle",
            )
            for m in names
            if m != FULL and all(means[m, b]["score"] is not None for b in budgets)
        ]
        panels.append(charts.Panel(PROTOCOLS[protocol], curves, means[FULL, 1.0]["score"]))
    return _sheet(recipe, subject, summary, tables, partial(charts.curves, panels), [_ORACLE])


def _best_published(names: dict[str, str], means: dict[tuple[str, float], dict[str, Any]], recipe: Recipe) -> str:
    """Of the methods that are neither ours nor a bound, the one with the highest mean over budgets."""

    def mean(label: str) -> float:
        return sum(means[label, budget]["score"] or 0.0 for budget in recipe.budgets)

    bare = (name.partition(":")[0] for name in names)
    published = [
        label
        for label, name in zip(names, bare, strict=True)
        if name not in (FULL, "oracle", "random") and not method_class(name).source.startswith("ours")
    ]
    return names[max(published, key=mean)] if published else ""


def by_variant(recipe: Recipe, subject: Subject, summary: Summary) -> Sheet:
    """Variants down, tasks across, and whether they differ from the first."""
    (budget,) = recipe.budgets
    own = printed(recipe.printed, subject.model, subject.data)
    names = _names(recipe)
    tables, panels = [], []
    for protocol in recipe.protocols:
        means = _means(summary, protocol)
        scores, tasks = _scores(summary, protocol)
        tests = {t["method"]: t for t in summary["tests"] if t["protocol"] == protocol}
        rows = []
        for m in names:
            at = 1.0 if m == FULL else budget
            beside = [_share(own.get(f"{names[m]}, {task}")) for task in tasks] if own else []
            test = tests.get(m)
            difference = "–" if test is None else f"{test['difference']:+.2f}, {_p(test['p'])}"
            rows.append(
                [
                    names[m],
                    interval(means[m, at]),
                    *(_share(scores[m, at, t]["score"]) for t in tasks),
                    *beside,
                    difference,
                ]
            )
        first = next(iter(m for m in names if m != FULL))
        head = ["", "mean", *tasks, *(f"{task}, paper" for task in tasks if own), f"against {names[first]}"]
        tables.append(Table(f"At {percent(budget)}, 95 % interval ({PROTOCOLS[protocol]})", head, rows))
        dots = [(names[m], means[m, budget]) for m in names if m != FULL and means[m, budget]["score"] is not None]
        panels.append(
            charts.Dots(
                PROTOCOLS[protocol],
                [name for name, _ in dots],
                [row["score"] for _, row in dots],
                [row["low"] for _, row in dots],
                [row["high"] for _, row in dots],
            )
        )
    return _sheet(recipe, subject, summary, tables, partial(charts.dots, panels), [_TESTS])


def _sheet(
    recipe: Recipe,
    subject: Subject,
    summary: Summary,
    tables: Sequence[Table],
    draw: Callable[[Path], None],
    notes: Sequence[str],
) -> Sheet:
    notes = [*notes, remark(recipe.printed, subject.model, subject.data)]
    if summary["unequal"]:
        uneven = dict.fromkeys(f"{cell['method']} at {percent(cell['budget'])}" for cell in summary["unequal"])
        notes.append(f"These do not keep floor(budget x length) slots: {', '.join(uneven)}.")
    else:
        notes.append("Kept slots, measured in the cache, equal floor(budget x length) in every sample.")
    if summary["failed"]:
        notes.append(f"{len(summary['failed'])} answers are missing and have no score.")
    own = {"scores": summary["scores"], "means": summary["means"], "tests": summary["tests"]}
    facts = about(summary)
    return Sheet(recipe.name, recipe.title, recipe.shows, tables, notes, own, draw, facts[:3])


def _names(recipe: Recipe) -> dict[str, str]:
    """What each row is called, by label, the full cache first."""
    return {FULL: FULL} | recipe.shown()


def _means(summary: Summary, protocol: str) -> dict[tuple[str, float], dict[str, Any]]:
    return {(row["method"], row["budget"]): row for row in summary["means"] if row["protocol"] == protocol}


def _scores(summary: Summary, protocol: str) -> tuple[dict[tuple[str, float, str], dict[str, Any]], list[str]]:
    """Rows by method, budget and task; and the tasks in order."""
    rows = [row for row in summary["scores"] if row["protocol"] == protocol]
    scores = {(row["method"], row["budget"], row["task"]): row for row in rows}
    return scores, list(dict.fromkeys(row["task"] for row in rows))


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _p(value: float) -> str:
    return f"p={value:.3f}" if value >= 0.001 else "p<0.001"
