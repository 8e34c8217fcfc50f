"""`kvweave serve --engine vllm` with vLLM itself: many at once, preempted, and one of two servers killed."""

import base64
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import openai
import pytest
import torch

import kvweave
from kvweave import lab, models

METHOD, BUDGET, TOKENS = "snapkv", 0.5, 100
#: Blocks of 32 tokens: too few for what one of two servers decodes at once.
OPTIONS = "--enforce-eager --max-model-len 512 --block-size 32 --num-gpu-blocks-override 17 --max-num-seqs 16"
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"},
    "PYTHONPATH": str(Path(kvweave.__file__).parents[1]),
}


def openai_messages(sample):
    def part(piece):
        if piece["type"] == "text":
            return piece
        raw = io.BytesIO()
        piece["image"].save(raw, "PNG")
        url = "data:image/png;base64," + base64.b64encode(raw.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": url}}

    return [{**turn, "content": [*map(part, turn["content"])]} for turn in sample.messages()]


def descendants(process):
    """All processes that a process has started, and those that they have."""
    own = [int(one) for one in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return own + [one for child in own for one in descendants(child)]


def command_of(process):
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


@pytest.fixture(scope="module")
def served():
    """Where it is, its process, and all processes that it ever had."""
    command = [sys.executable, "-m", "kvweave", "serve", "--port", "0", "--engine", "vllm", "--decoders", "2"]
    command += ["--method", METHOD, "--budget", str(BUDGET), "--dtype", "float32"]
    command += ["--vllm", f"{sys.executable} -m vllm.entrypoints.openai.api_server {OPTIONS}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    seen = set()
    try:
        said = ""
        while not (found := re.search(r"running on (http://127\.0\.0\.1:\d+)", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        threading.Thread(target=process.stderr.read, daemon=True).start()
        url, end = found[1], time.monotonic() + 400
        while not ready(url):
            assert time.monotonic() < end
            time.sleep(1)
        yield url, process.pid, seen
    finally:
        seen.update(descendants(process.pid))
        process.terminate()
        process.wait(timeout=120)
        time.sleep(1)
        assert not [one for one in seen if "kvweave" in command_of(one) or "vllm" in command_of(one).lower()]


def ready(url):
    told = httpx2.get(f"{url}/metrics").text
    return "kvweave_gateway_replicas_up 1.0" in told and "kvweave_gateway_decoders_up 2.0" in told


def ask(url, sample, stream, seen=None):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=600)
    asked = {"model": "lab", "messages": openai_messages(sample), "temperature": 0, "max_tokens": TOKENS}
    asked["extra_body"] = {"kvweave": {"ignore_eos": True}}
    if not stream:
        return client.chat.completions.create(**asked).choices[0].message.content
    text = ""
    for number, chunk in enumerate(client.chat.completions.create(**asked, stream=True)):
        text += chunk.choices[0].delta.content or ""
        if seen is not None and number == 10:
            seen.set()
    return text


def right(samples):
    """What kvweave answers without a server."""
    model, processor = models.load("lab", dtype="float32")
    found = []
    for sample in samples:
        inputs = models.encode(processor, sample.messages())
        with torch.inference_mode(), kvweave.compress(model, kvweave.parse_method(METHOD, budget=BUDGET)):
            out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
        ids = out[0, inputs["input_ids"].shape[1] :]
        found.append(processor.tokenizer.decode(ids, skip_special_tokens=True))
    return found


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
    samples = [sample for task in ("lookup", "text_needle") for sample in lab.samples(task, 12, 4, 0)]
    expected = right(samples)
    with ThreadPoolExecutor(len(samples)) as pool:
        answers = list(pool.map(lambda n: ask(url, samples[n], bool(n % 2)), range(len(samples))))
    assert answers == expected
    assert preemptions(process) > 0
    seen.update(descendants(process))
    began = threading.Event()
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, url, sample, True, began) for sample in samples[:8]]
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


def test_questions_to_a_context(served):
    url, _, _ = served
    (sample,) = lab.samples("image_needle", 1, 4, 0)
    (turn,) = openai_messages(sample)
    body = {"model": "lab", "messages": [{**turn, "content": turn["content"][:-1]}]}
    id = httpx2.post(f"{url}/v1/contexts", json=body, timeout=60).raise_for_status().json()["id"]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=600)
    answers = [
        client.chat.completions.create(
            model="lab",
            messages=[{"role": "user", "content": sample.question}],
            temperature=0,
            max_tokens=4,
            extra_body={"kvweave": {"context": id}},
        )
        for _ in range(2)
    ]
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    assert answers[0].usage.prompt_tokens_details.cached_tokens > 50
