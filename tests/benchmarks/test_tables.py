"""The benchmarks run, and write what they print."""

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import kvweave
from benchmarks import measure
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.plan import LIMITS
from benchmarks.gpu.report import Report


def test_statistics_writes_every_row_beside_attention(tmp_path, capsys, monkeypatch):
    from benchmarks import statistics

    monkeypatch.setattr(statistics, "import_milliseconds", lambda times: 301.0)
    assert statistics.main(["--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    (data,) = (json.loads(path.read_text()) for path in tmp_path.glob("statistics-*.json"))
    assert {"cpu", "torch", "transformers", "date", "command"} <= data["machine"].keys()
    figures = data["figures"]
    assert {f["what"] for f in figures} == {
        *statistics.runs(statistics.SMALL, 64, []), *statistics.FIRST, statistics.SAMPLED, *kvweave.list_methods()
    }  # fmt: skip
    assert {f["ratio"] for f in figures if f["what"] == statistics.ATTENTION} == {1.0}
    assert all(f["mebibytes"] > 0 for f in figures)
    (text,) = (path.read_text() for path in tmp_path.glob("statistics-*.md"))
    for name in ("column sums", "flow ratio", "matching", "merging", *statistics.FIRST):
        assert name in printed
        assert f"| {name} |" in text


def test_marks_are_judged():
    from benchmarks import statistics

    figure = statistics.Figure("column sums", str(statistics.SMALL), 4096, 10.0, 0.75, 51.0)
    assert [row[2] for row in statistics.verdicts([figure])] == ["met", "not met"]
    slow = [statistics.Figure("flashcache", str(statistics.QWEN), n, n**1.5, None, 1.0) for n in (2048, 4096, 8192)]
    assert [row[1:] for row in statistics.verdicts(slow)] == [("1.50 exponent", "not met")]
    other = [replace(figure, length=2048), replace(figure, what=statistics.ATTENTION)]
    assert [row[2] for row in statistics.verdicts(other)] == ["not measured"] * 2


def test_what_would_not_fit_in_the_time_is_left_out(monkeypatch):
    from benchmarks import statistics

    slow = {statistics.ATTENTION: lambda: None, "slow": lambda: time.sleep(0.05)}
    monkeypatch.setattr(statistics, "runs", lambda shape, length, methods: slow)
    clock = iter([0.0, 0.1] * 100)  # a tenth of a second by the process' clock
    monkeypatch.setattr(statistics.measure.time, "process_time", lambda: next(clock))
    figures = [f for part in statistics.measured(statistics.SMALL, (64, 128), [], 0.0, 0.2) for f in part]
    assert [(f.what, f.length) for f in figures if f.what == "slow"] == [("slow", 64)]
    assert "-" in statistics.cells(figures, statistics.SMALL, (64, 128))[1]


def test_decode_writes_every_method_and_what_the_bias_costs(tmp_path, capsys):
    from benchmarks import decode

    assert decode.main(["--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    (data,) = (json.loads(path.read_text()) for path in tmp_path.glob("decode-*.json"))
    figures = data["figures"]
    assert {f["what"] for f in figures} == {decode.FULL, decode.PLAIN, *decode.METHODS}
    assert data["left_out"] == []
    assert {f["batch"] for f in figures} == {1, 8}
    for batch in (1, 8):
        held = {f["what"]: f["mebibytes"] for f in figures if f["batch"] == batch}
        assert all(held[name] < 0.3 * held[decode.FULL] for name in decode.METHODS)
    assert [mark["mark"].split()[:2] for mark in data["marks"]] == [["flowmm", "mass_bias"]] * 2
    (text,) = (path.read_text() for path in tmp_path.glob("decode-*.md"))
    for name in decode.METHODS:
        assert name in printed
        assert f"| {name} |" in text


def test_ratios_to_a_peer_are_judged():
    from benchmarks import peers

    names = {name for mark in peers.MARKS for name in (*mark.what, *mark.to)}
    figures = [peers.Figure("", name, "H", 4096, [2.0, 1.0, 3.0], 0.0) for name in names]
    rows = peers.verdicts(figures)
    assert rows[0] == (f"snapkv <= 0.6x {peers.SNAPKV}, H", "1.00x", "not met")
    assert [row[2] for row in rows if row[0].startswith(("column sums", "snapkv to"))] == ["", "met"]


def test_a_worker_answers():
    from benchmarks import peers

    worker = peers.Worker("kvweave", Path(sys.executable))
    answer = worker.ask(shape=[4, 2, 8], length=64)
    assert {"attention", "snapkv", "h2o", "flowmm"} <= set(answer["runs"])
    assert worker.ask(run="snapkv", measure="seconds")["value"] > 0
    assert worker.ask(run="snapkv", measure="bytes")["value"] > 0
    worker.close()


def test_gpu_says_in_one_line_that_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_gpu_runs_small_on_a_cpu(tmp_path, capsys):
    failures = gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path)])
    assert failures == 0, capsys.readouterr().err
    (data,) = (json.loads(path.read_text()) for path in tmp_path.glob("gpu-*.json"))
    assert {row["verdict"] for row in data["checks"]} == {"ok"}
    tables = {"column_sums", "decode", "stored", "end_to_end", "prefill_ms", "prefill_mib", "whole_model"}
    assert tables <= data.keys()
    settings = ["100 %, graph", "20 %, graph", "5 %, graph", "100 %, transformers' cache, eager"]
    assert [row[""].split(", ", 1)[1] for row in data["end_to_end"]][:4] == settings
    assert {row["mark"].split()[0] for row in data["marks"]} == {"column", "decode", "end"}
    held = {row[""]: row["of full"] for row in data["whole_model"]}
    assert held["L=128, snapkv"] == held["L=128, weave:form=even,defer=0"] == "20 %"


def test_a_part_that_fails_leaves_the_others(tmp_path, capsys):
    report = Report(tmp_path, measure.machine())
    with report.part("one"):
        raise RuntimeError("no memory")
    report.table("two", "Two", ["", "x"], [["a", "1"]])
    (data,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert data["failures"] == ["one: RuntimeError: no memory"]
    assert data["two"] == [{"": "a", "x": "1"}]


def test_a_part_has_its_time(tmp_path, monkeypatch):
    monkeypatch.setitem(LIMITS, "slow", 0.05)
    report = Report(tmp_path, measure.machine())
    with report.part("slow"):
        time.sleep(5)
    assert report.failures == ["slow: TimeoutError: its time is up"]


def test_exponent():
    assert math.isclose(measure.exponent([1, 2, 4], [3, 12, 48]), 2)
    assert measure.exponent([1], [3]) is None


def test_rounds_are_interleaved():
    calls = []
    seconds = measure.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 3
    assert {name: len(x) for name, x in seconds.items()} == {"a": 3, "b": 3}
    assert measure.median_ratio([2, 9, 4], [1, 3, 4]) == 2


def test_research_compares_methods_and_resumes(tmp_path, capsys, monkeypatch):
    from benchmarks.research import weave as research

    asked = research.Question("Does it?", {"weave": "weave", "soft": research.SOFT}, (0.1,), 1, 3)
    monkeypatch.setattr(research, "QUESTIONS", {"tiny": asked})
    folders = ["--out", str(tmp_path / "out"), "--results", str(tmp_path)]
    research.main(folders)
    first = json.loads((tmp_path / "research.json").read_text())
    rows = first["questions"]["tiny"]["long"]["rows"]
    assert [row["method"] for row in rows] == ["full", "weave", "soft"]
    assert all(0 <= row["low"] <= row["score"] <= row["high"] <= 1 for row in rows)
    assert first["questions"]["tiny"]["short"]["unequal"] == []
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("cells/*.json")}
    research.main(folders)
    assert cells == {path: path.stat().st_mtime_ns for path in cells}
    assert json.loads((tmp_path / "research.json").read_text()) == first
    assert "| soft |" in (tmp_path / "research.md").read_text()


def test_ideas_keep_what_the_budget_allows():
    from benchmarks.research import weave as research
    from benchmarks.shapes import SMALL, layer_of

    layer = layer_of(SMALL, 96)
    for name in research.QUESTIONS["ideas"].methods.values():
        method = kvweave.parse_method(name, budget=0.25)
        (done,) = kvweave.compress_tensors(method, [layer.queries], [layer.keys], [layer.values], visual=layer.visual)
        assert int((done.positions >= 0).sum()) == 24 * SMALL.kv_heads, name
        assert 0.9 * 96 * SMALL.kv_heads < float(done.mass.sum()) <= 96 * SMALL.kv_heads, name


def test_break_even_says_when_a_cut_has_paid(tmp_path, capsys):
    from benchmarks.research import break_even

    assert break_even.main(["--lengths", "128", "--budgets", "0.2", "--rounds", "1", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("break-even-*.json")
    for figure in json.loads(path.read_text())["figures"]:
        assert figure["after"] < figure["before"]
        assert figure["pays_after"] > figure["defer"]
