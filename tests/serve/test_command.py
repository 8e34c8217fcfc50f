"""`kvweave serve`, as a person would type it."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from serving import openai_messages, samples

import kvweave
from kvweave.cli import main

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(kvweave.__file__).parents[1]), "KVWEAVE_API_KEYS": "a" * 20}


def test_it_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("the-key-of-somebody\n\nthe-key-of-another\n")
    command = [sys.executable, "-m", "kvweave", "serve", "--port", "0", "--api-keys", str(keys), "--host", "0.0.0.0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        assert process.stderr is not None
        said = ""
        while "running on" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        assert "replies decode together" in " ".join(said.split())
        port = re.findall(r"running on http://0\.0\.0\.0:(\d+)", said)[0]
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="the-key-of-another", max_retries=0)
        (sample,) = samples(1, task="text_needle")
        told = client.chat.completions.create(model="lab", messages=openai_messages(sample), temperature=0)
        assert told.choices[0].message.content == sample.answer
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="a" * 20, max_retries=0).models.list()
    finally:
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=60)
    assert "Traceback" not in rest
    assert sample.question not in said + rest


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "without API keys"),
        (["--method", "snapkw"], "did you mean 'snapkv'"),
        (["--budget", "2.5"], "--budget"),
        (["--memory", "much"], "--memory"),
        (["--image-host", "http://x"], "--image-host"),
        (["--api-keys", "/nowhere/keys"], "--api-keys"),
        (["--least-budget", "0.9", "--most-budget", "0.1"], "least <= most"),
        (["--model", "/nowhere"], "--model"),
        (["--port", "70000"], "--port"),
        (["--replicas", "0"], "--replicas 0"),
        (["--replica", "example.org:80"], "--replica"),
        (["--engine", "sglang"], "--engine 'sglang': allowed is one of kvweave, vllm"),
        (["--decoders", "2"], "--decoders is not allowed with --engine kvweave"),
        (["--engine", "vllm", "--decoder", "http://x"], "without --handoff"),
        (["--engine", "vllm", "--decoders", "0"], "--decoders 0"),
        (["--context-probes", "oracle"], "--context-probes 'oracle': allowed is one of none"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVWEAVE_API_KEYS", raising=False)
    with pytest.raises(SystemExit) as left:
        main(["serve", *options])
    assert left.value.code == 2
    said = capsys.readouterr().err.strip()
    assert words in said
    assert len(said.splitlines()) == 1


def test_keys_that_are_too_short_are_not_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("hush-hush\n")
    with pytest.raises(SystemExit) as left:
        main(["serve", "--api-keys", str(keys)])
    assert left.value.code == 2
    assert "hush" not in capsys.readouterr().err
