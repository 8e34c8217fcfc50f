"""Bring an evaluation's tables into docs/results/ and, with `--readme`, its means into README.md.

python -m benchmarks.publish out/table lab --readme
"""

import argparse
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
_MARK = "<!-- {}: results, written by `make table` -->"


def publish(source: Path, name: str, readme: Path | None = None) -> None:
    """Copy `table.md` and `table.json` as docs/results/NAME.md and NAME.json; put the means between README's marks.

    Raises:
        FileNotFoundError: `source` holds no finished evaluation.
        ValueError: the README has no marks.
    """
    if not (source / "table.md").is_file():
        raise FileNotFoundError(f"{source} holds no table.md: kvweave eval writes it when all cells are done")
    target = ROOT / "docs" / "results"
    target.mkdir(parents=True, exist_ok=True)
    for kind in ("md", "json"):
        shutil.copyfile(source / f"table.{kind}", target / f"{name}.{kind}")
    if readme is not None:
        begin, end = _MARK.format("begin"), _MARK.format("end")
        text = readme.read_text()
        if begin not in text or end not in text:
            raise ValueError(f"{readme} has no line {begin!r} or {end!r}")
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        readme.write_text(f"{before}{begin}\n{means((source / 'table.md').read_text())}\n{end}{after}")


def means(table: str) -> str:
    """The header and the tables of means of a whole `table.md`."""
    header = table.split("\n\n", 1)[0]
    blocks = re.findall(r"\*\*Mean over tasks.*?\n\n(?:\|.*\n)+", table)
    return "\n".join([header, "", *blocks]).rstrip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder that kvweave eval wrote")
    parser.add_argument("name", help="of the files under docs/results")
    parser.add_argument("--readme", action="store_true", help="put the means into README.md")
    given = parser.parse_args()
    publish(given.source, given.name, ROOT / "README.md" if given.readme else None)
