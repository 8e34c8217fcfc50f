"""One request, tried on one replica after the other: replicas that are full, break, stop or are not there."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from serving import Running, metrics, until
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from kvweave.serve.errors import STOPPED, Refusal
from kvweave.serve.fleet import guard
from kvweave.serve.fleet.processes import group
from kvweave.serve.fleet.replicas import LostError, Replica, Replicas
from kvweave.serve.gateway.app import Gateway
from kvweave.serve.keys import Keys
from kvweave.serve.limits import Limits

KEY, OTHER = "the-key-of-somebody", "the-key-of-another"
TOKENS = 6
TEXT = "".join(f"w{n} " for n in range(TOKENS))


class Double:
    """What stands for a server: it answers every request with `TEXT`, or does as it is told.

    Attributes:
        does: "answer", "full", "refuse"; "break" or "stop" after `after` tokens.
        asked: bodies that it was sent.
    """

    def __init__(self, does: str = "answer", after: int = 3, contexts: tuple[str, ...] = ()) -> None:
        self.does, self.after, self.contexts = does, after, contexts
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str] = set()

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        self.keys.add(request.headers["authorization"])
        if self.does == "full":
            return Refusal(429, "full", code="queue_full", retry_after=2).response
        if self.does == "refuse":
            return Refusal(400, "temperature is hot", "temperature").response
        if body.get("stream"):
            return StreamingResponse(self._events(body), media_type="text/event-stream")
        if self.does == "stop":
            return Refusal(503, "stopped", code=STOPPED).response
        if self.does == "break":
            return StreamingResponse(self._torn())
        message = {"role": "assistant", "content": TEXT}
        return JSONResponse({"id": "x", "choices": [{"index": 0, "message": message}], "body": body})

    async def _torn(self) -> Any:
        yield b'{"id": '
        raise RuntimeError("torn")

    async def _events(self, body: dict[str, Any]) -> Any:
        known = body["kvweave"].get("known_token_ids", [])
        for n in range(TOKENS):
            for index in range(body.get("n", 1)):
                if n == self.after and self.does == "stop":
                    yield b"data: " + json.dumps(Refusal(503, "stopped", code=STOPPED).body).encode() + b"\n\n"
                    return
                if n == self.after and self.does == "break":
                    raise RuntimeError("torn")
                if index < len(known) and n < len(known[index]):
                    assert known[index][n] == n
                delta = {"content": f"w{n} "}
                choice = {"index": index, "delta": delta, "finish_reason": None, "logprobs": None, "token_ids": [n]}
                chunk = {"id": f"double-{id(self)}", "object": "chat.completion.chunk", "created": 5, "model": "lab"}
                yield b"data: " + json.dumps(chunk | {"choices": [choice]}).encode() + b"\n\n"
                await asyncio.sleep(0.01)
        yield b"data: [DONE]\n\n"

    async def context(self, request: Request) -> Response:
        here = request.path_params["id"] in self.contexts
        return JSONResponse({"id": request.path_params["id"]}) if here else Refusal(404, "no such context").response

    async def read(self, request: Request) -> Response:
        return JSONResponse({"id": "ctx_new"})

    async def list_contexts(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": id, "expires": len(id)} for id in self.contexts]})

    async def told(self, request: Request) -> Response:
        return Response("# HELP kvweave_tokens x\n# TYPE kvweave_tokens counter\nkvweave_tokens_total 3.0\n")

    async def health(self, request: Request) -> Response:
        return Response()

    def application(self) -> FastAPI:
        app = FastAPI()
        for verb, path, answer in (
            ("POST", "/v1/chat/completions", self.chat),
            ("GET", "/v1/contexts/{id}", self.context),
            ("POST", "/v1/contexts", self.read),
            ("GET", "/v1/contexts", self.list_contexts),
            ("GET", "/metrics", self.told),
            ("GET", "/health", self.health),
        ):
            app.add_api_route(path, answer, methods=[verb], response_model=None)
        return app


class Behind:
    """A gateway before doubles."""

    def __init__(self, *doubles: Double, more: tuple[str, ...] = (), **options: Any) -> None:
        self.doubles = doubles
        self._running = [Running(double) for double in doubles]
        urls = [running.url for running in self._running]
        chosen = {"limits": Limits(), "keys": Keys([KEY, OTHER])} | options
        self.gateway = Gateway([*urls, *more], **chosen)
        self.running = Running(self.gateway)
        until(lambda: len(self.gateway.replicas.up) == len(doubles))

    def ask(self, **body: Any) -> httpx2.Response:
        given = {"model": "lab", "messages": [{"role": "user", "content": "?"}], **body}
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx2.post(f"{self.running.url}/v1/chat/completions", json=given, headers=headers, timeout=30)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(f"{self.running.url}{path}", headers={"Authorization": f"Bearer {KEY}"}, timeout=30)

    def counted(self, name: str) -> float:
        return metrics(self.running, KEY)[f"kvweave_gateway_{name}"]

    def lead_to(self, number: int) -> None:
        """The next request goes to this one."""
        for n, replica in enumerate(self.gateway.replicas.all):
            replica.inside = 0 if n == number else 50

    def stop(self) -> None:
        self.running.stop()
        for running in self._running:
            running.stop()


@pytest.fixture
def behind() -> Iterator[Any]:
    made: list[Behind] = []

    def make(*doubles: Double, **options: Any) -> Behind:
        made.append(Behind(*doubles, **options))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def events(told: httpx2.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in told.text.splitlines() if line]
    assert lines[-1] == "[DONE]", lines
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("does", ["full", "stop", "break"])
@pytest.mark.parametrize("stream", [False, True])
def test_what_one_replica_does_not_answer_another_does(behind: Any, does: str, stream: bool) -> None:
    found = behind(Double(does, after=0), Double())
    found.lead_to(0)
    told = found.ask(stream=stream)
    assert told.status_code == 200
    text = "".join(e["choices"][0]["delta"]["content"] for e in events(told)) if stream else told.json()
    assert text == TEXT if stream else text["choices"][0]["message"]["content"] == TEXT
    assert len(found.doubles[0].asked) == 1
    assert found.counted("again_total") == 1
    assert found.counted("went_on_total") == 0


@pytest.mark.parametrize("does", ["stop", "break"])
@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_that_has_begun_goes_on_elsewhere(behind: Any, does: str, n: int) -> None:
    found = behind(Double(does), Double())
    found.lead_to(0)
    chunks = events(found.ask(stream=True, n=n, temperature=0))
    for index in range(n):
        of_it = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["delta"]["content"] for choice in of_it) == TEXT  # none twice, none lost
        assert not any("token_ids" in choice for choice in of_it)  # nobody asked for them
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert found.doubles[1].asked[0]["kvweave"]["known_token_ids"] == [[0, 1, 2]] * n
    assert found.counted("went_on_total") == 1


def test_tokens_that_were_asked_for_and_known_before_stay(behind: Any) -> None:
    found = behind(Double("break"), Double())
    found.lead_to(0)
    chunks = events(found.ask(stream=True, kvweave={"return_token_ids": True, "known_token_ids": [[0, 1, 2, 3, 4]]}))
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[n] for n in range(TOKENS)]
    assert found.doubles[1].asked[0]["kvweave"]["known_token_ids"] == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("own", "field"),
    [
        (5, "kvweave"),
        ([], "kvweave"),
        ({"known_token_ids": "x"}, "kvweave.known_token_ids"),
        ({"known_token_ids": [5]}, "kvweave.known_token_ids.0"),
        ({"return_token_ids": "yes"}, "kvweave.return_token_ids"),
        ({"context": 5}, "kvweave.context"),
    ],
)
def test_what_it_reads_itself_it_refuses_itself(behind: Any, own: Any, field: str, stream: bool) -> None:
    found = behind(Double())
    told = found.ask(stream=stream, kvweave=own)
    assert (told.status_code, told.json()["error"]["param"]) == (400, field)
    assert found.ask(stream=stream, kvweave=None).status_code == 200


def test_a_request_does_not_break_all_replicas(behind: Any) -> None:
    doubles = [Double("break", after=0) for _ in range(4)]
    found = behind(*doubles)
    for stream in (False, True):
        told = found.ask(stream=stream)
        assert told.status_code == 503
        assert "3 replicas broke" in told.json()["error"]["message"]
    assert sum(len(double.asked) for double in doubles) == 6


def test_what_is_at_fault_is_asked_once(behind: Any) -> None:
    found = behind(Double("refuse"), Double("refuse"))
    for stream in (False, True):
        told = found.ask(stream=stream)
        assert (told.status_code, told.json()["error"]["param"]) == (400, "temperature")
    assert sum(len(double.asked) for double in found.doubles) == 2


def test_all_are_full(behind: Any) -> None:
    found = behind(Double("full"), Double("full"))
    told = found.ask()
    assert (told.status_code, told.headers["retry-after"]) == (429, "2")
    assert [len(double.asked) for double in found.doubles] == [1, 1]


def test_none_is_there(behind: Any) -> None:
    found = behind(more=("http://127.0.0.1:9",), patience=0.3)
    assert found.get("/health").status_code == 503
    assert found.ask().status_code == 503
    assert found.ask(stream=True).json()["error"]["message"].startswith("no replica answers")


def test_one_that_is_not_there_is_not_asked(behind: Any) -> None:
    found = behind(Double(), more=("http://127.0.0.1:9",))
    assert all(found.ask().status_code == 200 for _ in range(4))
    assert found.get("/health").status_code == 200
    assert found.counted("replicas_up") == 1


def test_who_asks_is_looked_at_here_and_passed_on(behind: Any) -> None:
    found = behind(Double())
    assert found.ask().status_code == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{found.running.url}/v1", api_key="x" * 20, max_retries=0).models.list()
    assert found.doubles[0].keys == {f"Bearer {KEY}"}
    body = found.ask().json()["body"]
    assert body == {"model": "lab", "messages": [{"role": "user", "content": "?"}]}  # as it came


def test_a_question_goes_where_its_context_is(behind: Any) -> None:
    found = behind(Double(contexts=("ctx_a",)), Double(contexts=("ctx_b", "ctx_long")))
    for _ in range(3):
        assert found.ask(kvweave={"context": "ctx_b"}).status_code == 200
        assert found.ask(stream=True, kvweave={"context": "ctx_a"}).status_code == 200
    assert [{body["kvweave"]["context"] for body in double.asked} for double in found.doubles] == [
        {"ctx_a"},
        {"ctx_b"},
    ]
    assert found.get("/v1/contexts/ctx_b").json()["id"] == "ctx_b"
    assert found.get("/v1/contexts/ctx_c").status_code == 404
    assert [c["id"] for c in found.get("/v1/contexts").json()["data"]] == ["ctx_a", "ctx_b", "ctx_long"]
    assert found.ask(kvweave={"context": "../../metrics"}).status_code == 200  # a name, never a path
    assert "../../metrics" not in found.gateway.holders._known


def test_a_new_context_is_remembered(behind: Any) -> None:
    found = behind(Double(), Double())
    found.lead_to(1)
    headers = {"Authorization": f"Bearer {KEY}"}
    told = httpx2.post(f"{found.running.url}/v1/contexts", json={"messages": []}, headers=headers)
    assert told.json() == {"id": "ctx_new"}
    assert found.gateway.holders._known["ctx_new"] is found.gateway.replicas.all[1]


def test_metrics_of_all_are_told_apart(behind: Any) -> None:
    found = behind(Double(), Double())
    told = metrics(found.running, KEY)
    assert told['kvweave_tokens_total{replica="0"}'] == told['kvweave_tokens_total{replica="1"}'] == 3


def test_more_requests_than_fit_are_told_to_come_back(behind: Any) -> None:
    found = behind(Double(), limits=Limits(rows=1, queue=0, choices=1))
    found.gateway.gate.enter()
    assert found.ask().status_code == 429
    found.gateway.gate.leave()
    assert found.ask().status_code == 200
    assert found.gateway.gate.inside == 0


def test_whoever_waits_for_a_replica_that_went_away_need_not() -> None:
    async def waited() -> None:
        replica, replicas = Replica("0", "http://127.0.0.1:9"), Replicas([])
        waiting = asyncio.create_task(replica.unless_lost(asyncio.sleep(60)))
        await asyncio.sleep(0)
        await replicas.lose(replica)
        await replicas.lose(replica)  # whoever notices next
        with pytest.raises(LostError):
            await waiting
        await replicas.client.aclose()

    asyncio.run(asyncio.wait_for(waited(), 5))


# -------------------------------------------------------------------- process groups

#: Starts a worker that ignores what it is asked, tells its id, and sleeps.
LEADER = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
print(worker.pid, flush=True)
time.sleep({seconds})
"""


def gone(process: int) -> bool:
    """It runs no more; one that nobody has waited for yet is a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("how", ["the command ends", "the pipe is closed", "the leader is killed"])
def test_nothing_of_a_process_group_is_left(how: str) -> None:
    seconds = 0.1 if how == "the command ends" else 600
    command = [sys.executable, guard.__file__, sys.executable, "-c", LEADER.format(seconds=seconds)]
    own = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert own.stdin is not None
    assert own.stdout is not None
    worker = int(own.stdout.readline())
    if how == "the pipe is closed":
        own.stdin.close()
    elif how == "the leader is killed":
        (leader,) = Path(f"/proc/{own.pid}/task/{own.pid}/children").read_text().split()
        os.kill(int(leader), signal.SIGKILL)
    own.wait(timeout=30)
    end = time.monotonic() + 5
    while not gone(worker):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_nothing_is_left_where_the_guard_itself_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "worker"
    script = LEADER.format(seconds=600).replace(
        "print(worker.pid, flush=True)", f"open({str(file)!r}, 'w').write(str(worker.pid))"
    )

    async def run() -> None:
        async with group([sys.executable, "-c", script]) as own:
            while not (file.exists() and file.read_text()):
                await asyncio.sleep(0.05)
            own.kill()
            await own.wait()

    asyncio.run(asyncio.wait_for(run(), 30))
    end = time.monotonic() + 5
    while not gone(int(file.read_text())):
        assert time.monotonic() < end
        time.sleep(0.02)
