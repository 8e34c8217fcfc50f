"""Regression guard: what every method dispatches, multiplies, holds and waits for stays within what is recorded."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import guard

RECORD = json.loads(guard.RECORDED.read_text())
RUNS = guard.runs()


def test_every_method_is_recorded():
    assert RECORD["methods"].keys() == RUNS.keys(), "`make guard` records what is new"


@pytest.mark.skipif(
    torch.__version__.partition("+")[0] != RECORD["torch"], reason=f"recorded with torch {RECORD['torch']}"
)
@pytest.mark.parametrize("name", RECORD["methods"])
def test_no_method_costs_more_than_recorded(name):
    now, was = guard.costs(RUNS[name]), RECORD["methods"][name]
    more = {key: f"{was[key]} -> {now[key]}" for key in now if now[key] > was[key]}
    assert not more, f"{name} costs more: {more}; if it has to, `make guard` records it"


def test_what_is_counted():
    with guard.counted() as operations:
        x = torch.ones(3) + 1
        x.tolist()
        bool(x.any())
        x.nonzero()
    assert operations.waits == 3
    assert operations.count >= 5


HEAVY = ["matplotlib", "typer", "rich", "PIL", "pandas", "triton", "kvweave.cli", "kvweave.lab", "kvweave.report"]


def test_importing_the_package_imports_nothing_heavy():
    code = """
import sys, torch, transformers.modeling_utils  # which any model takes, and where torch has Triton, that
before = set(sys.modules)
import kvweave
lazy = {name for name in sys.modules if name.startswith("kvweave")}
[getattr(kvweave, name) for name in kvweave.__all__]
print(*sorted(lazy), "|", *sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    lazy, _, everything = done.stdout.partition("|")
    assert lazy.split() == ["kvweave"]
    assert [name for name in HEAVY if name in everything.split()] == []
