"""Tables that are written as soon as they are done, and parts that may fail or run out of time alone."""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.gpu.plan import LIMITS


@dataclass
class Report:
    """Tables done so far."""

    folder: Path
    facts: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def table(self, name: str, title: str, columns: Sequence[str], rows: list[list[str]], note: str = "") -> None:
        """Keep a table, print it, write everything so far."""
        self.data[name] = [dict(zip(columns, row, strict=True)) for row in rows]
        self.text[name] = f"## {title}\n\n{note}{chr(10) * 2 if note else ''}{measure.markdown_table(columns, rows)}"
        self.write()

    def fail(self, what: str, error: BaseException) -> None:
        """Note that something went wrong, and go on."""
        said = f"{what}: {type(error).__name__}: {error}"
        self.failures.append(said)
        print(said, file=sys.stderr, flush=True)
        self.write()

    def write(self) -> list[Path]:
        data = {**self.data, "failures": self.failures}
        failed = ["## Failed\n", *(f"- {failure.splitlines()[0]}" for failure in self.failures)]
        text = ["# On a GPU\n", *self.text.values(), *(failed if self.failures else [])]
        return measure.write("gpu", self.facts, data, "\n".join(text), self.folder)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part that fails, or takes longer than it may, is reported and does not take the others with it."""
        started, before = time.perf_counter(), set(self.text)
        usual = signal.signal(signal.SIGALRM, _too_long)
        signal.setitimer(signal.ITIMER_REAL, LIMITS.get(name, 60))
        try:
            yield
        except Exception as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            traceback.print_exc()
            self.fail(name, error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, usual)
        for table in [x for x in self.text if x not in before]:
            print(self.text[table])
        seconds = time.perf_counter() - started
        self.data.setdefault("seconds", {})[name] = round(seconds, 1)
        print(f"[{name}: {seconds:.1f} s]\n", flush=True)


def _too_long(*_: object) -> None:
    raise TimeoutError("its time is up")
