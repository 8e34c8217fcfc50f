"""The command line: `kvweave run | eval | paper | flow | plan | convert | serve | methods | calibrate | lab`.

Exit codes: 0 done, 2 bad input, 1 anything else.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from kvweave import __version__
from kvweave.cli.calibrate import calibrate
from kvweave.cli.console import BAD_INPUT, STOPPED, UNEXPECTED, BadInput, bad_input
from kvweave.cli.convert import convert
from kvweave.cli.eval import evaluate
from kvweave.cli.flow import flow
from kvweave.cli.lab import lab
from kvweave.cli.methods import methods
from kvweave.cli.paper import paper
from kvweave.cli.plan import plan
from kvweave.cli.run import run
from kvweave.cli.serve import serve

app = typer.Typer(
    name="kvweave",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("run")(run)
app.command("eval")(evaluate)
app.command("paper")(paper)
app.command("flow")(flow)
app.command("plan")(plan)
app.command("convert")(convert)
app.command("serve")(serve)
app.command("methods")(methods)
app.command("calibrate")(calibrate)
app.add_typer(lab, name="lab")


def _version(show: bool) -> None:
    if show:
        print(f"kvweave {__version__}")
        raise typer.Exit


@app.callback()
def common(
    plugin: Annotated[
        list[str] | None,
        typer.Option(help="Module that is imported first, for the methods that it registers; repeatable."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Compress the KV cache of multimodal LLMs, and see what stays."""
    if plugin:
        from kvweave.methods.registry import load_plugin

        with bad_input(option="--plugin"):
            for module in plugin:
                load_plugin(module)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        code = _exit_code(arguments)
    sys.exit(code)


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """A warning as a remark in one line: whoever types a command has no line of code to look at."""
    print("kvweave: " + " ".join(str(message).split()), file=sys.stderr)


def _exit_code(arguments: Sequence[str] | None) -> int:
    """Run a command; errors become one line on stderr."""
    typed = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = app(args=typed, prog_name="kvweave", standalone_mode=False)
        if code == STOPPED:  # typer's own answer to Ctrl-C
            return _fail("stopped", STOPPED)
        return code if isinstance(code, int) else 0
    except BadInput as error:
        return _fail(str(error), BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("stopped", STOPPED)
    except Exception as error:
        usage = getattr(error, "format_message", None)  # click's own errors: unknown options, missing values
        if usage is not None:
            return (
                _fail(_value_of(error, typed) + usage(), BAD_INPUT) if usage() else BAD_INPUT
            )  # none: help was shown
        if isinstance(error, ValueError) and "allowed is" in str(error):  # how the library refuses an option
            return _fail(str(error), BAD_INPUT)
        if os.environ.get("KVWEAVE_DEBUG"):
            raise
        return _fail(
            f"unexpected {type(error).__name__}: {error} (KVWEAVE_DEBUG=1 shows where)",
            UNEXPECTED,
        )


def _value_of(error: Exception, typed: Sequence[str]) -> str:
    """The option that an error of click's is about, with its value: click names only the option."""
    for option in getattr(getattr(error, "param", None), "opts", ()):
        for word, following in zip(typed, [*typed[1:], ""], strict=True):
            if word == option:
                return f"{option} {following!r}: "
            if word.startswith(f"{option}="):
                return f"{option} {word.partition('=')[2]!r}: "
    return ""


def _fail(message: str, code: int) -> int:
    print("kvweave: " + " ".join(map(_shortened, message.split())), file=sys.stderr)
    return code


def _shortened(word: str, longest: int = 300) -> str:
    return word if len(word) <= longest else f"{word[: longest - 3]}..."
