"""A server over the lab model, spoken to over a socket, and what it should answer."""

import base64
import io
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2
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
