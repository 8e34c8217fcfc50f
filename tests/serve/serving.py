"""A server over the lab model, spoken to over a socket, and what it should answer."""

import base64
import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import torch
import uvicorn

import kvweave
from kvweave import lab, models
from kvweave.serve.app import Server
from kvweave.serve.limits import DEFAULT_METHOD

#: What a request may name here: rows of the pool, and each kind that decodes by itself.
METHODS = (
    "snapkv",
    "full",
    DEFAULT_METHOD,
    "flowmm",
    "flowmm:mass_bias=true",
    "weave",
    "adakv",
    "pyramidkv",
    "kvzip",
    "h2o:defer=3",
    "quantized:method=snapkv",
)
TASKS = ("text_needle", "image_needle", "lookup", "change")
#: Of a `kvweave serve` in a process of its own.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(kvweave.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


class Running:
    """A server on a port of this machine.

    Attributes:
        server: its insides; url: where it is.
    """

    def __init__(self, server: Any) -> None:
        self.server = server
        config = uvicorn.Config(server.application(), host="127.0.0.1", port=0, log_level="warning")
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._uvicorn.run, daemon=True)
        self._thread.start()
        while not self._uvicorn.started:
            assert self._thread.is_alive()
        port = self._uvicorn.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def stop(self) -> None:
        self._uvicorn.should_exit = True
        self._thread.join()


def start(**options: Any) -> Running:
    """Start a server with a model of its own: kvweave is attached to it while it runs."""
    return Running(Server("lab", *models.load("lab"), **options))


@contextmanager
def command(*options: str, environment: Mapping[str, str] = ENVIRONMENT) -> Iterator[tuple[str, int]]:
    """`kvweave serve`; where it is, and its process."""
    words = [sys.executable, "-m", "kvweave", "serve", "--port", "0", *options]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    try:
        said = ""
        while not (found := re.search(r"running on (http://127\.0\.0\.1:\d+)", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        threading.Thread(target=process.stderr.read, daemon=True).start()  # or its log would fill the pipe
        yield found[1], process.pid
    finally:
        process.terminate()
        process.wait(timeout=120)


def children(process: int) -> list[int]:
    """Processes that a process has started."""
    return [int(one) for one in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def samples(count: int, images: int = 4, task: str | None = None, seed: int = 0) -> list[Any]:
    """Questions, each with an album of its own."""
    tasks = TASKS if task is None else (task,)
    each = -(-count // len(tasks))
    found = [sample for name in tasks for sample in lab.samples(name, each, images, seed)]
    return found[:count]


def data_url(image: Any, kind: str = "PNG") -> str:
    raw = io.BytesIO()
    image.save(raw, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(raw.getvalue()).decode()}"


def openai_messages(sample: Any) -> list[dict[str, Any]]:
    """A question as OpenAI's clients write it."""
    return [
        {
            "role": turn["role"],
            "content": [
                {"type": "image_url", "image_url": {"url": data_url(part["image"])}}
                if part["type"] == "image"
                else {"type": "text", "text": part["text"]}
                for part in turn["content"]
            ],
        }
        for turn in sample.messages()
    ]


def client(url: str, timeout: float = 300) -> openai.OpenAI:
    """OpenAI's own, which tries nothing twice."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=timeout)


def ask(url: str, sample: Any, tokens: int, *, stream: bool, seen: threading.Event | None = None, **own: Any) -> str:
    """What a server says to a sample, so many tokens whatever they are.

    Args:
        seen: set once some of a stream has come.
        own: what else it is asked of kvweave.
    """
    asked: dict[str, Any] = {
        "model": "lab",
        "messages": openai_messages(sample),
        "temperature": 0,
        "max_tokens": tokens,
        "extra_body": {"kvweave": {"ignore_eos": True, **own}},
    }
    if not stream:
        return client(url).chat.completions.create(**asked).choices[0].message.content or ""
    text = ""
    for number, chunk in enumerate(client(url).chat.completions.create(**asked, stream=True)):
        text += chunk.choices[0].delta.content or ""
        if seen is not None and number == 5:
            seen.set()
    return text


def read_context(url: str, sample: Any, **own: Any) -> str:
    """The id of a context of all but the sample's question."""
    (turn,) = openai_messages(sample)
    body = {"model": "lab", "messages": [{**turn, "content": turn["content"][:-1]}], "kvweave": own}
    return httpx2.post(f"{url}/v1/contexts", json=body, timeout=120).raise_for_status().json()["id"]


def ask_context(url: str, id: str, question: str, tokens: int = 8) -> Any:
    """The answer to a question behind a context."""
    return client(url).chat.completions.create(
        model="lab",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=tokens,
        extra_body={"kvweave": {"context": id}},
    )


def generated(
    lab_model: tuple[Any, Any], sample: Any, method: str, tokens: int, *, endless: bool = False
) -> tuple[str, int]:
    """What `kvweave.compress` and `generate` answer to it: text, and tokens with the one that ends it.

    Args:
        endless: no token ends it.
    """
    model, processor = lab_model
    inputs = models.encode(processor, sample.messages())
    with torch.inference_mode(), kvweave.compress(model, kvweave.parse_method(method)):
        ends = {"eos_token_id": None} if endless else {}
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **ends)
    ids = out[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(ids, skip_special_tokens=True), len(ids)


def metrics(running: Running, key: str = "-") -> dict[str, float]:
    """What a server counts, as it stands."""
    told = httpx2.get(f"{running.url}/metrics", headers={"Authorization": f"Bearer {key}"})
    lines = told.raise_for_status().text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def settled(running: Running, key: str = "-", **expected: float) -> bool:
    """Metrics come to these values."""
    until(lambda: metrics(running, key).items() >= expected.items())
    return True
