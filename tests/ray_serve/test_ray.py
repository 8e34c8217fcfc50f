"""kvweave on Ray Serve: two replicas, one of which is killed while it streams (`make test-ray`)."""

import asyncio
import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import engine_double
import httpx2
import pytest
import ray
from pydantic import ValidationError
from ray import serve
from serving import ask, ask_context, generated, openai_messages, read_context, samples, until

from kvweave import models
from kvweave.serve.ray import Replica, Settings, app

METHOD, TOKENS = "snapkv", 300
PORT = 8451


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    for check in ("READY", "HEALTH"):  # of Ray's own proxy, on a machine that does other things too
        os.environ[f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S"] = "60"
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=200 << 20, _node_ip_address="127.0.0.1")
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    settings = Settings(data=tmp_path_factory.mktemp("contexts"), methods=METHOD, min_replicas=2, max_replicas=2)
    serve.run(app(settings))
    place = f"http://127.0.0.1:{PORT}"
    until(lambda: httpx2.get(f"{place}/health").status_code == 200, 120)
    yield place
    serve.shutdown()
    ray.shutdown()


def replicas():
    """Names of the actors that are replicas of the model."""
    return [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if "#Replica#" in one["name"]]


def test_a_replica_that_is_killed_costs_no_answer(url):
    few, lab = samples(6, task="lookup"), models.load("lab")
    expected = [generated(lab, sample, f"{METHOD}:budget=0.2", TOKENS, endless=True)[0] for sample in few]
    assert len(replicas()) == 2
    began = [threading.Event() for _ in few[:4]]
    with ThreadPoolExecutor(6) as pool:
        pairs = zip(few, began, strict=False)
        streams = [pool.submit(ask, url, sample, TOKENS, stream=True, seen=seen) for sample, seen in pairs]
        rest = [pool.submit(ask, url, sample, TOKENS, stream=False) for sample in few[4:]]
        for seen in began:
            assert seen.wait(120)
        ray.kill(ray.get_actor(replicas()[0], namespace="serve"))
        assert [one.result() for one in (*streams, *rest)] == expected
    told = httpx2.get(f"{url}/metrics").text
    assert "kvweave_gateway_again_total 0.0" not in told


def test_questions_to_a_context_whose_replica_is_killed(url):
    (sample,) = samples(1, task="image_needle")
    id = read_context(url, sample)

    def asked():
        return ask_context(url, id, sample.question, 6).choices[0].message.content

    answers = [asked() for _ in range(3)]
    ray.kill(ray.get_actor(replicas()[0], namespace="serve"))
    answers += [asked() for _ in range(3)]
    assert len(set(answers)) == 1
    assert httpx2.get(f"{url}/v1/contexts", timeout=60).json()["data"][0]["id"] == id


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"engine": "sglang"}, "'kvweave' or 'vllm'"),
        ({"engine": "vllm", "handoff": "/x"}, "engine=vllm is not allowed without decoder"),
        ({"engine": "vllm", "decoder": "/x"}, "engine=vllm is not allowed without handoff"),
        ({"decoder": "/x"}, "decoder is not allowed with engine=kvweave"),
        ({"vllm": "vllm"}, "vllm is not allowed with engine=kvweave"),
    ],
)
def test_settings_that_do_not_go_together(given, message):
    with pytest.raises(ValidationError, match=message):
        Settings(data="/x", **given)


def test_a_replica_starts_a_vllm_of_its_own(tmp_path):
    """Without Ray around it; vLLM's double, which speaks as it does, is killed while it answers."""
    lab, few = models.load("lab"), samples(3, images=2, task="lookup")
    models.export_decoder(lab[0], tmp_path / "decoder")
    double = f"{sys.executable} {Path(engine_double.__file__)}"
    own = {"engine": "vllm", "decoder": tmp_path / "decoder", "handoff": tmp_path / "handoff", "vllm": double}
    settings = Settings(data=tmp_path / "contexts", methods=METHOD, **own)
    expected = [generated(lab, sample, f"{METHOD}:budget=0.2", 100, endless=True)[0] for sample in few]

    async def asked():
        replica = Replica.__new__(Replica)
        await replica.__init__(settings)
        replica.check_health()
        tasks = [asyncio.create_task(replied(replica, sample)) for sample in few]
        await asyncio.sleep(1)
        for process in servers(tmp_path):
            os.kill(process, signal.SIGKILL)
        answers = await asyncio.gather(*tasks)
        assert len(servers(tmp_path)) == 1  # another one
        return answers

    assert asyncio.run(asked()) == expected
    until(lambda: not servers(tmp_path), 60)


async def replied(replica, sample):
    """What a replica answers when it is called."""
    body = {"model": "lab", "messages": openai_messages(sample), "temperature": 0, "max_tokens": 100}
    raw = json.dumps(body | {"kvweave": {"ignore_eos": True}}).encode()
    headers = [("Content-Type", "application/json"), ("Host", "localhost")]
    parts = [part async for part in replica.respond("POST", "/v1/chat/completions", headers, raw)]
    return json.loads(b"".join(parts[1:]))["choices"][0]["message"]["content"]


def servers(folder):
    """Processes that were started on a decoder of this folder, their guards not."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = file.read_text().split("\0")
            if len(words) > 1 and words[1].endswith("engine_double.py") and str(folder / "decoder") in words:
                found.append(int(file.parent.name))
    return found


def test_replicas_are_added_where_they_are_asked_for(url, tmp_path):
    """Ray waits half a minute to see whether more are asked for than one replica should have."""
    serve.run(app(Settings(data=tmp_path, methods=METHOD, min_replicas=1, max_replicas=2, target_requests=1)))
    (sample,) = samples(1, images=2, task="lookup")
    stop, most = threading.Event(), 0

    def on():
        while not stop.is_set():
            ask(url, sample, TOKENS, stream=True)

    with ThreadPoolExecutor(4) as pool:
        going = [pool.submit(on) for _ in range(4)]
        end = time.monotonic() + 150
        while most < 2 and time.monotonic() < end:
            told = serve.status().applications["default"].deployments["Replica"].replica_states
            most = max(most, told.get("RUNNING", 0))
            time.sleep(1)
        stop.set()
        for one in going:
            one.result()
    assert most == 2
