"""Figures that many sheets show, each kept once: rows of scores, means and tests as nested arrays, and back.

    tasks   {protocol: {task: {"metric", "samples", "length", "besides"}}}
    scores  {protocol: {method: {budget: {task: [score, low, high, kept, bytes, *besides]}}}}
    means   {protocol: {method: {budget: [score, low, high]}}}
    tests   {protocol: {method: {budget: {baseline: [difference, low, high, better, worse, p]}}}}

`kept` is a number where all layers keep equally many. What differs from its task's or from what is usual (no failed
sample, every budget kept) stands in an object at an array's end. p is that of the test alone: Holm's correction
depends on what else is compared.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Figures = dict[str, Any]
Row = dict[str, Any]

_KEYS = {
    "scores": ("protocol", "method", "budget", "task"),
    "means": ("protocol", "method", "budget"),
    "tests": ("protocol", "method", "budget", "baseline"),
}
_VALUES = {
    "scores": ("score", "low", "high", "kept", "bytes"),
    "means": ("score", "low", "high"),
    "tests": ("difference", "low", "high", "better", "worse", "p"),
}
_OF_TASK = ("metric", "samples", "length")
_USUAL = {"failed": 0, "equal": True}


def round_data(data: Any) -> Any:
    """JSON-able data with four decimals, or four digits of what is smaller than one."""
    if isinstance(data, float):
        return float(f"{data:.4g}") if abs(data) < 1 else round(data, 4)
    if isinstance(data, Mapping):
        return {name: round_data(value) for name, value in data.items()}
    return [round_data(value) for value in data] if isinstance(data, list | tuple) else data


def packed(sheets: Iterable[Mapping[str, Any]]) -> Figures:
    """All figures of sheets of one model, rounded.

    Raises:
        ValueError: two sheets say different things of the same cell.
    """
    figures: Figures = {"tasks": {}, **{kind: {} for kind in _KEYS}}
    for sheet in sheets:
        for kind in _KEYS:
            for row in sheet.get(kind, ()):
                _put(figures, kind, round_data(row))
    return figures


def _put(figures: Figures, kind: str, row: Row) -> None:
    values = [_short(row[name]) for name in _VALUES[kind]]
    if kind == "scores":
        about = {**{name: row[name] for name in _OF_TASK}, "besides": list(row["besides"])}
        usual = figures["tasks"].setdefault(row["protocol"], {}).setdefault(row["task"], about)
        values += [_short(row["besides"][name]) for name in usual["besides"]]
        other = {
            name: row[name] for name, value in {**usual, **_USUAL}.items() if name != "besides" and row[name] != value
        }
        values += [other] if other else []
    elif kind == "means" and row["failed"]:
        values.append({"failed": row["failed"]})
    *path, last = (str(row[key]) for key in _KEYS[kind])
    place = figures[kind]
    for key in path:
        place = place.setdefault(key, {})
    if place.setdefault(last, values) != values:
        raise ValueError(f"{kind} of {', '.join([*path, last])}: {place[last]} in one sheet, {values} in another")


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return _short(value[0]) if len(set(value)) == 1 else [_short(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def shown(sheet: Mapping[str, Any]) -> dict[str, Any]:
    """Which of a model's figures a sheet shows: methods by protocol, budgets, and what methods are tested against."""
    methods: dict[str, dict[str, None]] = {}
    for row in sheet["means"]:
        methods.setdefault(row["protocol"], {})[row["method"]] = None
    return {
        "methods": {protocol: list(names) for protocol, names in methods.items()},
        "budgets": list(dict.fromkeys(row["budget"] for row in sheet["means"])),
        "baselines": list(dict.fromkeys(row["baseline"] for row in sheet["tests"])),
    }


def rows(figures: Figures, kind: str, chosen: Mapping[str, Any]) -> Iterator[Row]:
    """The rows of one kind that a sheet shows.

    Args:
        kind: "scores", "means" or "tests"; chosen: what `shown` said of the sheet.
    """
    for protocol, methods in chosen["methods"].items():
        for method in methods:
            for budget in chosen["budgets"]:
                place = figures[kind].get(protocol, {}).get(method, {}).get(str(budget))
                if place is None:
                    continue  # the full cache has one budget
                where = {"protocol": protocol, "method": method, "budget": budget}
                if kind == "means":
                    yield where | {"failed": 0} | _named(kind, place)
                    continue
                for name, values in place.items():
                    row = where | {_KEYS[kind][-1]: name}
                    if kind == "tests":
                        if name in chosen["baselines"]:
                            yield row | _named(kind, values)
                        continue
                    about = figures["tasks"][protocol][name]
                    besides = dict(zip(about["besides"], values[len(_VALUES[kind]) :], strict=False))
                    usual = {key: about[key] for key in _OF_TASK} | _USUAL
                    yield row | usual | {"besides": besides} | _named(kind, values)


def _named(kind: str, values: list[Any]) -> Row:
    other = values[-1] if isinstance(values[-1], dict) else {}
    return dict(zip(_VALUES[kind], values, strict=False)) | other
