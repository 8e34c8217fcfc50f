"""HTTP as calls: a gateway whose replicas are reached by a function, as Ray's are, without Ray."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from serving import Running, generated, openai_messages, samples, settled, until

from kvweave import models
from kvweave.serve.app import Server
from kvweave.serve.calls import CallTransport, Pair, Part, respond
from kvweave.serve.gateway.app import Gateway
from kvweave.serve.keys import Keys
from kvweave.serve.limits import Limits, Offers


class Away(Exception):  # noqa: N818  as Ray says that an actor has died
    pass


class Servers:
    """Two servers that are called, one of which goes away when it is told to.

    Attributes:
        asked: contexts that calls were about; away: after how many parts the next call breaks; None: it does not.
    """

    def __init__(self, data: Path) -> None:
        limits = Limits(rows=4, new_tokens=64, choices=4)
        self.all = [
            Server("lab", *models.load("lab"), limits=limits, offers=Offers(["snapkv"]), data=data, shares_data=True)
            for _ in range(2)
        ]
        self.apps = [server.application() for server in self.all]
        for server in self.all:
            server.engine.start()
        self.contexts: list[str] = []
        self.away: int | None = None
        self._turn = 0

    async def call(
        self, verb: str, path: str, headers: list[Pair], body: bytes, context: str
    ) -> AsyncGenerator[Part, None]:
        self.contexts.append(context)
        self._turn += 1
        away, self.away = (self.away, None) if "chat" in path else (None, self.away)
        count = 0
        parts = respond(self.apps[self._turn % 2], verb, path, headers, body)
        try:
            async for part in parts:
                if count == away:
                    raise Away
                count += 1
                yield part
        finally:
            await parts.aclose()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    found = Servers(tmp_path_factory.mktemp("contexts"))
    yield found
    for server in found.all:
        server.engine.stop()


@pytest.fixture(scope="module")
def called(servers: Servers) -> Iterator[Running]:
    transport = CallTransport(servers.call, (Away,))
    limits = Limits(rows=4, choices=4)
    gateway = Gateway(["http://localhost"], limits=limits, keys=Keys(), transport=transport)
    found = Running(gateway)
    until(lambda: bool(gateway.replicas.up))
    yield found
    found.stop()


def ask(called: Running, sample: Any, **more: Any) -> Any:
    client = openai.OpenAI(base_url=f"{called.url}/v1", api_key="-", max_retries=0, timeout=60)
    own = {"ignore_eos": True, **more.pop("kvweave", {})}
    asked = {"model": "lab", "messages": openai_messages(sample), "temperature": 0, "max_tokens": 16} | more
    return client.chat.completions.create(**asked, extra_body={"kvweave": own})


@pytest.mark.parametrize("away", [None, 0, 1, 6])
def test_answers_are_those_of_compress_alone_though_one_goes_away(
    called: Running, servers: Servers, lab_model: tuple[Any, Any], away: int | None
) -> None:
    (sample,) = samples(1, images=2)
    right, _ = generated(lab_model, sample, "snapkv:budget=0.2", 16, endless=True)
    servers.away = away
    streamed = ask(called, sample, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == right
    servers.away = away if away in (None, 0, 1) else 1
    assert ask(called, sample).choices[0].message.content == right


def test_a_client_that_leaves_is_told_to_the_server(called: Running, servers: Servers) -> None:
    (sample,) = samples(1, images=2)
    streamed = ask(called, sample, stream=True, max_tokens=64)
    next(iter(streamed))
    streamed.close()
    until(lambda: all(not server.engine._together for server in servers.all))
    assert settled(called, kvweave_gateway_requests_open=0)
    assert all(server.gate.inside == 0 for server in servers.all)


def test_any_server_answers_about_a_context_that_one_has_read(called: Running, servers: Servers) -> None:
    (sample,) = samples(1, images=2, task="image_needle")
    (turn,) = openai_messages(sample)
    body = {"model": "lab", "messages": [{**turn, "content": turn["content"][:-1]}], "kvweave": {"budget": 0.5}}
    id = httpx2.post(f"{called.url}/v1/contexts", json=body, timeout=60).raise_for_status().json()["id"]
    servers.contexts.clear()
    question = {"messages": [{"role": "user", "content": "what digit is hidden in image #1 ?"}]}
    more = {"max_tokens": 6, "kvweave": {"context": id}}
    answers = [ask(called, sample, **question, **more).choices[0].message.content for _ in range(3)]
    assert len(set(answers)) == 1
    assert all(id in server.contexts._readings for server in servers.all)
    assert servers.contexts.count(id) >= 3  # whoever chooses is told what each is about
    for _ in range(2):
        listed = httpx2.get(f"{called.url}/v1/contexts").json()["data"]
        assert [context["id"] for context in listed] == [id]
    assert httpx2.delete(f"{called.url}/v1/contexts/{id}").status_code == 200
    for _ in range(2):
        assert httpx2.get(f"{called.url}/v1/contexts/{id}").status_code == 404


def test_what_an_application_raises_is_raised() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise OSError("broken")

    async def run() -> list[Part]:
        return [part async for part in respond(app, "GET", "/", [], b"")]

    with pytest.raises(OSError, match="broken"):
        asyncio.run(run())
