"""What `make results` brings into the documents."""

import json
from pathlib import Path

import pytest

from benchmarks.publish import publish
from kvweave.evals.paper import RECIPES

MARKS = "<!-- begin: results, written by `make results` -->\nold\n<!-- end: results, written by `make results` -->"


def made(folder: Path) -> Path:
    folder.mkdir()
    for name in RECIPES:
        stem = name.replace(":", "-")
        table = {"title": "At 20 %", "head": ["method", "mean"], "rows": [["snapkv", "0.30"]]}
        told = {"title": f"Title of {name}", "notes": ["n = 3"], "tables": [table]}
        (folder / f"{stem}.json").write_text(json.dumps(told))
        (folder / f"{stem}.md").write_text(f"## {name}\n\n![{name}]({stem}.png)\n")
        (folder / f"{stem}.png").write_bytes(b"picture")
    return folder


def test_results_go_where_readers_look(tmp_path: Path):
    (tmp_path / "README.md").write_text(f"before\n{MARKS}\nafter\n")
    source, large = made(tmp_path / "out"), made(tmp_path / "large")
    publish(source, large, tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("\nafter\n")
    assert "old" not in readme
    assert "| snapkv | 0.30 |" in readme
    assert "(docs/images/flowmm-fig4.png)" in readme
    results = (tmp_path / "docs" / "RESULTS.md").read_text()
    for name in RECIPES:
        stem = name.replace(":", "-")
        assert f"](images/{stem}.png)" in results
        assert (tmp_path / "docs" / "images" / f"{stem}.png").exists()
        assert (tmp_path / "docs" / "results" / f"{stem}.json").exists()
    assert "](images/large-flowmm-fig4.png)" in results
    assert (tmp_path / "docs" / "images" / "large-flowmm-fig4.png").exists()
    publish(source, large, tmp_path)
    assert (tmp_path / "README.md").read_text() == readme


def test_half_of_the_results_are_refused(tmp_path: Path):
    (tmp_path / "README.md").write_text(MARKS)
    source, large = made(tmp_path / "out"), made(tmp_path / "large")
    (source / "lookm-merges.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no lookm-merges\.json"):
        publish(source, large, tmp_path)
    assert not (tmp_path / "docs").exists()
