"""What a person sees: help with its defaults, tables that fit, remarks in one line."""

import importlib.metadata
import io
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import kvweave as library
from inputs import COMMANDS
from kvweave.cli.tables import WIDTH, fitted


def test_version(kvweave) -> None:
    assert kvweave("--version") == (0, f"kvweave {importlib.metadata.version('kvweave')}\n", "")


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_shows_every_default(kvweave, path: tuple[str, ...]) -> None:
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", kvweave(*path, "--help").out).split())
    for option in COMMANDS[path].params:
        assert "[default" not in (option.help or ""), "rich takes it for markup"
        said = option.show_default if isinstance(option.show_default, str) else None
        if said is None and option.default not in (None, False, True) and not option.required:
            said = str(option.default)
        if said is not None:
            assert re.search(rf"\[default: \(?{re.escape(said)}", shown), (option.name, said)


def test_what_is_said_to_have_json_and_out_has_both() -> None:
    for path in COMMANDS.keys() - {("serve",)}:  # which runs until it is stopped
        assert "json" in {option.name for option in COMMANDS[path].params}, path
        if path != ("lab", "fetch"):  # which writes to the cache folder alone
            assert {"out", "out_folder", "folder"} & {option.name for option in COMMANDS[path].params}, path


def test_methods_list_what_stands_around_others(kvweave, tmp_path: Path) -> None:
    told = json.loads(kvweave("methods", "--json").out)
    assert [wrapper["name"] for wrapper in told["wrappers"]] == [
        "critical",
        "fold",
        "quantized",
        "regress",
        "residual",
    ]
    shown = kvweave("methods", "--out", "here").out
    assert re.search(r"^ *quantized +Lets another", shown, re.MULTILINE)
    assert "MISSING" not in shown
    assert json.loads((tmp_path / "here/methods.json").read_text()) == told


def test_a_drawing_can_be_json(kvweave, tmp_path: Path) -> None:
    told = json.loads(kvweave("methods", "snapkv", "--draw", "--json", "--out", "drawn").out)
    assert told["method"] == "snapkv:budget=0.2"
    assert told["full"] == told["right"]
    assert (tmp_path / told["picture"]).is_file()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("run", "--dtype", "int3"), "kvweave: --dtype: dtype='int3'"),
        (("flow", "--device", "cuda:77"), "kvweave: --device: device='cuda:77'"),
        (("run", "--attention", "flash"), "kvweave: --attention: attention='flash'"),
        (("run", "--attention", "flash_attention_3"), "kvweave: --attention: attention='flash_attention_3'"),
        (("eval", "--dtype", "int3", "--quiet"), "kvweave: --dtype: dtype='int3'"),
        (("eval", "--device", "tpu9", "--quiet"), "kvweave: --device: device='tpu9'"),
        (("lab", "eval", "--attention", "x"), "kvweave: --attention: attention='x'"),
        (("run", "--model", "lap"), "kvweave: --model: model='lap' does not exist, did you mean 'lab'?"),
        (("--plugin", "nowhere", "run"), "kvweave: --plugin: plugin='nowhere' cannot be imported"),
    ],
)
def test_errors_are_blamed_on_their_option(kvweave, command: tuple[str, ...], words: str) -> None:
    done = kvweave(*command)
    assert done.code == 2
    assert done.err.startswith(words)
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(
    "command",
    [
        ("run",),
        ("flow",),
        ("lab", "eval"),
        ("eval", "--tasks", "lookup", "--count", "1", "--methods", "snapkv", "--quiet"),
        ("paper", "flowmm:table3", "--tasks", "lookup", "--samples", "1", "--quiet"),
    ],
    ids=" ".join,
)
def test_trust_is_passed_on(
    kvweave, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], trusted: bool
) -> None:
    said = []

    def load(model: str, dtype: str, device: str, attention: str = "auto", trust_remote_code: bool = False) -> None:
        said.append(trust_remote_code)
        raise library.models.ModelError("enough")

    monkeypatch.setattr("kvweave.models.load", load)
    done = kvweave(*command, *(["--trust-remote-code"] if trusted else []))
    assert (done.code, said) == (2, [trusted]), done.err


def test_one_token_is_a_remark_in_one_line(kvweave, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object) -> None:
        raise library.models.ModelError("enough")

    monkeypatch.setattr("kvweave.models.load", load)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        done = kvweave("run", "--budget", "1", "--method", "snapkv")
    assert done.err.splitlines() == [
        "kvweave: budget=1 keeps one token of each prompt: the whole prompt is budget=1.0, a share",
        "kvweave: --model: enough",
    ]


def test_the_embedded_model_says_that_it_knows_its_own_world_only(kvweave, picture: Path) -> None:
    asked = ("--image", picture, "--prompt", "What is this?")
    for command in (("run", "--repeats", 1, "--max-new-tokens", 1), ("flow",)):
        done = kvweave(*command, *asked)
        assert "knows only the world it was trained in" in " ".join((done.out + done.err).split())
    done = kvweave("run", "--images", 1, "--task", "lookup", "--repeats", 1, "--max-new-tokens", 1)
    assert "knows only" not in done.out + done.err


# -------------------------------------------------------------------- tables


def printed(*table: Any) -> str:
    screen = Console(width=WIDTH, record=True, file=io.StringIO())
    for one in fitted(*table):
        screen.print(one)
    return screen.export_text()


def test_a_table_that_fits_keeps_its_intervals() -> None:
    text = printed("Mean", ["method", "20 %"], [["snapkv", "0.31 [0.26, 0.37]"]])
    assert "0.31 [0.26, 0.37]" in text


def test_many_tasks_become_rows() -> None:
    tasks = [f"A task with a long name {n}" for n in range(9)]
    text = printed("By task", ["method", *tasks], [["snapkv", *["0.31 [0.26, 0.37]"] * 9], ["flowmm", *["0.50"] * 9]])
    for task in tasks:
        assert re.search(rf"│ {task} │ +0.31 │ +0.50 │", text)


NAMES = st.text("abc ", min_size=1, max_size=30).map(str.strip).filter(bool)


@given(st.lists(NAMES, min_size=2, max_size=30), st.lists(NAMES, min_size=1, max_size=30))
def test_every_number_is_shown_within_the_width(head: list[str], names: list[str]) -> None:
    rows = [[name, *(f"{n}.{at} [0, 1]" for at in range(1, len(head)))] for n, name in enumerate(names)]
    text = printed("Title", head, rows)
    assert max(map(len, text.splitlines())) <= WIDTH
    for row in rows:
        for cell in row[1:]:
            assert re.search(rf"(?<![\d.]){re.escape(cell.partition(' ')[0])}(?![\d.])", text)


def test_eval_prints_the_best_method_first(kvweave) -> None:
    done = kvweave(*("eval", "--methods", "random,snapkv,weave", "--tasks", "lookup,action,change,text_needle"),
                   *("--count", 3, "--images", 6, "--budgets", 0.2, "--pictures", 0, "--no-fidelity"))  # fmt: skip
    assert done.code == 0, done.err
    assert max(map(len, done.out.splitlines())) <= WIDTH
    first = done.out.partition("Difference")[0]
    order = [match[1] for match in re.finditer(r"^│ (\w+) ", first, re.MULTILINE)]
    assert order[:2] == ["full", "weave"]
    scores = [float(match[1]) for match in re.finditer(r"^│ \w+ +│ +([\d.]+) ", first, re.MULTILINE)]
    assert scores[1:] == sorted(scores[1:], reverse=True)
