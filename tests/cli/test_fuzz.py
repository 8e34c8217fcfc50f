"""No value of any option ends in anything but its work, or one line that names it."""

import contextlib
import io
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inputs import COMMANDS
from kvweave import models
from kvweave.cli import main

HUGE = "9" * 400
NASTY = st.sampled_from(
    (
        *(
            "",
            " ",
            "0",
            "-1",
            "1",
            "3",
            "0.2",
            "1e400",
            "nan",
            "inf",
            HUGE,
            "9" * 5000,
            "x" * 5000,
            "-",
            "--",
            ":",
            ",",
            "=",
        ),
        *(
            "..x",
            "..",
            "this.x",
            "os.snapkv",
            "snapkv:name=x",
            f"snapkv:window={HUGE}",
            f"snapkv:defer_weight={HUGE}",
        ),
        *(
            "quantized:method=quantized",
            "[",
            "[red]",
            "\0",
            "\udcff",
            "~",
            "~nobody/x",
            "a/b/c",
            "lookup",
            "snapkv",
            "lab",
        ),
    )
)
TEXT = NASTY | st.text(max_size=10) | st.integers().map(str) | st.floats().map(str)
#: Not drawn: what would take long where it is allowed.
HEAVY = {("lab", "export"): {"count", "images", "task"}, ("methods",): {"draw"}, ("lab", "example"): set()}


class Enough(models.ModelError):
    """Everything up to the model was fine."""


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise Enough("enough")

    for name in ("kvweave.models.load", "kvweave.models.checkpoint_mark", "kvweave.models.loading.load_tokenizer"):
        monkeypatch.setattr(name, stop)
    monkeypatch.setattr("kvweave.models.source._unreached", lambda name: "no hub here")
    monkeypatch.setattr("kvweave.lab.train.train", lambda *args, **options: stop())
    monkeypatch.setattr("kvweave.evals.tasks.export.export", lambda *args, **options: tmp_path)
    monkeypatch.chdir(tmp_path)


def ended(arguments: list[str]) -> tuple[int, str]:
    """A command's exit code and what it said on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SystemExit) as code:
            main(arguments)
    return code.value.code, err.getvalue()


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
@given(data=st.data())
@settings(
    max_examples=int(os.environ.get("KVWEAVE_EXAMPLES", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_value_of_any_option(path: tuple[str, ...], data: Any) -> None:
    params = [p for p in COMMANDS[path].params if p.name not in HEAVY.get(path, ()) and p.name != "help"]
    chosen = data.draw(st.lists(st.sampled_from(params), min_size=1, max_size=2, unique_by=lambda p: p.name))
    arguments = list(path)
    for param in chosen:
        words = [] if getattr(param, "is_flag", False) else [data.draw(TEXT, label=param.name)]
        arguments += [param.opts[0], *words] if param.param_type_name == "option" else words
    code, err = ended(arguments)
    lines = [line for line in err.splitlines() if line.startswith("kvweave: ")]
    assert code in (0, 2), err
    assert "unexpected" not in err
    if code == 2 and lines:
        assert len(lines) == 1
        assert len(lines[0]) < 3000
