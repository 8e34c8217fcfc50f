"""The page of an evaluation: everything in it, nothing loaded, nothing that ends its script early."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from kvweave.evals import Evaluation, lab_tasks, run, summarise
from kvweave.evals.run.plan import parse_methods
from kvweave.evals.tables.page import write_page


class _Page(HTMLParser):
    """Collects what a page would load, and its data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.data = ""
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.loads += [value for name in ("src", "href") if (value := given.get(name))]
        self._inside = given.get("id") == "data"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.data += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = False


def test_the_page_holds_what_was_measured(tmp_path: Path):
    evaluation = Evaluation(
        "lab", lab_tasks(["lookup", "change"], 1, 3), parse_methods(["snapkv,flowmm,oracle"]), (0.5, 0.2)
    )
    results = run(evaluation, tmp_path / "cells", workers=1, command="kvweave eval </script> & more")
    summary = summarise(evaluation, results, baseline="snapkv", command="kvweave eval </script> & more")
    path = write_page(evaluation, summary, tmp_path, samples=2)
    text = path.read_text()
    page = _Page(text)
    assert page.loads == ["data:,"]
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    assert "kvweave eval &lt;/script&gt; &amp; more" in text
    data = json.loads(page.data)
    assert len(data["means"]) == 1 + 3 * 2
    for row, told in zip(summary["means"], data["means"], strict=True):
        assert told["score"] == round(row["score"], 4)
    assert len(data["differences"]) == len(summary["tests"]) > 0
    for row, told in zip(summary["tests"], data["differences"], strict=True):
        assert (told["method"], told["baseline"], told["p_holm"]) == (
            row["method"],
            row["baseline"],
            round(row["p_holm"], 4),
        )
    assert [layer["layer"] for layer in data["flow"]] == [0, 1, 2, 3]
    assert {row["method"] for row in data["memory"]} == {"full", "snapkv", "flowmm", "oracle"}
    assert len(data["samples"]) == 2
    for sample in data["samples"]:
        assert len(sample["images"]) == len(sample["grids"]) == 3
        assert [method["name"] for method in sample["methods"]] == ["snapkv", "flowmm"]
        for method in sample["methods"]:
            kept = [cell[0] for grid in method["cells"] for cell in grid]
            assert len(kept) == 3 * 25
            assert 0 < sum(kept) < 0.5 * len(kept)


def test_without_samples_there_is_still_a_page(tmp_path: Path):
    evaluation = Evaluation("lab", lab_tasks(["lookup"], 1, 2), parse_methods(["snapkv"]), (0.2,))
    summary = summarise(evaluation, run(evaluation, tmp_path / "cells", workers=1))
    data = json.loads(_Page(write_page(evaluation, summary, tmp_path, samples=0).read_text()).data)
    assert data["samples"] == data["flow"] == []
    assert data["speed"] == {}
