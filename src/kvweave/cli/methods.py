"""`kvweave methods`: what can be asked for with --method."""

import dataclasses
import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvweave.cli import options
from kvweave.cli.console import bad_input, out, print_json

if TYPE_CHECKING:
    from kvweave.methods import Method


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in detail; all if left out.")] = None,
    json: options.Json = False,
) -> None:
    """List the methods, or show one with its options."""
    from kvweave.methods import list_methods
    from kvweave.methods.base import method_class

    if name is None:
        described = [_described(method_class(known)) for known in list_methods()]
        if json:
            print_json({"methods": described})
        else:
            _print_all(described)
        return
    with bad_input(option="methods"):
        told = _described(method_class(name))
    if json:
        print_json(told)
    else:
        _print_one(told)


def _described(kind: "type[Method]") -> dict[str, Any]:
    doc = inspect.getdoc(kind) or ""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    budget = {
        "name": "budget",
        "default": defaults["budget"],
        "allowed": "a share in (0, 1], tokens as an int >= 1, or bytes such as 256MiB",
        "help": "entries that stay",
        "own": True,
    }
    listed = [
        {
            "name": option,
            "default": defaults[option],
            "allowed": about.allowed,
            "help": about.help,
            "own": kind.has_own(option),
        }
        for option, about in kind.options()
    ]
    return {
        "name": kind.name,
        "summary": " ".join(doc.partition("\n\n")[0].split()),
        "description": doc,
        "options": [budget, *listed],
    }


def _print_all(described: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=False)
    table.add_column("method", style="bold")
    table.add_column("what it does", ratio=3)
    table.add_column("options, with defaults", ratio=2)
    for told in described:
        listed = ", ".join(f"{option['name']}={option['default']}" for option in told["options"] if option["own"])
        table.add_row(told["name"], Text(told["summary"]), Text(listed, style="dim"))
    out().print(table)
    out().print(
        "[dim]kvweave methods NAME says what each option allows; kvweave run --method NAME:option=value[/dim]"
    )


def _print_one(told: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = out()
    console.print(Text(told["name"], style="bold"))
    console.print(Text(told["description"]))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("option", "default", "allowed", "what it does"):
        table.add_column(heading, overflow="fold")
    for option in told["options"]:
        table.add_row(
            Text(option["name"], style="bold"), str(option["default"]), Text(option["allowed"]), Text(option["help"])
        )
    console.print(table)
