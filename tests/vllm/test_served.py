"""`kvweave serve --engine vllm` with vLLM itself: many at once, preempted, and one of two servers killed."""

import os
import re
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from serving import ENVIRONMENT, ask, ask_context, children, command, generated, read_context, samples, until

from kvweave import models
from kvweave.serve.limits import DEFAULT_METHOD

METHOD, BUDGET, TOKENS = "snapkv", 0.5, 100
#: Blocks of 32 tokens: too few for what one of two servers decodes at once.
OPTIONS = "--enforce-eager --max-model-len 512 --block-size 32 --num-gpu-blocks-override 17 --max-num-seqs 16 "
OPTIONS += "--gpu-memory-utilization 0.2"  # of a machine that does other work too
#: As a user starts it: vLLM's engine is not to run in the tests' process here.
OWN = {name: value for name, value in ENVIRONMENT.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}


def descendants(process):
    """All processes that a process has started, and those that they have."""
    own = children(process)
    return own + [one for child in own for one in descendants(child)]


def command_of(process):
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


@pytest.fixture(scope="module")
def served():
    """Where it is, its process, and all processes that it ever had."""
    options = ["--engine", "vllm", "--decoders", "2", "--method", METHOD, "--method", DEFAULT_METHOD]
    options += ["--budget", str(BUDGET), "--dtype", "float32"]
    options += ["--vllm", f"{sys.executable} -m vllm.entrypoints.openai.api_server {OPTIONS}"]
    seen = set()
    with command(*options, environment=OWN) as (url, process):
        until(lambda: ready(url), 400)
        yield url, process, seen
        seen.update(descendants(process))
    time.sleep(1)
    assert not [one for one in seen if "kvweave" in command_of(one) or "vllm" in command_of(one).lower()]


def ready(url):
    told = httpx2.get(f"{url}/metrics").text
    return "kvweave_gateway_replicas_up 1.0" in told and "kvweave_gateway_decoders_up 2.0" in told


def preemptions(process):
    """Of all vLLM servers."""
    total = 0.0
    for one in descendants(process):
        words = command_of(one).split("\0")
        if "vllm.entrypoints.openai.api_server" in words and "--kv-transfer-config" in words:
            told = httpx2.get(f"http://127.0.0.1:{words[words.index('--port') + 1]}/metrics").text
            total += sum(float(x) for x in re.findall(r"^vllm:num_preemptions_total\S* (\S+)$", told, re.MULTILINE))
    return total


def test_replies_at_once_through_preemptions_and_a_killed_server(served):
    url, process, seen = served
    few, lab = [*samples(12, task="lookup"), *samples(12, task="text_needle")], models.load("lab", dtype="float32")
    spelling = f"{METHOD}:budget={BUDGET}"
    expected = [generated(lab, sample, spelling, TOKENS, endless=True)[0] for sample in few]
    for _ in range(5):  # how many replies meet in vLLM's few blocks depends on how fast prompts are read
        with ThreadPoolExecutor(len(few)) as pool:
            answers = list(pool.map(lambda n: ask(url, few[n], TOKENS, stream=bool(n % 2)), range(len(few))))
        assert answers == expected
        if preempted := preemptions(process):
            break
    assert preempted > 0
    seen.update(descendants(process))
    began = threading.Event()
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, url, sample, TOKENS, stream=True, seen=began) for sample in few[:8]]
        assert began.wait(120)
        # the server alone: its own workers are left to whoever supervises the process group
        for one in descendants(process):
            words = command_of(one).split("\0")
            if words[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]:
                os.kill(one, signal.SIGKILL)
                break
        else:
            raise AssertionError("no server")
        assert [one.result() for one in asked] == expected[:8]


def test_vllm_goes_on_from_a_cut_that_waited_for_the_reply(served):
    url, _, _ = served
    few, lab = samples(8, task="lookup"), models.load("lab", dtype="float32")
    spelling = f"{DEFAULT_METHOD},budget={BUDGET}"
    expected = [generated(lab, sample, spelling, 40, endless=True)[0] for sample in few]
    with ThreadPoolExecutor(len(few)) as pool:
        asked = [pool.submit(ask, url, sample, 40, stream=False, method=DEFAULT_METHOD) for sample in few]
        assert [one.result() for one in asked] == expected


def test_questions_to_a_context(served):
    url, _, _ = served
    (sample,) = samples(1, task="image_needle")
    id = read_context(url, sample)
    answers = [ask_context(url, id, sample.question, 4) for _ in range(2)]
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    assert answers[0].usage.prompt_tokens_details.cached_tokens > 50
