"""The documentation as a site: every page is in its navigation, all links and anchors lead somewhere.

What it names of the code is there.
"""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/kvweave"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]  # it speaks of what was


def test_the_site_builds_with_all_its_links(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site/API/index.html").read_text(encoding="utf-8")
    for name in ("compress", "CompressedCache", "LayerView", "from_published"):
        assert f"{name}</span>" in reference


def named(page: Path, pattern: str) -> list[str]:
    """What a page sets in code type and is all of this pattern."""
    return re.findall(f"`({pattern})`", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    paths = named(page, r"[\w.-]+(?:/[\w.-]+)+\.(?:py|md|html)")
    assert [path for path in paths if not any((home / path).is_file() for home in (ROOT, SOURCE))] == []


def test_files_that_the_design_names_without_their_folder_exist():
    names = named(ROOT / "docs/DESIGN.md", r"\w+\.py")
    assert names
    assert set(names) <= {path.name for path in SOURCE.rglob("*.py")}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "SERVING.md"], ids=lambda page: page.name)
def test_names_of_the_library_that_a_page_uses_exist(page):
    for name in named(page, r"kvweave(?:\.\w+)+"):
        thing, at = importlib.import_module("kvweave"), "kvweave"
        for part in name.split(".")[1:]:
            at = f"{at}.{part}"
            thing = getattr(thing, part) if hasattr(thing, part) else importlib.import_module(at)


def test_serving_tells_the_scores_that_were_measured():
    """One table names every method that was asked, with its score."""
    told = (ROOT / "docs/SERVING.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| engines \| methods, and their score.*?\n\n", told, re.DOTALL | re.MULTILINE)
    page = (ROOT / "benchmarks/results/smol-albums-amd-epyc-2-cores.md").read_text(encoding="utf-8")
    measured = dict(re.findall(r"^\| (\S+) \| (\d\.\d\d) \[", page.partition("**Difference")[0], re.MULTILINE))
    scores = {name: f"{float(score):.2f}" for name, score in re.findall(r"`([^`]+)` (1\.00|\.\d\d)", table)}
    assert scores == {name: score for name, score in measured.items() if name in scores}
    assert {name for name in measured if name not in scores} <= {f"{x}:method=snapkv" for x in WRAPPERS}


WRAPPERS = ("critical", "regress", "residual")  # of other methods: the table leaves them out
