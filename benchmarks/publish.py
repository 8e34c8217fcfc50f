"""Bring what `kvweave paper` made into docs/RESULTS.md, docs/results and docs/images, and the README's part.

docs/results holds each figure once: a file for each model (`kvweave.evals.paper.figures`), and a small one for each
sheet, which says what of the model's figures it shows.

python -m benchmarks.publish out/results out/results-large out/results-smol
python -m benchmarks.publish out/results-smol    # what was made of smol alone; the rest stays as it is
"""

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvweave.evals.paper import RECIPES
from kvweave.evals.paper.figures import packed, round_data, rows, shown
from kvweave.evals.run import store
from kvweave.evals.tables.tables import interval

ROOT = Path(__file__).parents[1]
IN_README = "flowmm-fig4"  # the budget curve
RANKED = "flowmm-table1"  # the methods of both models side by side
_NAMED = 8  # pairs of methods
IN_LARGE = ("flowmm-fig4",)  # what is shown of the large world, too
_PACKED = ("scores", "means", "tests")  # in the model's file
_MARK = "<!-- {}: results, written by `make results` -->"
_HEAD = """# Results

The papers' tables and figures, written by `make results`: nothing here is typed by hand. First on `smol`, a real
language model of 135 million parameters with eyes ([its card](../src/kvweave/lab/smol/weights/README.md)); then on
`lab`, a toy of 0.9 million that looks things up at the token after the question. n stands under each table. Where the
two disagree, believe the first; a large model may rank methods differently again. Each is one command, and the same
command runs on such a model with the real data:

```
kvweave paper flowmm:table1 --model Qwen/Qwen2.5-VL-7B-Instruct --data path/to/MileBench --out out/qwen
```

More digits and intervals of all cells: [results](../docs/results).
"""


_REAL = """# On a real language model
"""


_MISSING = """Not measured on it yet: {}; `make results-smol` does (hours). What methods keep on it of albums and of
texts: [Research](RESEARCH.md#on-a-real-language-model).
"""


_TOY = """# On the toy
"""


_LARGE = """# The toy's large world

Pictures of ten by ten cells of which one in twenty shows anything: more like real ones than those above. They have a
model of their own (`--model lab-large`).
"""


def publish(source: Path, large: Path, real: Path, root: Path = ROOT) -> None:
    """Write docs/RESULTS.md and its files, and put the README's picture between its marks.

    Args:
        source: folder of all tables; large: of those of the large world; real: of those that were made of `smol`, of
            which the text names what is missing.

    Raises:
        FileNotFoundError: a folder lacks a table, or that of `smol` has none.
        ValueError: the README has no marks.
    """
    stems = [name.replace(":", "-") for name in RECIPES]
    for folder, needed in ((source, stems), (large, IN_LARGE)):
        for stem in needed:
            if not (folder / f"{stem}.json").is_file():
                raise FileNotFoundError(f"{folder} holds no {stem}.json: `make results` writes it")
    docs = root / "docs"
    parts = _real_parts(real, docs, store.read_json(source / f"{RANKED}.json"))
    parts += [_TOY, *(_copied(source / stem, docs, stem) for stem in stems)]
    parts += [_LARGE, *(_copied(large / stem, docs, f"large-{stem}") for stem in IN_LARGE)]
    for model, made in {
        "lab": {stem: source / stem for stem in stems},
        "lab-large": {f"large-{stem}": large / stem for stem in IN_LARGE},
    }.items():
        _figures(made, docs / "results", model)
    store.write_text(docs / "RESULTS.md", "\n".join(parts))
    title = store.read_json(source / f"{IN_README}.json")["title"]
    _into_readme(root / "README.md", f"![{title}](docs/images/{IN_README}.png)\n")


def publish_real(real: Path, root: Path = ROOT) -> None:
    """Only what was made of `smol`: the toy's part of docs/RESULTS.md, and its files, stay as they are.

    Raises:
        FileNotFoundError: the folder has no table.
    """
    docs = root / "docs"
    page = (docs / "RESULTS.md").read_text()
    toy = store.read_json(docs / "results" / f"{RANKED}.json")
    figures = store.read_json(docs / "results" / toy["figures"]["file"])
    parts = _real_parts(real, docs, {"means": list(rows(figures, "means", toy["figures"]))})
    store.write_text(docs / "RESULTS.md", "\n".join([*parts, page[page.index(_TOY) :]]))


def _real_parts(real: Path, docs: Path, toy: Mapping[str, Any]) -> list[str]:
    """The page up to the toy's part, its pictures and figures brought to docs.

    Args:
        toy: the toy's sheet of methods by task.
    """
    stems = {name: name.replace(":", "-") for name in RECIPES}
    there = {name: stem for name, stem in stems.items() if (real / f"{stem}.json").is_file()}
    if not there:
        raise FileNotFoundError(f"{real} holds no table: `make results-smol` writes them")
    parts = [_HEAD, _REAL, *(_copied(real / stem, docs, f"smol-{stem}") for stem in there.values())]
    if missing := [name for name in stems if name not in there]:
        parts.append(_MISSING.format(", ".join(missing)))
    if RANKED in there.values():
        parts.append(disagreements(store.read_json(real / f"{RANKED}.json"), toy))
    _figures({f"smol-{stem}": real / stem for stem in there.values()}, docs / "results", "smol")
    return parts


def disagreements(real: Mapping[str, Any], toy: Mapping[str, Any]) -> str:
    """Which methods the toy ranks otherwise, the question seen, by means over each model's own tasks.

    Args:
        real, toy: sheets of methods by task, at one budget.
    """
    means = [
        {row["method"]: row for row in sheet["means"] if row["protocol"] == "seen" and row["score"] is not None}
        for sheet in (real, toy)
    ]
    both = sorted((m for m in means[0] if m in means[1]), key=lambda m: -means[0][m]["score"])
    pairs = [(a, b) for a in both for b in both if means[0][a]["low"] > means[0][b]["high"]]
    against = [(a, b) for a, b in pairs if means[1][a]["high"] < means[1][b]["low"]]
    lines = [["method", "smol", "toy"], ["---", "--:", "--:"]]
    lines += [[method, *(interval(of[method]) for of in means)] for method in both]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    told = (
        f"Of {len(pairs)} pairs of methods whose intervals on `smol` lie apart, the toy has {len(against)} the other "
        "way round, their intervals apart too"
    )
    named = f": {', '.join(f'{a} above {b}' for a, b in against[:_NAMED])}" if against else ""
    more = f", and {len(against) - _NAMED} more" if len(against) > _NAMED else ""
    return f"## Where the toy says otherwise\n\n{told}{named}{more}.\n\n{table}\n"


def _copied(made: Path, docs: Path, stem: str) -> str:
    """A table's Markdown, its picture brought to docs under the name `stem`."""
    (docs / "images").mkdir(parents=True, exist_ok=True)
    if made.with_suffix(".png").is_file():
        shutil.copyfile(made.with_suffix(".png"), docs / "images" / f"{stem}.png")
    return made.with_suffix(".md").read_text().replace(f"({made.name}.png)", f"(images/{stem}.png)")


def _figures(made: Mapping[str, Path], folder: Path, model: str) -> None:
    """A model's figures, and what each sheet says beside them."""
    sheets = {stem: store.read_json(path.with_suffix(".json")) for stem, path in made.items()}
    store.write_json(folder / f"{model}.json", packed(sheets.values()), indent=None)
    for stem, sheet in sheets.items():
        own = {name: value for name, value in sheet.items() if name not in _PACKED}
        if "means" in sheet:
            own["figures"] = {"file": f"{model}.json", **shown(sheet)}
        store.write_json(folder / f"{stem}.json", round_data(own), indent=None)


def _into_readme(readme: Path, written: str) -> None:
    begin, end = _MARK.format("begin"), _MARK.format("end")
    text = readme.read_text()
    if begin not in text or end not in text:
        raise ValueError(f"{readme} has no line {begin!r} or {end!r}")
    before, _, rest = text.partition(begin)
    store.write_text(readme, f"{before}{begin}\n{written}{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", type=Path, nargs="+", help="that kvweave paper wrote: the toy's, its large world's, smol's"
    )
    folders = parser.parse_args().folders
    if len(folders) not in (1, 3):
        parser.error(f"{len(folders)} folders: allowed is three, or smol's alone")
    (publish if len(folders) == 3 else publish_real)(*folders)
