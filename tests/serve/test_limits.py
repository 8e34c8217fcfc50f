"""What a server refuses, and how: point by point, over a socket."""

import base64
import http.client
import http.server
import io
import json
import logging
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest
from PIL import Image
from serving import Running, data_url, metrics, openai_messages, samples, settled, start, until

from kvweave.serve.errors import Refusal
from kvweave.serve.fetch import Fetcher
from kvweave.serve.keys import Keys
from kvweave.serve.limits import Limits, Offers

TEXT = [{"role": "user", "content": "question: where is the cat ?"}]


def post(running: Running, body: Any, path: str = "/v1/chat/completions", **headers: str) -> httpx2.Response:
    given = {"model": "lab", "messages": TEXT, "max_tokens": 2} | body if isinstance(body, dict) else body
    own = {"Content-Type": "application/json", **headers}
    return httpx2.post(f"{running.url}{path}", content=json.dumps(given), headers=own, timeout=30)


def refused(response: httpx2.Response, status: int, field: str | None, *words: str) -> None:
    """It is an error in OpenAI's form that names the field."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == field
    for word in words:
        assert word in error["message"]


def image_message(url: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


URL = "messages.0.content.0.image_url.url"


# -------------------------------------------------------------------- fields


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 65}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": None, "max_completion_tokens": 65}, "max_completion_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [1]}, "stop.0"),
        ({"stop": {"a": 1}}, "stop"),
        ({"stop": "\ud800"}, "stop"),
        ({"n": 10**400}, "n"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"more": 1}}, "stream_options.more"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"best_of": 3}, "best_of"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}]},
            "messages.0.content.0.text",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, URL),
        ({"messages": [{"role": "user", "content": "<|image_pad|>"}]}, "messages.0.content"),
        ({"kvweave": {"method": "/etc/passwd"}}, "kvweave.method"),
        ({"kvweave": {"method": "snapkv:allocation=profile,profile=/etc/passwd"}}, "kvweave.method"),
        ({"kvweave": {"budget": 0.001}}, "kvweave.budget"),
        ({"kvweave": {"budget": 0}}, "kvweave.budget"),
        ({"kvweave": {"budget": 1.5}}, "kvweave.budget"),
        ({"kvweave": {"budget": "1GiB"}}, "kvweave.budget"),
        ({"kvweave": {"budget": 10**30}}, "kvweave.budget"),
        ({"kvweave": {"speed": 3}}, "kvweave.speed"),
        ({"kvweave": {"known_token_ids": [[-1]]}}, "kvweave.known_token_ids.0.0"),
        ({"kvweave": {"known_token_ids": [[10**9]]}}, "kvweave.known_token_ids"),
        ({"kvweave": {"known_token_ids": [[], [5]]}}, "kvweave.known_token_ids"),
        ({"kv_transfer_params": {"context": "x"}}, "kv_transfer_params"),
        ({"cache_salt": "x"}, "cache_salt"),
        ({"kvweave": {"cache_salt": "x"}}, "kvweave.cache_salt"),
    ],
)
def test_a_field_that_is_not_allowed_is_named(running: Running, body: dict[str, Any], field: str) -> None:
    refused(post(running, body), 400, field)


@pytest.mark.parametrize("odd", ["context", "trace", "ignore_eos", "return_token_ids", "known_token_ids", "speed"])
def test_a_context_takes_no_options_of_replies(running: Running, odd: str) -> None:
    body = {"model": "lab", "messages": TEXT, "kvweave": {odd: True}}
    refused(httpx2.post(f"{running.url}/v1/contexts", json=body), 400, f"kvweave.{odd}", "is not known here")


@pytest.mark.parametrize("name", ["temperature", "top_p"])
@pytest.mark.parametrize("least", [5e-324, 1e-300, 1e-40])
def test_the_least_numbers_are_greedy(running: Running, name: str, least: float) -> None:
    greedy = post(running, {"temperature": 0, "max_tokens": 6}).json()
    told = post(running, {name: least, "max_tokens": 6})
    assert told.json()["choices"] == greedy["choices"]


def test_the_client_raises_what_openai_would(running: Running) -> None:
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="-", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="temperature") as told:
        client.chat.completions.create(model="lab", messages=TEXT, temperature=3)
    assert told.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="allowed is lab"):
        client.chat.completions.create(model="gpt-4", messages=TEXT)


def test_null_is_not_given(running: Running) -> None:
    assert post(running, {"temperature": None, "stop": None, "tools": None, "seed": None}).status_code == 200


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"a": NaN}', b'"' + b"x" * 10, b"[" * 100000, b"\xff"])
def test_a_body_that_is_no_json_object(running: Running, body: bytes) -> None:
    told = httpx2.post(
        f"{running.url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
    )
    refused(told, 400, None)


def test_paths_that_there_are_none_of(running: Running) -> None:
    refused(httpx2.get(f"{running.url}/v1/embeddings"), 404, None)
    refused(httpx2.get(f"{running.url}/v1/contexts/"), 404, None)
    refused(httpx2.get(f"{running.url}/v1/chat/completions"), 405, None)


# -------------------------------------------------------------------- size


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    """A server with little room, keys, and the pictures of one host of this machine."""
    limits = Limits(
        body_bytes=200_000,
        body_seconds=0.5,
        images=2,
        image_bytes=20_000,
        image_pixels=40_000,
        pixels=50_000,
        prompt_tokens=200,
        new_tokens=400,
        choices=2,
        rows=2,
        queue=1,
        memory=1 << 20,
    )
    found = start(limits=limits, offers=Offers(["snapkv", "full"], 0.5, 0.1, 0.5), keys=Keys([KEY, "b" * 32]))
    yield found
    found.stop()


KEY = "a-key-of-this-test"
BEARER = {"Authorization": f"Bearer {KEY}"}


def raw(running: Running, head: str) -> http.client.HTTPResponse:
    """What is answered to a request of which only the head is sent."""
    where = urlsplit(running.url)
    sock = socket.create_connection((where.hostname or "", where.port or 0), timeout=10)
    sock.sendall(head.encode())
    told = http.client.HTTPResponse(sock)
    told.begin()
    return told


HEAD = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n" + (
    "Content-Type: application/json\r\n"
)


def test_a_body_too_large_is_refused_before_it_is_read(small: Running) -> None:
    assert raw(small, f"{HEAD}Content-Length: 200001\r\n\r\n").status == 413


def test_a_body_of_unknown_length_is_read_no_further_than_allowed(small: Running) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 10_000

    headers = {**BEARER, "Content-Type": "application/json"}
    told = httpx2.post(f"{small.url}/v1/chat/completions", content=parts(), headers=headers)
    refused(told, 413, None, "200,000 bytes")


def test_a_body_that_does_not_come_is_not_waited_for(small: Running) -> None:
    assert raw(small, f"{HEAD}Content-Length: 1000\r\n\r\n{{").status == 408
    assert settled(small, KEY, kvweave_kv_bytes=0, kvweave_requests_open=0)


def test_a_prompt_too_long(small: Running) -> None:
    told = post(small, {"messages": [{"role": "user", "content": "cat " * 201}]}, **BEARER)
    refused(told, 400, "messages", "200")
    assert told.json()["error"]["code"] == "context_length_exceeded"


def test_what_would_never_fit_is_refused_at_once(small: Running) -> None:
    long = {"messages": [{"role": "user", "content": "cat " * 150}], "kvweave": {"method": "full"}}
    refused(post(small, {**long, "max_tokens": 400, "n": 2}, **BEARER), 400, "messages", "1,048,576")
    assert post(small, {**long, "max_tokens": 2}, **BEARER).status_code == 200


def test_budgets_are_the_operators(small: Running) -> None:
    text = {"messages": [{"role": "user", "content": "cat " * 50}]}
    for budget in (0.09, 0.6, 45, 2):
        refused(post(small, {**text, "kvweave": {"budget": budget}}, **BEARER), 400, "kvweave.budget", "0.1 to 0.5")
    for budget in (0.1, 0.5, 20):
        assert post(small, {**text, "kvweave": {"budget": budget}}, **BEARER).status_code == 200


# -------------------------------------------------------------------- images


def png(wide: int, high: int, pixels: bytes = b"") -> bytes:
    """A PNG that says it has this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", wide, high, 8, 2, 0, 0, 0)
    data = zlib.compress(pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def url_of(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (url_of(png(60_000, 60_000)), "pixels"),
        (url_of(png(201, 200)), "40,000"),
        (url_of(b"\0" * 20_003), "20,000 bytes"),
        (url_of(b"GIF89a" + b"\0" * 50), "PNG"),
        (url_of(b"<svg/>"), "PNG"),
        (url_of(png(10, 10)), "decoded"),
        ("data:image/gif;base64,R0lGOD", "PNG"),
        ("data:image/png;base64,***", "base64"),
        ("data:text/html;base64,AAAA", "PNG"),
        ("http://127.0.0.1/cat.png", "data: URL"),
        ("https://example.com/cat.png", "data: URL"),
        ("file:///etc/passwd", "data: URL"),
        ("/etc/passwd", "data: URL"),
        ("", "data: URL"),
    ],
)
def test_an_image_that_is_not_allowed(small: Running, url: str, words: str) -> None:
    started = time.monotonic()
    refused(post(small, image_message(url), **BEARER), 400, URL, words)
    assert time.monotonic() - started < 10


def test_images_together(small: Running) -> None:
    one = {"type": "image_url", "image_url": {"url": data_url(Image.new("RGB", (190, 190)))}}
    many = {"messages": [{"role": "user", "content": [one, one]}]}
    refused(post(small, many, **BEARER), 400, "messages.0.content.1.image_url.url", "50,000")
    more = {"messages": [{"role": "user", "content": [one, one, one]}]}
    refused(post(small, more, **BEARER), 400, "messages", "3 images")
    assert post(small, image_message(one["image_url"]["url"]), **BEARER).status_code == 200


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_formats(small: Running, kind: str) -> None:
    assert post(small, image_message(data_url(Image.new("RGB", (80, 80)), kind)), **BEARER).status_code == 200


# -------------------------------------------------------------------- addresses


class Pictures(http.server.BaseHTTPRequestHandler):
    """A host of pictures, one that redirects, one without end."""

    def do_GET(self) -> None:
        picture = io.BytesIO()
        Image.new("RGB", (80, 80)).save(picture, "PNG")
        body = picture.getvalue() if self.path == "/cat.png?size=80" else b"\0" * 2_000_000
        self.send_response(302 if self.path == "/away" else 200)
        if self.path == "/away":
            self.send_header("Location", "http://127.0.0.1:1/")
        self.end_headers()
        if self.path != "/away":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def pictures() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


def fetched(fetcher: Fetcher, url: str) -> str:
    with pytest.raises(Refusal) as told:
        fetcher.get(url, 100_000, "url")
    assert told.value.status == 400
    return told.value.message


def test_only_listed_hosts_are_fetched_from(pictures: int) -> None:
    fetcher = Fetcher([f"pictures.test:{pictures}=127.0.0.1"])
    raw = fetcher.get(f"http://pictures.test:{pictures}/cat.png?size=80", 100_000, "url")
    assert Image.open(io.BytesIO(raw)).size == (80, 80)
    for url in (
        f"http://127.0.0.1:{pictures}/cat.png",
        f"http://pictures.test.evil.test:{pictures}/",
        "http://pictures.test/cat.png",
        f"http://pictures.test:{pictures + 1}/",
        f"http://someone@pictures.test:{pictures}/",
        f"http://someone:word@pictures.test:{pictures}/",
    ):
        assert "allowed is a host of pictures.test" in fetched(fetcher, url)
    assert "address" in fetched(fetcher, "http://[::1/")
    assert "address" in fetched(fetcher, f"http://pictures.test:{pictures}/\r\nHost: other")


def test_redirects_and_floods_end(pictures: int) -> None:
    fetcher = Fetcher([f"pictures.test:{pictures}=127.0.0.1"])
    assert "status 302" in fetched(fetcher, f"http://pictures.test:{pictures}/away")
    assert "too large" in fetched(fetcher, f"http://pictures.test:{pictures}/endless")


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.8", "169.254.169.254", "192.168.1.1", "::1", "fd00::1", "::ffff:127.0.0.1", "224.0.0.1"],
)
def test_a_listed_host_may_not_lead_inside(address: str) -> None:
    """The address that is looked at is the one that is connected to: nothing is resolved twice."""
    asked = []

    def resolver(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["93.184.215.14", address]

    assert "not public" in fetched(Fetcher(["pictures.test"], resolver), "https://pictures.test/cat.png")
    assert asked == ["pictures.test"]


@pytest.mark.parametrize("host", ["", "*", "a/b", "a b", "a:b", "a=b", "http://a", "*.a", "a="])
def test_hosts_that_cannot_be_listed(host: str) -> None:
    with pytest.raises(ValueError, match="allowed is HOST"):
        Fetcher([host])


# -------------------------------------------------------------------- keys


def test_without_a_key_nothing_is_told(small: Running) -> None:
    for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}):
        for path in ("/v1/models", "/metrics", "/v1/models/lab"):
            told = httpx2.get(small.url + path, headers=headers)
            refused(told, 401, None)
            assert told.headers["www-authenticate"] == "Bearer"
        refused(post(small, {}, **headers), 401, None)
    assert httpx2.get(f"{small.url}/health").status_code == 200
    assert post(small, {}, **BEARER).status_code == 200


def test_a_key_is_looked_at_before_the_body(small: Running) -> None:
    assert raw(small, HEAD.replace(KEY, "x" * 18) + "Content-Length: 1000\r\n\r\n").status == 401


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys are compared, by `hmac.compare_digest`, whichever fits."""
    from starlette.requests import Request

    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    keys = Keys(["a" * 16, "b" * 16, "c" * 16])

    def owner(key: str) -> str:
        headers = [(b"authorization", f"Bearer {key}".encode())]
        return keys.owner(Request({"type": "http", "headers": headers}))

    assert len({owner(letter * 16) for letter in "abc"}) == 3
    assert len(compared) == 9
    assert len({len(side) for pair in compared for side in pair}) == 1  # digests, not what was typed
    with pytest.raises(Refusal):
        owner("a" * 15)
    assert len(compared) == 12


@pytest.mark.parametrize("key", ["", "short", "with a space inside", "ümlaut-is-not-allowed"])
def test_keys_that_are_none(key: str) -> None:
    with pytest.raises(ValueError, match="allowed are 16") as told:
        Keys([key])
    assert not key or key not in str(told.value)


def test_another_sites_page_cannot_ask(running: Running) -> None:
    """Without keys, by a name made to lead here, or by a form: a browser sends those unasked."""
    odd = (
        "evil.test",
        "a_b.test",
        "localhost.test",
        "127.0.0.1@evil.test",
        "evil.test#localhost",
        "localhost x",
        "[::1",
        "",
    )
    for host in odd:
        refused(httpx2.get(f"{running.url}/v1/models", headers={"Host": host}), 403, None)
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:80"):
        assert httpx2.get(f"{running.url}/v1/models", headers={"Host": host}).status_code == 200
    told = httpx2.post(
        f"{running.url}/v1/chat/completions", content=json.dumps({}), headers={"Content-Type": "text/plain"}
    )
    refused(told, 415, None)
    assert "access-control-allow-origin" not in httpx2.get(f"{running.url}/v1/models").headers


# -------------------------------------------------------------------- the queue, and who leaves


def hold(running: Running) -> Callable[[], None]:
    """Keep the engine from reading prompts until what is returned is called."""
    engine, go = running.server.engine, threading.Event()
    begin = engine._begin

    def held(job: Any) -> None:
        go.wait(30)
        begin(job)

    engine._begin = held  # type: ignore[method-assign]

    def release() -> None:
        engine._begin = begin  # type: ignore[method-assign]
        go.set()

    return release


def test_a_full_queue_says_when_to_come_back(small: Running) -> None:
    release = hold(small)
    answers: list[httpx2.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(post(small, {}, **BEARER))) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: small.server.gate.inside == 3)
    told = post(small, {}, **BEARER)
    refused(told, 429, None)
    assert 1 <= int(told.headers["retry-after"]) <= 3
    release()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 3
    assert post(small, {}, **BEARER).status_code == 200


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("method", ["snapkv", "weave"])
def test_a_client_that_leaves_frees_its_memory(running: Running, streamed: bool, method: str) -> None:
    """It leaves while its reply is decoded, which would take long."""
    running_engine, ends = running.server.engine, running.server._ends
    step = running_engine._emit
    running_engine._emit = lambda job, piece: time.sleep(0.05) or step(job, piece)  # type: ignore[method-assign]
    running.server._ends = []
    try:
        where = urlsplit(running.url)
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=10)
        (sample,) = samples(1)
        body = {
            "model": "lab",
            "messages": openai_messages(sample),
            "stream": streamed,
            "n": 4,
            "max_tokens": 64,
            "temperature": 2,
            "kvweave": {"method": method},
        }
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        until(lambda: metrics(running)["kvweave_kv_bytes"] > 0)
        before = metrics(running)["kvweave_tokens_total"]
        connection.close()
        assert settled(running, kvweave_kv_bytes=0, kvweave_requests_open=0)
        assert metrics(running)["kvweave_tokens_total"] - before < 4 * 60
    finally:
        running.server._ends = ends
        running_engine._emit = step  # type: ignore[method-assign]


def test_a_client_that_leaves_the_queue(small: Running) -> None:
    release = hold(small)
    where = urlsplit(small.url)
    connections = []
    for _ in range(2):
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=10)
        body = json.dumps({"model": "lab", "messages": TEXT, "max_tokens": 2})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json", **BEARER})
        connections.append(connection)
    until(lambda: small.server.gate.inside == 2)
    for connection in connections:
        connection.close()
    until(lambda: not small.server.gate.inside)
    release()
    assert settled(small, KEY, kvweave_kv_bytes=0, kvweave_requests_open=0)


# -------------------------------------------------------------------- what is written down, and faults


def test_nothing_of_content_is_logged(running: Running, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "kangaroo-secret"
    engine = running.server.engine
    read = engine.model.generate

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"a fault that quotes {secret}")

    post(running, {"messages": [{"role": "user", "content": secret}]})
    post(running, {"messages": [{"role": "user", "content": secret}], "temperature": 9, secret: secret})
    engine.model.generate = failing
    try:
        told = post(running, {"messages": [{"role": "user", "content": secret}]})
    finally:
        engine.model.generate = read
    refused(told, 500, None)
    assert secret not in told.text
    assert "RuntimeError at test_limits.py" in caplog.text
    captured = capfd.readouterr()
    for text in (caplog.text, captured.out, captured.err, httpx2.get(f"{running.url}/metrics").text):
        assert secret not in text
    assert post(running, {}).status_code == 200  # it goes on


def test_a_fault_while_rows_decode_fails_them_and_no_more(running: Running) -> None:
    engine = running.server.engine
    decode = engine._pool.decode

    def failing(*args: Any) -> Any:
        raise RuntimeError("a fault")

    engine._pool.decode = failing  # type: ignore[method-assign]
    try:
        refused(post(running, {}), 500, None, "RuntimeError")
        streamed = post(running, {"stream": True})
        events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
        assert streamed.status_code == 200
        assert events[-1]["error"]["type"] == "server_error"
        assert "[DONE]" not in streamed.text
    finally:
        engine._pool.decode = decode  # type: ignore[method-assign]
    assert post(running, {}).status_code == 200
    assert settled(running, kvweave_kv_bytes=0, kvweave_rows_together=0)


def test_limits_that_are_none() -> None:
    with pytest.raises(ValueError, match="rows=0"):
        Limits(rows=0)
    with pytest.raises(ValueError, match="choices=9"):
        Limits(rows=4, choices=9)
    with pytest.raises(ValueError, match="budgets"):
        Offers(least=0.5, most=0.2)
    with pytest.raises(ValueError, match="allowed is one of"):
        Offers(["nothing"])
