"""What `make results` brings into the documents."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from benchmarks.publish import _HEAD, ROOT, disagreements, publish, publish_real
from kvweave.evals.paper import RECIPES
from kvweave.evals.paper.figures import packed, round_data, rows, shown

MARKS = "<!-- begin: results, written by `make results` -->\nold\n<!-- end: results, written by `make results` -->"


WHERE = {"protocol": "seen", "method": "snapkv", "budget": 0.2}
SCORE = {
    **WHERE,
    "task": "lookup",
    "metric": "exact",
    "score": 1 / 3,
    "low": 0.25,
    "high": 0.5,
    "besides": {"rouge_l": 0.4},
    "samples": 60,
    "failed": 0,
    "length": 289.0,
    "kept": [57.0, 57.0],
    "bytes": 1024.0,
    "equal": True,
}
FIGURES = {
    "scores": [SCORE, {**SCORE, "task": "change", "kept": [57.0, 60.5], "failed": 2, "samples": 58, "equal": False}],
    "means": [{**WHERE, "score": 1 / 3, "low": 0.2, "high": 0.4, "samples": 120, "failed": 2}],
    "tests": [
        {**WHERE, "baseline": "h2o", "difference": 0.1, "low": -0.1, "high": 0.3, "better": 3, "worse": 1}
        | {"p": 5.6223687e-14, "p_holm": 1.0}
    ],
}


def made(folder: Path, names: Iterable[str] = RECIPES) -> Path:
    folder.mkdir()
    for name in names:
        stem = name.replace(":", "-")
        table = {"title": "At 20 %", "head": ["method", "mean"], "rows": [["snapkv", "0.30"]]}
        told = {"title": f"Title of {name}", "notes": ["n = 3"], "tables": [table], **FIGURES}
        (folder / f"{stem}.json").write_text(json.dumps(told))
        (folder / f"{stem}.md").write_text(f"## {name}\n\n![{name}]({stem}.png)\n")
        (folder / f"{stem}.png").write_bytes(b"picture")
    return folder


def test_results_go_where_readers_look(tmp_path: Path):
    (tmp_path / "README.md").write_text(f"before\n{MARKS}\nafter\n")
    folders = made(tmp_path / "out"), made(tmp_path / "large"), made(tmp_path / "smol", ["flowmm:table1"])
    publish(*folders, tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("\nafter\n")
    assert "old" not in readme
    assert "(docs/images/flowmm-fig4.png)" in readme
    results = (tmp_path / "docs" / "RESULTS.md").read_text()
    for name in RECIPES:
        stem = name.replace(":", "-")
        assert f"](images/{stem}.png)" in results
        assert (tmp_path / "docs" / "images" / f"{stem}.png").exists()
        assert (tmp_path / "docs" / "results" / f"{stem}.json").exists()
    assert "](images/large-flowmm-fig4.png)" in results
    assert (tmp_path / "docs" / "images" / "large-flowmm-fig4.png").exists()
    assert results.index("](images/smol-flowmm-table1.png)") < results.index("](images/flowmm-table1.png)")
    assert (tmp_path / "docs" / "images" / "smol-flowmm-table1.png").exists()
    assert "Not measured on it yet: flowmm:table2, flowmm:table3," in results
    publish(*folders, tmp_path)
    assert (tmp_path / "README.md").read_text() == readme


def test_the_real_models_results_go_there_alone(tmp_path: Path):
    (tmp_path / "README.md").write_text(MARKS)
    publish(
        *(made(tmp_path / name) for name in ("out", "large")), made(tmp_path / "few", ["flowmm:table3"]), tmp_path
    )
    before = (tmp_path / "docs" / "RESULTS.md").read_text()
    files = {path.name: path.read_text() for path in (tmp_path / "docs" / "results").iterdir()}
    publish_real(made(tmp_path / "smol", ["flowmm:table1", "flowmm:table3"]), tmp_path)
    results = (tmp_path / "docs" / "RESULTS.md").read_text()
    assert results != before
    assert results.partition("# On the toy")[2] == before.partition("# On the toy")[2]
    assert "](images/smol-flowmm-table1.png)" in results
    assert "## Where the toy says otherwise" in results
    assert "## Where the toy says otherwise" not in before
    assert "Not measured on it yet: flowmm:table2, flowmm:table4," in results
    after = {path.name: path.read_text() for path in (tmp_path / "docs" / "results").iterdir()}
    assert {name for name in after if after[name] != files.get(name)} == {"smol-flowmm-table1.json"}
    publish_real(tmp_path / "smol", tmp_path)
    assert (tmp_path / "docs" / "RESULTS.md").read_text() == results


def sheet(**means: tuple[float, float, float]) -> dict:
    names = ("score", "low", "high")
    rows = [{**WHERE, "method": method, **dict(zip(names, of, strict=True))} for method, of in means.items()]
    return {
        "means": [*rows, {**WHERE, "method": "kvzip", "protocol": "unseen", "score": 1.0, "low": 1.0, "high": 1.0}]
    }


def test_where_the_toy_says_otherwise_is_counted_from_intervals():
    real = sheet(weave=(0.9, 0.8, 1.0), snapkv=(0.5, 0.4, 0.6), random=(0.1, 0.0, 0.2), cam=(0.0, 0.0, 0.1))
    toy = sheet(weave=(0.5, 0.4, 0.6), snapkv=(0.9, 0.8, 1.0), random=(0.2, 0.1, 0.45), lookm=(0.5, 0.4, 0.6))
    told = disagreements(real, toy)
    assert "Of 3 pairs of methods whose intervals on `smol` lie apart, the toy has 1 the other way round" in told
    assert "apart too: weave above snapkv." in told
    assert [line.split(" | ")[0] for line in told.splitlines()[6:]] == ["| weave", "| snapkv", "| random"]


def test_half_of_the_results_are_refused(tmp_path: Path):
    (tmp_path / "README.md").write_text(MARKS)
    source, large, real = (made(tmp_path / name) for name in ("out", "large", "smol"))
    with pytest.raises(FileNotFoundError, match=r"empty holds no table: `make results-smol`"):
        publish(source, large, made(tmp_path / "empty", []), tmp_path)
    (source / "lookm-merges.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no lookm-merges\.json"):
        publish(source, large, real, tmp_path)
    assert not (tmp_path / "docs").exists()


def without(row: dict, *names: str) -> dict:
    return {name: value for name, value in row.items() if name not in names}


def test_figures_come_back_as_they_were_to_four_digits():
    figures = json.loads(json.dumps(packed([FIGURES, FIGURES])))
    chosen = json.loads(json.dumps(shown(FIGURES)))
    (score, other), (mean,), (test,) = (list(rows(figures, kind, chosen)) for kind in ("scores", "means", "tests"))
    assert score == round_data(SCORE) | {"kept": 57}
    assert other == round_data(FIGURES["scores"][1])
    assert mean == without(round_data(FIGURES["means"][0]), "samples")
    assert test == without(FIGURES["tests"][0], "p_holm") | {"p": 5.622e-14}


def test_sheets_that_disagree_are_refused():
    other = {**FIGURES, "means": [{**FIGURES["means"][0], "score": 0.5}]}
    with pytest.raises(ValueError, match=r"means of seen, snapkv, 0\.2: \[0\.3333, .* in one sheet, \[0\.5, "):
        packed([FIGURES, other])


def test_published_files_hold_each_figure_once(tmp_path: Path):
    (tmp_path / "README.md").write_text(MARKS)
    publish(*(made(tmp_path / name) for name in ("out", "large", "smol")), tmp_path)
    results = tmp_path / "docs" / "results"
    for path in results.iterdir():
        told = json.loads(path.read_text())
        assert ("scores" in told) == (path.name in ("lab.json", "lab-large.json", "smol.json"))
        assert "\n" not in path.read_text().rstrip()
        if "figures" in told:
            figures = json.loads((results / told["figures"]["file"]).read_text())
            assert len(list(rows(figures, "scores", told["figures"]))) == 2


def test_what_is_published_is_small_and_says_what_its_tables_say():
    """docs/results as they are in the repository."""
    folder = ROOT / "docs" / "results"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 500_000
    assert (ROOT / "docs" / "RESULTS.md").read_text().startswith(_HEAD)
    found = 0
    for stem in ("flowmm-table1", "flowmm-fig4", "flashcache-budget", "large-flowmm-fig4"):
        sheet = json.loads((folder / f"{stem}.json").read_text())
        figures = json.loads((folder / sheet["figures"]["file"]).read_text())
        for table, protocol in zip(sheet["tables"], sheet["figures"]["methods"], strict=True):
            means = {
                (row["method"], row["budget"]): row
                for row in rows(figures, "means", sheet["figures"])
                if row["protocol"] == protocol
            }
            for name, *cells in table["rows"]:
                if (name, 0.2) not in means:  # a name that a reader sees and a label differ
                    continue
                place = table["head"].index("mean") if "mean" in table["head"] else table["head"].index("20 %")
                row = means[name, 0.2]
                said = [
                    float(word)
                    for word in cells[place - 1].replace("[", "").replace("]", "").replace(",", "").split()
                ]
                assert said == pytest.approx([row["score"], row["low"], row["high"]], abs=0.00501)
                found += 1
    assert found > 100
