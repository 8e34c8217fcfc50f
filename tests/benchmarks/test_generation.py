"""docs/GENERATION.md says what happens: each way is run again, and a difference would be found."""

from pathlib import Path

import pytest
import tiny
import torch

from benchmarks import generation
from kvweave.seam.names import CACHE

PAGE = Path(__file__).parents[2] / "docs" / "GENERATION.md"
ROWS = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")][2:]
#: bitsandbytes is no package of the tests'; two processes are in tests/seam/test_tensor_parallel.py.
ELSEWHERE = {"`BitsAndBytesConfig(load_in_4bit=True)`", '`tp_plan="auto"`'}
#: A cache that transformers moves about on a stream.
STREAMS = {'`cache_implementation="offloaded"`', '`cache_implementation="offloaded_static"`'}
WAYS = {way.spelling: way for way in generation.WAYS if way.spelling not in ELSEWHERE}


def test_the_page_has_a_row_for_each_way_and_no_unexplained_hole():
    assert len(ROWS) == len(generation.WAYS)
    for row, way in zip(ROWS, generation.WAYS, strict=True):
        _, name, spelling, *cells, note, _ = (cell.strip() for cell in row.split("|"))
        assert (name, spelling, note) == (way.name, way.spelling, way.note)
        assert all(cell == "equal" or cell.startswith(("refused: ", "the same", "differs: ")) for cell in cells)
        assert note or not any(cell.startswith("differs: ") for cell in cells)


@pytest.mark.parametrize("spelling", WAYS)
def test_a_way_is_as_the_page_says(spelling):
    row = next(row for row, way in zip(ROWS, generation.WAYS, strict=True) if way.spelling == spelling)
    if spelling in STREAMS and torch.version.cuda and not torch.cuda.is_available():
        pytest.skip("transformers asks a torch that is built for a GPU for a stream of one")
    row = row.replace("refused: past_key_values=", f"refused: {CACHE}=")  # which 5.24 has renamed
    found = [generation.outcome(WAYS[spelling], method) for method in generation.METHODS.values()]
    assert row == generation.row(WAYS[spelling], found)


def test_a_difference_is_found(monkeypatch):
    """The oracle sees other columns than the cache holds."""
    of = tiny.cut_of

    def shifted(*args, **kwargs):
        cut = of(*args, **kwargs)
        return tiny.Cut(cut.start, {n: bias.roll(1, -1) for n, bias in cut.bias.items()}, cut.contents)

    monkeypatch.setattr(tiny, "cut_of", shifted)
    found = [generation.outcome(generation.WAYS[0], method) for method in generation.METHODS.values()]
    assert all(each.startswith("differs: ") for each in found)
    with pytest.raises(generation.DiffersError, match="logits"):
        generation.hold((torch.ones(1), torch.ones(1)), (torch.ones(1), torch.ones(1) + 1e-3))
