"""Grids, pages and pictures, from data alone."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kvweave.report import Answer, Layer, Run, Speed, Token, charts, grids
from kvweave.report.data import finite, layers_of, size
from kvweave.report.page import html
from kvweave.report.picture import KEPT, pieces, png, shares

SPEED = Speed(tokens_per_second=41.5, prefill_seconds=0.25, steps=7, repeats=1)


def answer(method: str = "flowmm:budget=0.25", fates: list[list[list[int]] | None] | None = None) -> Answer:
    """Two layers of a prompt of eight tokens, one KV head: the second kept everything."""
    fates = [[[0, 0, 2, 2, -1, -1, 2, 0]], None] if fates is None else fates
    layers = [
        Layer(0, "full_attention", True, 8, 2, 4, 2, 256, 1024, 0.375, "cross", 3, fates[0]),
        Layer(1, "full_attention", True, 8, 8, 0, 0, 1024, 1024, None, None, 1, fates[1]),
        Layer(2, "sliding_attention", False),
    ]
    return Answer(method, "flowmm", "a star", 3, SPEED, 1280, 2304, layers)


@pytest.fixture
def run() -> Run:
    tokens = [
        Token("<s>", special=True),
        Token(" look"),
        *[Token("", visual=True)] * 4,
        Token(" </script>"),
        Token("?"),
    ]
    return Run(
        model="lab",
        question="look </script>?",
        right=None,
        images=[Image.new("RGB", (40, 20), (255, 0, 0))],
        tokens=tokens,
        grids=grids([token.visual for token in tokens], 1, [(1, 2, 2)]),
        full=Answer("full cache", "", "a ring", 3, SPEED, 2048, 2048),
        answers=[answer()],
        command="kvweave run",
        machine="a machine",
        versions={"kvweave": "0"},
        notes=["be careful"],
    )


class TestLayers:
    def test_columns_are_what_some_layer_has(self) -> None:
        told = answer()
        assert told.columns == ["flow", "scope", "kept", "merged", "heaviest", "evicted", "size"]
        evicting = replace(told, layers=[replace(told.layers[1], merged=0)])
        assert evicting.columns == ["kept", "merged", "evicted", "size"]
        assert replace(told, layers=told.layers[2:]).columns == []

    def test_layers_that_look_alike_are_one_row(self) -> None:
        told = answer()
        first, second, sliding = told.layers
        layers = [first, *[replace(second, index=n) for n in (1, 2, 3)], replace(sliding, index=4)]
        rows = replace(told, layers=layers).runs
        assert [place for place, _ in rows] == ["0", "1-3", "4"]
        assert [layer.index for _, layer in rows] == [0, 1, 4]


class TestGrids:
    def test_the_processor_knows(self) -> None:
        visual = [False, *[True] * 6, False, *[True] * 2]
        wide, small = grids(visual, 2, [(1, 4, 6), (1, 2, 4)], merge=2)
        assert (wide.image, wide.rows, wide.columns, wide.tokens, wide.known) == (0, 2, 3, [1, 2, 3, 4, 5, 6], True)
        assert (small.image, small.rows, small.columns, small.tokens) == (1, 1, 2, [8, 9])

    def test_frames_lie_below_each_other(self) -> None:
        (grid,) = grids([True] * 8, 1, [(2, 4, 4)], merge=2)
        assert (grid.rows, grid.columns) == (4, 2)

    def test_shapes_that_do_not_fit_are_not_believed(self) -> None:
        (grid,) = grids([True] * 9, 1, [(1, 4, 4)], merge=2)
        assert (grid.rows, grid.columns, grid.known) == (3, 3, False)

    @pytest.mark.parametrize(
        ("count", "shape"), [(1, (1, 1)), (2, (1, 2)), (5, (2, 3)), (576, (24, 24)), (7, (3, 3))]
    )
    def test_a_guess_is_nearly_square(self, count: int, shape: tuple[int, int]) -> None:
        (grid,) = grids([False] + [True] * count, 1)
        assert (grid.rows, grid.columns) == shape
        assert len(grid.tokens) == count
        assert not grid.known

    def test_tiles_of_one_image_are_one_grid(self) -> None:
        first, second = grids([True, True, False, True, True, False, True, True, False, True, True], 2)
        assert first.tokens == [0, 1, 3, 4]
        assert second.image == 1

    def test_runs_without_a_gap_are_shared_out(self) -> None:
        assert [grid.tokens for grid in grids([True] * 6, 3)] == [[0, 1], [2, 3], [4, 5]]

    def test_no_image_is_named_where_none_can_be(self) -> None:
        assert [grid.image for grid in grids([True, False, True, True, False, True, True], 2)] == [None] * 3
        assert grids([False] * 3, 0) == []


class _Loads(HTMLParser):
    """Everything a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("src", "href", "srcset", "data", "action", "poster") and value:
                self.found.append(value)


class TestPage:
    def test_loads_nothing(self, run: Run) -> None:
        page = html(run)
        loads = _Loads()
        loads.feed(page)
        assert loads.found
        assert all(value.startswith("data:") for value in loads.found)
        assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest", page)

    def test_words_cannot_break_out(self, run: Run) -> None:
        page = html(run)
        assert page.count("</script>") == 2
        assert "look &lt;/script&gt;?" in page

    def test_holds_the_numbers(self, run: Run) -> None:
        page = html(run)
        for wanted in (
            "a star",
            "a ring",
            "differs",
            "0.375",
            "1.2 KiB",
            "62.5%",
            "not compressed: sliding",
            "be careful",
        ):
            assert wanted in page
        assert "{{" not in page

    def test_holds_what_is_drawn(self, run: Run) -> None:
        held = re.search(r'<script type="application/json" id="data">(.*?)</script>', html(run), re.DOTALL)
        assert held is not None
        data = json.loads(held[1])
        assert [layer["fate"] for layer in data["methods"][0]["layers"]] == [[[0, 0, 2, 2, -1, -1, 2, 0]], None]
        assert data["grids"][0]["tokens"] == [2, 3, 4, 5]
        assert data["tokens"][6] == [" </script>", 0]
        assert [method["text"] for method in data["methods"]] == [answer.text for answer in run.answers]

    def test_nothing_said(self, run: Run) -> None:
        silent = replace(run, full=replace(run.full, text=""), right="x")
        assert "<i>nothing</i>" in html(silent)


class TestPicture:
    def test_shares_are_means_over_layers(self) -> None:
        seen = shares(answer(), 8)
        assert seen.kept.tolist() == [1, 0.5, 1, 0.5, 0.5, 0.5, 0.5, 0.5]
        assert seen.merged.tolist() == [0, 0.5, 0, 0.5, 0, 0, 0.5, 0.5]

    def test_the_prompt_in_its_order(self, run: Run) -> None:
        before, after = pieces(run.tokens, run.grids)
        assert before.words == [0, 1]
        assert before.grid is run.grids[0]
        assert (after.words, after.grid) == ([6, 7], None)

    def test_kept_cells_are_the_image_and_gone_ones_are_not(self, run: Run) -> None:
        fate = [[0, 1, 2, -1, -1, -1, 6, 7]]
        drawn = np.asarray(png(replace(run, answers=[answer(fates=[fate, fate])])).convert("RGB"))
        assert (abs(drawn.astype(int) - (255, 0, 0)).sum(-1) < 30).sum() > 10_000  # one cell is plain red
        assert (abs(drawn.astype(int) - KEPT).sum(-1) < 30).any()

    @pytest.mark.parametrize("images", [0, 1, 30])
    def test_any_number_of_images(self, run: Run, images: int) -> None:
        tokens = [Token(" word"), *[Token("", visual=True)] * images, *[Token(" tail")] * 200]
        fate = [list(range(len(tokens)))]
        many = replace(
            run,
            tokens=tokens,
            images=run.images * images,
            grids=grids([token.visual for token in tokens], images),
            answers=[answer(fates=[fate, fate])],
        )
        assert png(many).width == 1600
        assert html(many)


def test_reports_become_layers() -> None:
    told = {
        "layer": 3,
        "kind": "full_attention",
        "compressed": True,
        "length": 5,
        "kept": 2,
        "merged": 0,
        "evicted": 3,
    }
    told |= {"bytes": 8, "bytes_before": 20, "flow": float("nan"), "scope": None, "flow_nosink": 0.1}
    left = {"layer": 4, "kind": "linear_attention", "compressed": False}
    first, second = layers_of({"layers": [told, left]}, [None])
    assert (first.index, first.kept, first.flow) == (3, 2, None)
    assert (second.index, second.compressed) == (4, False)


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 B"), (2048, "2.0 KiB"), (880640, "860 KiB"), (3 * 2**30, "3.00 GiB")]
)
def test_sizes_as_people_read_them(count: int, text: str) -> None:
    assert size(count) == text


def test_finite() -> None:
    assert [finite(value) for value in (1.5, float("inf"), "x", 3)] == [1.5, None, "x", 3]


class TestNamesOfCurves:
    @given(st.lists(st.floats(0, 1), max_size=20), st.floats(0.01, 0.05))
    def test_neighbours_are_apart_and_near_where_they_were(self, places: list[float], gap: float) -> None:
        places = sorted(places)
        moved = charts._apart(places, gap)
        assert len(moved) == len(places)
        assert all(after - before > gap - 1e-9 for before, after in pairwise(moved))
        assert all(place <= max(1.0, len(places) * gap) for place in moved)
        if all(after - before > gap for before, after in pairwise(places)):
            assert moved == places
