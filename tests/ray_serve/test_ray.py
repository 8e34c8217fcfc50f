"""kvweave on Ray Serve: two replicas, one of which is killed while it streams (`make test-ray`)."""

import base64
import io
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
import ray
import torch
from ray import serve

import kvweave
from kvweave import lab, models
from kvweave.serve.ray import Settings, app

METHOD, TOKENS = "snapkv", 300
PORT = 8451


def openai_messages(sample):
    def part(piece):
        if piece["type"] == "text":
            return piece
        raw = io.BytesIO()
        piece["image"].save(raw, "PNG")
        url = "data:image/png;base64," + base64.b64encode(raw.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": url}}

    return [{**turn, "content": [*map(part, turn["content"])]} for turn in sample.messages()]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=200 << 20, _node_ip_address="127.0.0.1")
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    settings = Settings(data=tmp_path_factory.mktemp("contexts"), methods=METHOD, min_replicas=2, max_replicas=2)
    serve.run(app(settings))
    place = f"http://127.0.0.1:{PORT}"
    end = time.monotonic() + 120
    while httpx2.get(f"{place}/health").status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.5)
    yield place
    serve.shutdown()
    ray.shutdown()


def ask(url, sample, stream, seen=None):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=300)
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
    model, processor = models.load("lab")
    found = []
    for sample in samples:
        inputs = models.encode(processor, sample.messages())
        with torch.inference_mode(), kvweave.compress(model, kvweave.parse_method(METHOD, budget=0.2)):
            out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
        ids = out[0, inputs["input_ids"].shape[1] :]
        found.append(processor.tokenizer.decode(ids, skip_special_tokens=True))
    return found


def replicas():
    """Names of the actors that are replicas of the model."""
    return [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if "#Replica#" in one["name"]]


def test_a_replica_that_is_killed_costs_no_answer(url):
    samples = lab.samples("lookup", 6, 4, 0)
    expected = right(samples)
    assert len(replicas()) == 2
    began = [threading.Event() for _ in samples[:4]]
    with ThreadPoolExecutor(6) as pool:
        streams = [pool.submit(ask, url, sample, True, seen) for sample, seen in zip(samples, began, strict=False)]
        rest = [pool.submit(ask, url, sample, False) for sample in samples[4:]]
        for seen in began:
            assert seen.wait(120)
        ray.kill(ray.get_actor(replicas()[0], namespace="serve"))
        assert [one.result() for one in (*streams, *rest)] == expected
    told = httpx2.get(f"{url}/metrics").text
    assert "kvweave_gateway_again_total 0.0" not in told


def test_questions_to_a_context_whose_replica_is_killed(url):
    (sample,) = lab.samples("image_needle", 1, 4, 0)
    (turn,) = openai_messages(sample)
    body = {"model": "lab", "messages": [{**turn, "content": turn["content"][:-1]}]}
    id = httpx2.post(f"{url}/v1/contexts", json=body, timeout=120).raise_for_status().json()["id"]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=300)

    def asked():
        told = client.chat.completions.create(
            model="lab",
            messages=[{"role": "user", "content": sample.question}],
            temperature=0,
            max_tokens=6,
            extra_body={"kvweave": {"context": id}},
        )
        return told.choices[0].message.content

    answers = [asked() for _ in range(3)]
    ray.kill(ray.get_actor(replicas()[0], namespace="serve"))
    answers += [asked() for _ in range(3)]
    assert len(set(answers)) == 1
    assert httpx2.get(f"{url}/v1/contexts", timeout=60).json()["data"][0]["id"] == id


def test_replicas_are_added_where_they_are_asked_for(url, tmp_path):
    """Ray waits half a minute to see whether more are asked for than one replica should have."""
    serve.run(app(Settings(data=tmp_path, methods=METHOD, min_replicas=1, max_replicas=2, target_requests=1)))
    (sample,) = lab.samples("lookup", 1, 2, 0)
    stop, most = threading.Event(), 0

    def on():
        while not stop.is_set():
            ask(url, sample, True)

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
