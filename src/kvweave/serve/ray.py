"""kvweave as Ray Serve deployments: replicas that scale with what is asked, one gateway before them.

    serve run kvweave.serve.ray:app model=smol data=/shared/contexts max_replicas=4

Ray starts, watches and scales the replicas and chooses among them; a question goes to one that has its context. All
else is the gateway's: a replica that dies costs no request, and its streams go on elsewhere.
"""

import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from kvweave.serve.calls import CallTransport, Pair, Part, respond
from kvweave.serve.gateway.app import Gateway
from kvweave.serve.keys import Keys
from kvweave.serve.limits import DEFAULT_METHOD, Limits, Offers

_KEYS = "KVWEAVE_API_KEYS"
_REPLICA = "Replica"
_CONTEXTS = 1000  # that a replica says it has


class Settings(BaseModel):
    """What `serve run` may say.

    Attributes:
        model, dtype, device: as of `kvweave serve`; methods: with commas of their own, so divided by blanks.
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
    budget: float = Field(0.2, gt=0, le=1)
    data: Path
    rows: int = Field(32, ge=1)
    queue: int = Field(256, ge=0)
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_requests: float = Field(16, gt=0)
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)

    @property
    def limits(self) -> Limits:
        return Limits(rows=self.rows, queue=self.queue, choices=min(self.rows, Limits.choices))

    @property
    def keys(self) -> Keys:
        """From the environment: what `serve run` is told is seen by everybody on the machine."""
        return Keys([key for key in os.environ.get(_KEYS, "").split(",") if key])


class Replica:
    """One model, served; Ray starts as many as it takes."""

    def __init__(self, settings: Settings) -> None:
        from kvweave import models
        from kvweave.serve.app import Server

        self._server = Server(
            settings.model,
            *models.load(settings.model, settings.dtype, settings.device),
            limits=settings.limits,
            offers=Offers(settings.methods.split(), settings.budget),
            keys=settings.keys,
            data=settings.data,
            shares_data=True,
        )
        self._server.engine.start()
        self._app = self._server.application()

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
