"""Every file in examples/ runs as it stands, and says what it should."""

import json
import runpy
from pathlib import Path

import matplotlib
import pytest

import kvweave

EXAMPLES = Path(__file__).parents[1] / "examples"

#: What each prints, in this order.
SAID = {
    "adapter": ["adapted: blue", "without its adapters: blue (right: blue)", "431 tokens in 86 entries"],
    "chat": [
        "tiger ? quebec mike", "horse ? uniform november", "rabbit ? sierra whiskey", "eagle ? sierra alpha",
        "whale ? sierra echo", "lion ? juliet juliet", "image #10 ? blue", "(544 tokens in 273 entries)",
    ],
    "generate": ["image #10 ? blue (right: blue)", "431 tokens in 86 entries"],
    "many_questions": ["image #10 ? blue", "lion ? juliet juliet", "image #3 ? green", "421 tokens in 168 entries"],
    "manual_loop": ["blue (right: blue)", "431 tokens in 86 entries"],
    "own_method": ["longest_keys:budget=0.5,recent=8: ", "431 tokens in 215 entries", "snapkv:budget=0.5: blue"],
    "pipeline": ["image #10 ?  blue (right: blue)", "431 tokens in 86 entries"],
    "stream": ["720 tokens read, never more than 192 entries held, 10 cuts"],
    "serving_client": ["blue 8 (right: blue 8)", "122,880 of 307,200 bytes kept"],
    "saved_context": ["421 tokens in ", "blue (right: blue)"],
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_an_example_runs_and_says_what_it_should(name, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    kvweave.methods.registry._REGISTRY.pop("longest_keys", None)
    said = capsys.readouterr().out
    for part in SAID[name]:
        before, found, said = said.partition(part)
        assert found, f"{part!r} is not in {before!r}"


def test_the_notebook_says_what_it_says(capsys):
    """Its cells, one after the other in one namespace; figures are drawn, and what was printed is printed again."""
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    namespace = {}
    with matplotlib.rc_context({"backend": "agg"}):
        for cell in (cell for cell in cells if cell["cell_type"] == "code"):
            capsys.readouterr()
            exec("".join(cell["source"]), namespace)
            printed = "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")
            assert capsys.readouterr().out == printed
    kinds = {kind for cell in cells for out in cell.get("outputs", ()) for kind in out.get("data", ())}
    assert "image/png" in kinds


def test_each_example_is_listed_and_run():
    tests = [path.read_text(encoding="utf-8") for path in EXAMPLES.parent.glob("tests/**/test_*.py")]
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for name in sorted(path.stem for path in EXAMPLES.glob("*.py")):
        assert f"[{name}.py]({name}.py)" in listed
        assert name in SAID or any(f"{name}.py" in text for text in tests)
