"""`kvweave methods`: what can be asked for with --method."""

import dataclasses
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvweave.cli import options
from kvweave.cli.console import bad_input, check_out, dump_json, out, print_json, writing

if TYPE_CHECKING:
    from kvweave.methods import Method


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in detail; all if left out.")] = None,
    draw: Annotated[
        bool, typer.Option("--draw", help="Draw what the method keeps of the lab's example; NAME may be a spelling.")
    ] = False,
    out_folder: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the picture, or for methods.json.", show_default="out, with --draw"),
    ] = None,
    json: options.Json = False,
) -> None:
    """List the methods, or show one with its options."""
    if out_folder is not None:
        check_out(out_folder)
    if draw:
        _draw(name, out_folder or Path("out"), json)
        return
    from kvweave.methods import list_methods
    from kvweave.methods.registry import list_wrappers, method_class

    with bad_input(option="methods"):
        if name is None:
            listed = {"methods": list_methods(), "wrappers": list_wrappers()}
            facts: dict[str, Any] = {
                kind: [_described(method_class(n)) for n in names] for kind, names in listed.items()
            }
        else:
            facts = _described(method_class(name))
    if out_folder is not None:
        with writing(out_folder) as partial:
            (partial / "methods.json").write_text(dump_json(facts) + "\n", encoding="utf-8")
    if json:
        print_json(facts)
    elif name is None:
        _print_all(facts)
    else:
        _print_one(facts)


def _draw(spelling: str | None, folder: Path, json: bool) -> None:
    from kvweave.evals.one.draw import draw
    from kvweave.methods import parse_method

    with bad_input(option="--draw"):
        if spelling is None:
            raise ValueError("a method is missing: allowed is kvweave methods NAME --draw")
        method = parse_method(spelling)
    run, path = draw(method, folder)
    answer = run.answers[0]
    if json:
        facts = {"method": answer.method, "question": run.question, "right": run.right, "full": run.full.text}
        print_json({**facts, "text": answer.text, "picture": str(path)})
        return
    out().print(
        f"{run.question} full cache: {run.full.text}; {answer.method}: {answer.text}; right: {run.right}; see {path}"
    )


def _described(kind: "type[Method]") -> dict[str, Any]:
    from kvweave.methods.base import ANALYSIS

    doc = inspect.getdoc(kind) or ""
    defaults = {
        field.name: field.default if isinstance(field.default, (int, float, str, type(None))) else "full"
        for field in dataclasses.fields(kind)
    }
    budget = {
        "name": "budget",
        "default": defaults["budget"],
        "allowed": "a share in (0, 1], tokens as an int >= 1, or bytes such as 256MiB",
        "help": "entries that stay",
    }
    listed = {
        option: {"name": option, "default": defaults[option], "allowed": about.allowed, "help": about.help}
        for option, about in kind.options()
    }
    own = {option: entry for option, entry in listed.items() if kind.has_own(option)}
    return {
        "name": kind.name,
        "summary": " ".join(doc.partition("\n\n")[0].split()),
        "description": doc,
        "options": [budget, *own.values()],
        "common": [entry for option, entry in listed.items() if option not in (*own, *ANALYSIS)],
        "analysis": [listed[option] for option in ANALYSIS if option in listed],
    }


def _print_all(entries: dict[str, list[dict[str, Any]]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from kvweave.methods.base import COMMON

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=False)
    table.add_column("method", style="bold")
    table.add_column("what it does", ratio=3)
    table.add_column("options, with defaults", ratio=2)
    for entry in entries["methods"] + entries["wrappers"]:
        listed = ", ".join(f"{option['name']}={option['default']}" for option in entry["options"])
        table.add_row(entry["name"], Text(entry["summary"]), Text(listed, style="dim"))
    out().print(table)
    common = ", ".join(COMMON)
    around = ", ".join(entry["name"] for entry in entries["wrappers"])
    out().print(
        f"[dim]{around} stands around any other: quantized:method=snapkv,bits=4. All take {common}. "
        "kvweave methods NAME says what each option allows; kvweave run --method NAME:option=value[/dim]"
    )


def _print_one(entry: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = out()
    console.print(Text(entry["name"], style="bold"))
    console.print(Text(entry["description"]))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("option", "default", "allowed", "what it does"):
        table.add_column(heading, overflow="fold")
    for style, listed in (("bold", entry["options"]), ("dim", entry["common"] + entry["analysis"])):
        for option in listed:
            words = (option["name"], str(option["default"]), option["allowed"], option["help"])
            table.add_row(Text(words[0], style=style), *map(Text, words[1:]))
    console.print(table)
