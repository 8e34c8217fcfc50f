"""kvweave as Ray Serve deployments: replicas that scale with what is asked, one gateway before them.

    serve run kvweave.serve.ray:app model=smol data=/shared/contexts max_replicas=4
    kvweave convert MODEL /shared/decoder --decoder
    serve run kvweave.serve.ray:app model=MODEL data=/shared/contexts engine=vllm decoder=/shared/decoder handoff=/kv

Ray starts, watches and scales the replicas and chooses among them; a question goes to one that has its context. All
else is the gateway's: a replica that dies costs no request, and its streams go on elsewhere.
"""

import asyncio
import os
import secrets
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from kvweave.serve.calls import CallTransport, Pair, Part, respond
from kvweave.serve.fleet.processes import Fleet
from kvweave.serve.gateway.app import Gateway
from kvweave.serve.keys import Keys
from kvweave.serve.limits import DEFAULT_METHOD, Limits, Offers
from kvweave.serve.remote.engine import Remote
from kvweave.serve.remote.vllm import DECODER_KEY, command, words

_KEYS = "KVWEAVE_API_KEYS"
_REPLICA = "Replica"
_CONTEXTS = 1000  # that a replica says it has


class Settings(BaseModel):
    """What `serve run` may say.

    Attributes:
        model, dtype, device: as of `kvweave serve`.
        methods: with commas of their own, so divided by blanks.
        engine: "kvweave", or "vllm": each replica reads and cuts prompts, and a vLLM server of its own goes on,
            started beside it by the command `vllm` on the folder `decoder`; `handoff`: a folder of that machine.
        data: folder of all replicas, where contexts lie; on several machines a shared one.
        rows, queue: of each replica, as of `kvweave serve`.
        min_replicas, max_replicas: as many as Ray keeps; target_requests: that each of them answers at a time.
        cpus, gpus: of each replica.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = "lab"
    dtype: str = "auto"
    device: str = "auto"
    methods: str = DEFAULT_METHOD
    engine: Literal["kvweave", "vllm"] = "kvweave"
    decoder: Path | None = None
    handoff: Path | None = None
    vllm: str | None = None
    budget: float = Field(0.2, gt=0, le=1)
    data: Path
    rows: int = Field(32, ge=1)
    queue: int = Field(256, ge=0)
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_requests: float = Field(16, gt=0)
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)

    @model_validator(mode="after")
    def _go_together(self) -> "Settings":
        for name in ("decoder", "handoff", "vllm"):
            if self.engine == "kvweave" and getattr(self, name) is not None:
                raise ValueError(f"{name} is not allowed with engine=kvweave: allowed is engine=vllm")
            if self.engine == "vllm" and name != "vllm" and getattr(self, name) is None:
                raise ValueError(f"engine=vllm is not allowed without {name}: allowed is a folder")
        return self

    @property
    def offers(self) -> Offers:
        return Offers(self.methods.split(), self.budget)

    @property
    def limits(self) -> Limits:
        return Limits(rows=self.rows, queue=self.queue, choices=min(self.rows, Limits.choices))

    @property
    def keys(self) -> Keys:
        """From the environment: what `serve run` is told is seen by everybody on the machine."""
        return Keys([key for key in os.environ.get(_KEYS, "").split(",") if key])


class Replica:
    """One model, served; Ray starts as many as it takes."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Ray awaits it
        from kvweave import models
        from kvweave.serve.app import Server

        remote = await self._decoder(settings) if settings.engine == "vllm" else None
        self._server = Server(
            settings.model,
            *models.load(settings.model, settings.dtype, settings.device),
            limits=settings.limits,
            offers=settings.offers,
            keys=settings.keys,
            data=settings.data,
            shares_data=True,
            remote=remote,
        )
        self._server.engine.start()
        self._app = self._server.application()
        while not self._server.engine.alive:  # until vLLM answers
            await asyncio.sleep(0.5)

    async def _decoder(self, settings: Settings) -> Remote:
        """A vLLM server on this machine, kept alive as long as this replica; its guard sees when that has gone."""
        assert settings.decoder is not None
        assert settings.handoff is not None
        key = os.environ.setdefault(DECODER_KEY, secrets.token_hex(16))
        start = partial(command, words(settings.vllm), settings.decoder, settings.handoff)
        fleet = Fleet([start], "decoder")
        self._stack = AsyncExitStack()
        await self._stack.enter_async_context(fleet.alive())
        return Remote([decoder.url for decoder in fleet.all], settings.handoff, key)

    async def respond(self, verb: str, path: str, headers: list[Pair], body: bytes) -> AsyncGenerator[Part, None]:
        """What it answers."""
        if context := serve.get_multiplexed_model_id():
            await self.context(context)
        async for part in respond(self._app, verb, path, headers, body):
            yield part

    @serve.multiplexed(max_num_models_per_replica=_CONTEXTS)
    async def context(self, id: str) -> str:
        """Ray remembers who has been asked about a context; `Server` reads it where it is not read."""
        return id

    def check_health(self) -> None:
        """Ray starts another one where this raises."""
        if not self._server.engine.alive:
            raise RuntimeError("the engine has ended")


def app(settings: Settings) -> Any:
    """What `serve run` runs."""
    keys, limits = settings.keys, settings.limits

    def front() -> FastAPI:
        handle = serve.get_deployment_handle(_REPLICA, app_name=serve.get_replica_context().app_name)

        def call(verb: str, path: str, headers: list[Pair], body: bytes, context: str) -> Any:
            chosen = handle.options(stream=True, multiplexed_model_id=context)
            return _parts(chosen.respond.remote(verb, path, headers, body))

        transport = CallTransport(call, (RayError, RayServeException))
        return Gateway(["http://localhost"], limits=limits, keys=keys, transport=transport).application()

    scale = {
        "min_replicas": settings.min_replicas,
        "max_replicas": max(settings.min_replicas, settings.max_replicas),
        "target_ongoing_requests": settings.target_requests,
    }
    replicas = serve.deployment(
        Replica,
        name=_REPLICA,
        autoscaling_config=scale,
        max_ongoing_requests=settings.rows + settings.queue,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        health_check_period_s=2,
    )
    gateway = serve.deployment(
        serve.ingress(front)(), name="Gateway", max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0.1}
    )
    return gateway.bind(replicas.bind(settings))


async def _parts(answer: Any) -> AsyncGenerator[Part, None]:
    """An answer of a deployment, taken back where nobody reads on."""
    try:
        async for part in answer:
            yield part
    finally:
        answer.cancel()
