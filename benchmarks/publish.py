"""Bring what `kvweave paper` made into docs/RESULTS.md, docs/results and docs/images, and the README's part.

docs/results holds each figure once: a file for each model (`kvweave.evals.paper.figures`), and a small one for each
sheet, which says what of the model's figures it shows.

python -m benchmarks.publish out/results out/results-large
"""

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path

from kvweave.evals.paper import RECIPES
from kvweave.evals.paper.figures import packed, rounded, shown
from kvweave.evals.run import store

ROOT = Path(__file__).parents[1]
IN_README = ("flowmm-fig4", "flowmm-table1")  # the budget curve, and the methods by task
IN_LARGE = ("flowmm-fig4",)  # what is shown of the large world, too
_PACKED = ("scores", "means", "tests")  # in the model's file
_MARK = "<!-- {}: results, written by `make results` -->"
_HEAD = """# Results

The papers' tables and figures on the lab model, written by `make results`: nothing here is typed by hand. Each is one
command, and the same command runs on a real model with the real data, such as

```
kvweave paper flowmm:table1 --model Qwen/Qwen2.5-VL-7B-Instruct --data path/to/MileBench --out out/qwen
```

Read with care: the lab model is small, and looks things up at the token after the question; a large model may rank
methods differently. n stands under each table. More digits and intervals of all cells: [results](results).
"""


_LARGE = """# The large world

Pictures of ten by ten cells of which one in twenty shows anything: more like real ones than those above. They have a
model of their own (`--model lab-large`).
"""


def publish(source: Path, large: Path, root: Path = ROOT) -> None:
    """Write docs/RESULTS.md and its files, and put the README's tables between its marks.

    Args:
        source: folder of all tables; large: of those of the large world.

    Raises:
        FileNotFoundError: a folder lacks a table.
        ValueError: the README has no marks.
    """
    stems = [name.replace(":", "-") for name in RECIPES]
    for folder, needed in ((source, stems), (large, IN_LARGE)):
        for stem in needed:
            if not (folder / f"{stem}.json").is_file():
                raise FileNotFoundError(f"{folder} holds no {stem}.json: `make results` writes it")
    docs = root / "docs"
    parts = [_HEAD, *(_copied(source / stem, docs, stem) for stem in stems)]
    parts += [_LARGE, *(_copied(large / stem, docs, f"large-{stem}") for stem in IN_LARGE)]
    _figures({stem: source / stem for stem in stems}, docs / "results", "lab")
    _figures({f"large-{stem}": large / stem for stem in IN_LARGE}, docs / "results", "lab-large")
    store.write_text(docs / "RESULTS.md", "\n".join(parts))
    _into_readme(root / "README.md", "\n".join(_for_readme(source, stem) for stem in IN_README))


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
        store.write_json(folder / f"{stem}.json", rounded(own), indent=None)


def _for_readme(source: Path, stem: str) -> str:
    """A picture, and the first table with what made it."""
    sheet = store.read_json(source / f"{stem}.json")
    parts = [f"![{sheet['title']}](docs/images/{stem}.png)"]
    if stem == IN_README[-1]:
        table = sheet["tables"][0]
        lines = [table["head"], ["---", *["--:"] * (len(table["head"]) - 1)], *table["rows"]]
        parts += [f"**{table['title']}**", "\n".join(f"| {' | '.join(cells)} |" for cells in lines)]
        parts += ["\n".join(f"- {note}" for note in sheet["notes"])]
    return "\n\n".join(parts) + "\n"


def _into_readme(readme: Path, written: str) -> None:
    begin, end = _MARK.format("begin"), _MARK.format("end")
    text = readme.read_text()
    if begin not in text or end not in text:
        raise ValueError(f"{readme} has no line {begin!r} or {end!r}")
    before, _, rest = text.partition(begin)
    store.write_text(readme, f"{before}{begin}\n{written}{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder that kvweave paper --all wrote")
    parser.add_argument("large", type=Path, help="folder of the large world's")
    folders = parser.parse_args()
    publish(folders.source, folders.large)
