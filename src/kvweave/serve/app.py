"""The endpoints, put together."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.requests import Request
from starlette.responses import Response

from kvweave.ops.brief import brief
from kvweave.report.grids import Grid
from kvweave.seam import names
from kvweave.seam.probes import read_probes
from kvweave.serve.body import read_json, unless_gone
from kvweave.serve.chat import Answer, Inbox
from kvweave.serve.contexts import Context, Contexts
from kvweave.serve.endpoints import Endpoint, application
from kvweave.serve.engine.job import Begun, ContextSource, Job, PromptSource, QuestionSource, Source
from kvweave.serve.engine.loop import Engine
from kvweave.serve.engine.queue import Queue
from kvweave.serve.engine.reply import Reply
from kvweave.serve.engine.sampling import Sampler
from kvweave.serve.errors import Refusal
from kvweave.serve.events import EventStream
from kvweave.serve.fetch import Fetcher
from kvweave.serve.gate import Gate
from kvweave.serve.images import Album
from kvweave.serve.keys import Keys
from kvweave.serve.limits import Limits, Offers
from kvweave.serve.metrics import Metrics
from kvweave.serve.page import page
from kvweave.serve.prompts import Prompts
from kvweave.serve.remote.engine import Remote, RemoteEngine
from kvweave.serve.schema import ChatRequest, ContextRequest, parsed


@dataclass(frozen=True)
class Asked:
    """A chat request, ready for the engine."""

    source: Source
    method: str
    most: int
    words: list[str] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    context: int = 0


class Server:
    """One model, served.

    Args:
        name: by which requests call the model.
        model, processor: as `kvweave.models.load` returns them.
        limits, offers: what requests may ask for.
        keys: who may ask.
        image_hosts: where images may be fetched from; none: nowhere.
        data: folder where contexts survive a restart; None: nowhere.
        context_probes: what the model is asked about a context before it is cut, as `probes` of `kvweave.compress`.
        shares_data: other servers of the model keep contexts in the same folder.
        remote: to whom replies are handed over; None: they are decoded here.
    Raises:
        ValueError: probes that the chat template has no words for, or methods that decoders do not go on from.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        processor: Any,
        *,
        limits: Limits | None = None,
        offers: Offers | None = None,
        keys: Keys | None = None,
        image_hosts: Sequence[str] = (),
        data: Path | None = None,
        context_probes: str | None = None,
        remote: Remote | None = None,
        shares_data: bool = False,
    ) -> None:
        self.name, self.limits = name, limits or Limits()
        self.offers, self.keys = offers or Offers(), keys or Keys()
        self.metrics = Metrics()
        self.prompts = Prompts(model, processor, self.limits.prompt_tokens)
        self.fetcher = Fetcher(image_hosts) if image_hosts else None
        self.gate = Gate(self.limits.rows + self.limits.queue)
        self.metrics.open.set_function(lambda: self.gate.inside)
        if context_probes is not None:
            read_probes(context_probes, processor, 1)  # so that it is refused now, and not by each context
        self.context_probes = context_probes
        self.contexts = Contexts(self.limits, data, model, shared=shares_data, counted=self._count_contexts)
        self._ends = names.listed(getattr(model.generation_config, "eos_token_id", None))
        self._desk = ThreadPoolExecutor(1, "kvweave-prompts")
        tokenizer, room = self.prompts.tokenizer, {"rows": self.limits.rows, "memory": self.limits.memory}
        self.engine: Queue
        if remote is None:
            self.engine = Engine(model, tokenizer, **room, metrics=self.metrics)
        else:
            self.engine = RemoteEngine(model, tokenizer, self.offers.methods, remote, **room, metrics=self.metrics)

    def _count_contexts(self, number: int, kept: int) -> None:
        self.metrics.contexts.set(number)
        self.metrics.context_bytes.set(kept)

    # ---------------------------------------------------------------- chat

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        owner = self.keys.owner(request)
        self.gate.enter()
        answer: Answer | None = None
        streamed: EventStream | None = None
        try:
            asked = parsed(ChatRequest, await read_json(request, self.limits))
            self._check(asked)
            ready = await self._beside(lambda: self._prepare(asked, owner))
            answer = self._answer(asked, ready)
            self.engine.submit(answer.job)
            await unless_gone(request, answer.begin())
            if asked.stream:
                usage = asked.stream_options is not None and asked.stream_options.include_usage
                streamed = EventStream(answer.chunks(usage), partial(self._leave, answer.job))
                return streamed
            return JSONResponse(await unless_gone(request, answer.body()))
        finally:
            if streamed is None:
                self._leave(None if answer is None else answer.job)

    def _leave(self, job: Job | None) -> None:
        """A request is over, and its job with it."""
        self.gate.leave()
        if job is not None:
            self.engine.leave(job)

    def _check(self, asked: ChatRequest) -> None:
        """Refuse what no model is needed to refuse."""
        self.check_model(asked.model)
        if asked.n > self.limits.choices:
            raise Refusal(400, f"n={brief(asked.n)} is not allowed: allowed is at most {self.limits.choices}", "n")
        if asked.most is not None and asked.most > self.limits.new_tokens:
            name = "max_completion_tokens" if asked.max_tokens is None else "max_tokens"
            raise Refusal(
                400, f"{name}={brief(asked.most)} is not allowed: allowed is at most {self.limits.new_tokens}", name
            )
        if asked.top_logprobs is not None and not asked.logprobs:
            raise Refusal(
                400, "top_logprobs is not allowed without logprobs: allowed is logprobs=true", "top_logprobs"
            )
        if asked.stream_options is not None and not asked.stream:
            raise Refusal(
                400, "stream_options is not allowed without stream: allowed is stream=true", "stream_options"
            )

        known = asked.kvweave.known_token_ids
        if len(known) > asked.n or any(token >= self.prompts.vocabulary for reply in known for token in reply):
            raise Refusal(
                400,
                f"kvweave.known_token_ids are not allowed: allowed are tokens below {self.prompts.vocabulary} of at "
                f"most {asked.n} replies",
                "kvweave.known_token_ids",
            )

    def check_model(self, name: str) -> None:
        """Refuse a model that is not here."""
        if name != self.name:
            raise Refusal(404, f"model is not here: allowed is {self.name}", "model", code="model_not_found")

    def _prepare(self, asked: ChatRequest, owner: str) -> Asked:
        """In a thread of its own: images are decoded, words become tokens."""
        own = asked.kvweave
        if own.context is not None:
            return self._question(asked, own.context, owner)
        method = self.offers.pick(own.method, own.budget)
        inputs = self.prompts.inputs(asked.messages, Album(self.limits, self.fetcher))
        source = PromptSource(inputs, method)
        self.offers.check(own.budget, source.tokens)
        most = self._most(asked, source)
        drawn = self.prompts.drawn(inputs, asked.messages) if own.trace else ([], [])
        return Asked(source, method.spelling(), most, *drawn)

    def _question(self, asked: ChatRequest, id: str, owner: str) -> Asked:
        """A question behind a context."""
        context, reading = self.contexts.get(id, owner)
        tokens = self.prompts.question(context.turns, context.text, asked.messages)
        source = QuestionSource(reading, context.kept // self.engine.proof.token_bytes, tokens)
        return Asked(source, context.method, self._most(asked, source), context=context.tokens)

    def _most(self, asked: ChatRequest, source: Source) -> int:
        """Tokens of a reply at most."""
        most = asked.most or min(self.limits.new_tokens, max(1, self.prompts.positions - source.tokens))
        self.prompts.check_length(source.tokens, most)
        return most

    def _answer(self, asked: ChatRequest, ready: Asked) -> Answer:
        """What the engine is given.

        Raises:
            Refusal: it would not fit though nothing else were there.
        """
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        own = asked.kvweave
        replies = [
            Reply(
                n,
                Sampler(asked.temperature, asked.top_p, None if asked.seed is None else asked.seed + n, top),
                ready.most,
                self.prompts.decode,
                () if own.ignore_eos else self._ends,
                asked.stops,
                known,
            )
            for n, known in zip(range(asked.n), [*own.known_token_ids, *[[]] * asked.n], strict=False)
        ]
        inbox = Inbox()
        job = Job(ready.source, replies, ready.most, inbox.put, traced=own.trace)
        self.check_memory(job)
        word, first = self.prompts.word, self.metrics.first_seconds.observe
        return Answer(
            self.name,
            ready.method,
            job,
            inbox,
            word,
            ready.words,
            ready.grids,
            context=ready.context,
            token_ids=own.return_token_ids,
            first=first,
        )

    def check_memory(self, job: Job) -> None:
        """Refuse what would not fit though nothing else were there."""
        needed = self.engine.needed(job)
        if needed > self.limits.memory:
            raise Refusal(
                400,
                f"messages: the prompt and its replies take {needed:,} bytes of keys and values: allowed are at most "
                f"{self.limits.memory:,}; a smaller kvweave.budget, max_tokens or n takes less",
                "messages",
                code="context_length_exceeded",
            )

    async def _beside(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._desk, work)

    # ---------------------------------------------------------------- contexts

    async def read(self, request: Request) -> Response:
        """`POST /v1/contexts`: read once, compress once."""
        owner = self.keys.owner(request)
        self.gate.enter()
        job: Job | None = None
        try:
            asked = parsed(ContextRequest, await read_json(request, self.limits))
            self.check_model(asked.model)
            source, text, turns = await self._beside(lambda: self._to_read(asked))
            inbox = Inbox()
            job = Job(source, [], 0, inbox.put)
            self.check_memory(job)
            self.engine.submit(job)
            begun = await unless_gone(request, inbox.get())
            assert isinstance(begun, Begun)
            reading = begun.reading
            assert reading is not None
            context = Context(
                owner=owner,
                method=source.method.spelling(),
                tokens=reading.length,
                whole=begun.whole,
                kept=reading.nbytes,
                text=text,
                turns=turns,
                position=None if reading.position is None else reading.position.tolist(),
            )
            await self._beside(lambda: self.contexts.add(context, reading))
            return JSONResponse(self._told(context))
        finally:
            self._leave(job)

    def _to_read(self, asked: ContextRequest) -> tuple[ContextSource, str, list[dict[str, Any]]]:
        """In a thread of its own, as `_prepare`."""
        own = asked.kvweave
        method = self.offers.pick(own.method, own.budget)
        inputs, text, turns = self.prompts.context(asked.messages, Album(self.limits, self.fetcher))
        source = ContextSource(inputs, method, self.context_probes, self.prompts.processor)
        self.offers.check(own.budget, source.tokens)
        return source, text, turns

    def _told(self, context: Context) -> dict[str, Any]:
        return context.told(self.name, self.limits.context_seconds)

    async def list_contexts(self, request: Request) -> Response:
        """`GET /v1/contexts`: one's own."""
        owner = self.keys.owner(request)
        found = await self._beside(lambda: self.contexts.all_of(owner))
        return JSONResponse({"object": "list", "data": [self._told(context) for context in found]})

    async def context(self, request: Request) -> Response:
        """`GET /v1/contexts/ID`."""
        owner, id = self.keys.owner(request), request.path_params["id"]
        return JSONResponse(self._told(await self._beside(lambda: self.contexts.look(id, owner))))

    async def delete_context(self, request: Request) -> Response:
        """`DELETE /v1/contexts/ID`."""
        owner, id = self.keys.owner(request), request.path_params["id"]
        await self._beside(lambda: self.contexts.delete(id, owner))
        return JSONResponse({"id": id, "object": "context.deleted", "deleted": True})

    # ---------------------------------------------------------------- what else is asked

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        self.keys.owner(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/NAME`."""
        self.keys.owner(request)
        self.check_model(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        offers = self.offers
        told = {
            "methods": list(offers.methods),
            "default_method": offers.default,
            "budget": offers.budget,
            "budgets": [offers.least, offers.most],
            "decoded": f"alone: {self.engine.proof.alone}" if self.engine.proof.alone else "together",
        }
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "kvweave", "kvweave": told}

    async def home(self, request: Request) -> Response:
        """`GET /`."""
        return page()

    async def health(self, request: Request) -> Response:
        """`GET /health`."""
        return PlainTextResponse("", 200 if self.engine.alive else 503)

    async def told(self, request: Request) -> Response:
        """`GET /metrics`."""
        self.keys.owner(request)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # ---------------------------------------------------------------- the application

    @asynccontextmanager
    async def _life(self, app: FastAPI) -> AsyncIterator[None]:
        self.engine.start()
        try:
            yield
        finally:
            await asyncio.get_running_loop().run_in_executor(None, self.engine.stop)
            self._desk.shutdown(cancel_futures=True)

    def application(self) -> FastAPI:
        """The ASGI application."""
        routes: list[tuple[str, str, Endpoint]] = [
            ("GET", "/", self.home),
            ("POST", "/v1/chat/completions", self.chat),
            ("POST", "/v1/contexts", self.read),
            ("GET", "/v1/contexts", self.list_contexts),
            ("GET", "/v1/contexts/{id}", self.context),
            ("DELETE", "/v1/contexts/{id}", self.delete_context),
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{name:path}", self.model),
            ("GET", "/health", self.health),
            ("GET", "/metrics", self.told),
        ]
        return application(routes, counted=self.metrics.requests, keys=self.keys, life=self._life)
