"""What the project asks of itself, and what was measured here."""

from __future__ import annotations

import kvweave
from benchmarks.gpu.model import FULL
from benchmarks.gpu.plan import BUDGET
from benchmarks.gpu.prefill import FLASHCACHE
from benchmarks.gpu.report import Report
from kvweave.methods.needs import ALL_ROWS

ROOFLINE = 0.8  # of the bytes kept, in decode attention
SHARE = 0.8  # of what bandwidth allows, end to end in a graph


def marks(report: Report) -> None:
    """A row for each mark whose table is there."""
    rows: list[list[str]] = []

    def judge(mark: str, measured: float, limit: float, unit: str, *, below: bool) -> None:
        met = measured <= limit if below else measured >= limit
        rows.append([mark, f"{measured:.2f}{unit}", "met" if met else "not met"])

    for row in report.data.get("column_sums", []):
        judge(f"column sums <= 1x attention, {row['']}", _number(row["times attention"]), 1, "x", below=True)
    for row in report.data.get("whole_model", []):
        at, name = row[""].split(", ", 1)
        limit = FLASHCACHE.get(int(at.removeprefix("L=")))
        if limit is None or name == FULL or kvweave.parse_method(name, budget=BUDGET).needs.rows == ALL_ROWS:
            continue
        judge(f"{name} adds <= {limit} ms to a prefill, {at}", float(row["added ms"]), limit, " ms", below=True)
    for row in report.data.get("decode", []):
        for column, how in (("of roofline", ""), ("biased", ", biased")):
            share = _number(row[column]) / 100
            judge(f"decode >= {ROOFLINE:.0%} of roofline, {row['']}{how}", share, ROOFLINE, "", below=False)
    for row in report.data.get("end_to_end", []):
        if row["of that"] != "-" and row[""].endswith("%, graph") and not row[""].endswith("100 %, graph"):
            share = _number(row["of that"]) / 100
            judge(f"end to end >= {SHARE:.0%} of what bandwidth allows, {row['']}", share, SHARE, "", below=False)
    report.table("marks", "Marks", ["mark", "measured", ""], rows)


def _number(cell: str) -> float:
    return float(cell.rstrip(" %x"))
