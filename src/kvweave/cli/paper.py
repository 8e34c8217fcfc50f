"""`kvweave paper`: a table or figure of a paper, measured; resumable."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvweave.cli import options
from kvweave.cli.console import BadInput, bad_input, check_out, command_line, err, print_json, quiet_libraries
from kvweave.cli.console import out as stdout
from kvweave.cli.eval import CellProgress
from kvweave.cli.tables import fitted

if TYPE_CHECKING:
    from kvweave.evals.paper import Recipe, Sheet
    from kvweave.evals.tasks import sources
    from kvweave.evals.tasks.tasks import Task

_LENGTHS = (1, 2, 4, 8, 12)  # images of the prompts whose time is measured
_TOKENS = (250, 500, 1000, 2000)  # of those of smol-text


_Names = Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="Such as flowmm:table1; see --list.")]
_List = Annotated[bool, typer.Option("--list", help="What there is.")]
_Everything = Annotated[bool, typer.Option("--all", help="All of them.")]
_Data = Annotated[Path | None, typer.Option(help="Folder in MileBench's layout.", show_default="the lab's questions")]
_Tasks = Annotated[
    str | None, typer.Option(help="Separated by commas.", show_default="the lab's, or the paper's of a folder")
]
_Methods = Annotated[
    str | None,
    typer.Option(
        help="In tables of all methods, only these; such as snapkv,flowmm:theta=0.3.",
        show_default="all registered",
    ),
]
_Samples = Annotated[
    int | None,
    typer.Option(**options.COUNT, help="Samples a task.", show_default="100 of the lab's, all of a folder's"),
]
_Batch = Annotated[
    int | None,
    typer.Option(
        "--batch",
        **options.COUNT,
        help="Prompts answered together.",
        show_default="50 with lab, 20 with smol, 8 with smol-text, else 1",
    ),
]
_Workers = Annotated[int, typer.Option(**options.COUNT, help="Processes, of one thread each.")]
_Out = Annotated[Path, typer.Option(help="Folder that all tables share; resumes.")]
_Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no tables.")]


def paper(
    names: _Names = None,
    list_: _List = False,
    everything: _Everything = False,
    model: options.ModelName = "lab",
    data: _Data = None,
    tasks: _Tasks = None,
    methods: _Methods = None,
    samples: _Samples = None,
    batch: _Batch = None,
    workers: _Workers = 1,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    out: _Out = Path("out/paper"),
    json: options.Json = False,
    quiet: _Quiet = False,
) -> None:
    """Make a table or figure of the papers: methods at equal budgets on one model and its data.

    Writes OUT/NAME.json, NAME.md and NAME.png. What two tables need is computed once; interrupted anywhere, the same
    command resumes.
    """
    from kvweave.evals.paper import Subject, make

    if list_:
        _list(json)
        return
    quiet_libraries()
    with bad_input(), options.model_errors():
        recipes = _recipes(names or [], everything, methods)
        check_out(out)
        task_names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
        selection, by_length = (
            _generated(options.source(model), task_names, samples)
            if data is None
            else _milebench(data, task_names, samples)
        )
        subject = Subject(
            model=model,
            data="" if data is None else data.name,
            tasks=selection,
            by_length=by_length,
            out=out,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            device=device,
            batch=batch or options.batch_size(model),
            workers=workers,
            command=command_line(),
        )
        with CellProgress(quiet) as progress:
            sheets = make(recipes, subject, progress)
    paths = [path for sheet in sheets for path in sheet.write(out)]
    if json:
        print_json([{"name": sheet.name, "data": sheet.data} for sheet in sheets])
    elif not quiet:
        _print(sheets, paths)


def _recipes(names: Sequence[str], everything: bool, methods: str | None) -> "list[Recipe]":
    """Those that are asked for, of these methods alone."""
    from kvweave.evals.paper import RECIPES, find

    if everything == bool(names):
        wrong = "NAME and --all are both given" if everything else "NAME is missing"
        raise BadInput(f"{wrong}: allowed is a name, or several, or --all; --list shows them")
    recipes = list(RECIPES.values()) if everything else [find(name) for name in names]
    return recipes if methods is None else [recipe.with_methods(methods) for recipe in recipes]


Source = tuple[Callable[[Sequence[str]], "tuple[Task, ...]"], Callable[[], "tuple[Task, ...]"]]


def _generated(source: "sources.Source", task_names: Sequence[str], samples: int | None) -> Source:
    """The model's own tasks whatever a paper asked; and prompts of several lengths."""
    from kvweave.evals.tasks.sources import make_tasks

    def tasks(names: Sequence[str]) -> "tuple[Task, ...]":
        return make_tasks(source, task_names, samples)

    def by_length() -> "tuple[Task, ...]":
        lengths = _LENGTHS if source.unit == "images" else _TOKENS
        return tuple(task for size in lengths for task in source.make([source.by_length], 8, size))

    return tasks, by_length


def _milebench(data: Path, task_names: Sequence[str], samples: int | None) -> Source:
    """Of what is chosen, else of what a paper asked, what the folder has; all of it if it has none of that."""
    from kvweave.evals import Options, milebench_tasks

    there = milebench_tasks(data, task_names, Options(count=samples))

    def tasks(names: Sequence[str]) -> "tuple[Task, ...]":
        return tuple(task for task in there if task.name in names) or there

    return tasks, lambda: there


def _list(json: bool) -> None:
    from kvweave.evals.paper import RECIPES

    if json:
        print_json({name: {"title": recipe.title, "shows": recipe.shows} for name, recipe in RECIPES.items()})
        return
    from rich.table import Table

    table = Table("name", "what", box=None, pad_edge=False)
    for recipe in RECIPES.values():
        table.add_row(recipe.name, recipe.title)
    stdout().print(table)


def _print(sheets: "Sequence[Sheet]", paths: Sequence[Path]) -> None:
    from rich.text import Text

    screen = stdout()
    for sheet in sheets:
        screen.print(Text(sheet.title, style="bold"))
        for each in sheet.tables:
            for table in fitted(each.title, each.head, each.rows):
                screen.print(table)
        for note in sheet.notes:
            screen.print(f"[dim]{note}[/dim]", highlight=False)
    err().print("written: " + ", ".join(str(path) for path in paths), markup=False)
