"""`kvweave serve --replicas 2`, one of which is killed: what was asked is answered, and nothing is left behind."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serving import ENVIRONMENT, ask, ask_context, children, command, generated, read_context, samples, until

METHOD = "snapkv"
TOKENS = 300
START = 180  # seconds that several processes may take to load a model, on a machine that does other things too


@dataclass
class Served:
    """A gateway's process and where it is."""

    process: int
    url: str

    def metric(self, name: str) -> float:
        found = re.search(rf"^kvweave_{re.escape(name)} (\S+)$", httpx2.get(f"{self.url}/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    @property
    def servers(self) -> list[int]:
        """Processes of its replicas, behind their guards."""
        return [server for guarding in children(self.process) for server in children(guarding)]

    def all_answer(self) -> bool:
        return self.metric("gateway_replicas_up") == 2

    def running(self, words: str) -> list[int]:
        """Those of its processes whose command has these words."""
        return [server for server in self.servers if words in Path(f"/proc/{server}/cmdline").read_text()]


@contextmanager
def serving(*options: str) -> Iterator[Served]:
    """`kvweave serve`, several processes of it."""
    with command("--method", METHOD, *options) as (url, process):
        yield Served(process, url)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving("--replicas", "2", "--new-tokens", str(TOKENS)) as found:
        until(found.all_answer, START)
        yield found


def test_a_replica_that_is_killed_costs_no_answer(served: Served, lab_model: tuple[Any, Any]) -> None:
    few = samples(6, images=2)
    right = [generated(lab_model, sample, f"{METHOD}:budget=0.2", TOKENS, endless=True)[0] for sample in few]
    streamed = [(sample, threading.Event()) for sample in few[:4]]
    with ThreadPoolExecutor(6) as pool:
        streams = [pool.submit(ask, served.url, sample, TOKENS, stream=True, seen=seen) for sample, seen in streamed]
        rest = [pool.submit(ask, served.url, sample, TOKENS, stream=False) for sample in few[4:]]
        for _, seen in streamed:
            assert seen.wait(60)
        os.kill(served.servers[0], signal.SIGKILL)
        assert [one.result() for one in (*streams, *rest)] == right
    assert served.metric("gateway_went_on_total") >= 1
    until(served.all_answer, START)
    assert served.metric("gateway_restarts_total") == 1


def test_contexts_of_a_replica_that_is_killed_are_there_again(served: Served) -> None:
    few = samples(2, images=2, task="image_needle")
    ids = [read_context(served.url, sample, budget=0.5) for sample in few]

    def asked() -> list[str | None]:
        told = [ask_context(served.url, id, "what digit is hidden in image #1 ?") for id in ids]
        return [one.choices[0].message.content for one in told]

    answers = asked()
    listed = httpx2.get(f"{served.url}/v1/contexts").json()["data"]
    assert {context["id"] for context in listed} == set(ids)
    for server in served.servers:
        os.kill(server, signal.SIGKILL)
    assert asked() == answers  # they wait until their replica has started anew
    until(served.all_answer, START)


def test_a_gateway_that_is_killed_leaves_nothing_behind() -> None:
    words = [sys.executable, "-m", "kvweave", "serve", "--port", "0", "--replicas", "2"]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    until(lambda: len([s for g in children(process.pid) for s in children(g)]) == 2, START)
    servers = [server for guarding in children(process.pid) for server in children(guarding)]
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{server}").exists() for server in servers):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_decoders_that_are_killed_cost_no_answer(lab_model: tuple[Any, Any]) -> None:
    """The whole chain: gateway, a replica that reads and cuts, engines that decode."""
    few, tokens = samples(4, images=2), 100
    right = [generated(lab_model, sample, f"{METHOD}:budget=0.2", tokens, endless=True)[0] for sample in few]
    double = Path(__file__).with_name("engine_double.py")
    with serving("--engine", "vllm", "--decoders", "2", "--vllm", f"{sys.executable} {double}") as found:
        until(lambda: found.metric("gateway_replicas_up") == 1 and found.metric("gateway_decoders_up") == 2, START)
        seen = threading.Event()
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask, found.url, sample, tokens, stream=True, seen=seen) for sample in few]
            assert seen.wait(60)
            for engine in found.running("--kv-transfer-config"):  # whichever decodes what: they are started anew
                os.kill(engine, signal.SIGKILL)
            assert [one.result() for one in asked] == right
        assert found.metric('decoders_again_total{replica="0"}') >= 1
