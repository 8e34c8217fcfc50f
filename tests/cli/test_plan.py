"""`kvweave plan`: a table, JSON, and one line for what cannot be."""

import json

from published_folders import write_internvl


def test_a_folder_with_nothing_but_its_configuration(tmp_path, kvweave):
    write_internvl(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    command = (
        "plan",
        "--model",
        "model",
        "--tokens",
        "1000",
        "--images",
        "4",
        "--budget",
        "0.2",
        "--method",
        "snapkv",
    )
    ended = kvweave(*command, "--memory", "2MiB", "--json", "--out", "out")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert json.loads((tmp_path / "out" / "plan.json").read_text()) == found
    assert found["entries"] == 200
    assert found["kept"] == found["full"] // 5
    assert found["peak"] < found["full_peak"]
    assert found["memory"] == 2 * 2**20
    assert found["fits"] == (found["peak"] <= found["memory"])
    ended = kvweave(*command, "--memory", "1KiB")
    assert ended.code == 0, ended.err
    assert "2 layers keep 200 of 1000 tokens each" in ended.out
    assert ended.out.count("too much") == 2
    assert ended.err == ""


def test_a_method_that_waits_says_so(tmp_path, kvweave):
    write_internvl(tmp_path / "model")
    ended = kvweave("plan", "--model", "model", "--tokens", "100", "--method", "weave")
    assert "it cuts once the whole prompt is cached" in ended.out
    assert ended.out.count("yes, ") == 2
    ended = kvweave("plan", "--model", "model", "--tokens", "100", "--method", "weave:form=even,coarse=2")
    assert "until its cut it holds" in ended.out


def test_what_cannot_be_planned_is_refused_in_one_line(tmp_path, kvweave):
    write_internvl(tmp_path / "model")
    cases = [
        (("--memory", "lots"), "--memory 'lots' is no size: allowed is bytes such as 24GiB"),
        (("--weights", "3bit"), "weights='3bit' is not allowed: allowed is one of auto, 8bit, 4bit"),
        (("--budget", "2.0"), "budget=2.0"),
        (("--tokens", "0"), "--tokens"),
        (("--method", "snapkw"), "did you mean 'snapkv'"),
        (("--model", "./nowhere"), "'./nowhere' does not exist"),
    ]
    for arguments, words in cases:
        ended = kvweave("plan", *(() if "--model" in arguments else ("--model", "model")), *arguments)
        assert ended.code == 2, ended.err
        assert words in ended.err
        assert ended.err.count("\n") == 1
