"""`POST /v1/chat/completions`: answers as OpenAI words them, whole or in pieces."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from kvweave.report.grids import Grid
from kvweave.serve.engine.job import Begun, Event, Failed, Job, Kept
from kvweave.serve.engine.reply import Piece
from kvweave.serve.engine.sampling import Logprob
from kvweave.serve.errors import STOPPED, Refusal


class Inbox:
    """What happens to a job, from the engine's thread into the server's."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        """In the engine's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def get(self) -> Event:
        """The next thing that happens.

        Raises:
            Refusal: the job came to nothing.
        """
        event = await self._events.get()
        if isinstance(event, Failed):
            if event.refusal is not None:
                raise event.refusal
            if event.kind == "Stopped":
                raise Refusal(503, "the server is being stopped", code=STOPPED, retry_after=10)
            raise Refusal(500, f"the model failed ({event.kind})")
        return event


@dataclass
class Answer:
    """A request on its way, and what is known of it.

    Attributes:
        model: its name; method: the spelling that it is compressed by.
        words, grids: texts of its tokens and cells of its images, where the request wants to know what is kept.
        context: tokens read before.
        token_ids: tell tokens beside their text.
        first: when the first token came.
    """

    model: str
    method: str
    job: Job
    inbox: Inbox
    word: Callable[[int], str]
    words: list[str] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    context: int = 0
    token_ids: bool = False
    first: Callable[[float], None] = lambda seconds: None
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    whole: int = 0
    kept: Kept | None = None

    async def begin(self) -> None:
        """Until the prompt has been read."""
        event = await self.inbox.get()
        assert isinstance(event, Begun)
        self.whole = event.whole

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """What tokens add, as they come, until all replies have ended."""
        open_replies = len(self.job.replies)
        seen = False
        while open_replies:
            event = await self.inbox.get()
            if isinstance(event, Kept):
                self.kept = event
            elif isinstance(event, Piece):
                if not seen:
                    self.first(time.monotonic() - self.job.born)
                seen = True
                open_replies -= bool(event.finish)
                yield event

    async def body(self) -> dict[str, Any]:
        """The whole answer."""
        texts = ["" for _ in self.job.replies]
        finishes = list(texts)
        logprobs: list[list[Any]] = [[] for _ in texts]
        async with aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                texts[piece.index] += piece.text
                finishes[piece.index] = piece.finish
                logprobs[piece.index] += self._logprobs(piece)
        told = self.job.replies[0].sampler.logprobs is not None
        choices = [
            {
                "index": n,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "finish_reason": finishes[n],
                "logprobs": {"content": logprobs[n], "refusal": None} if told else None,
            }
            | ({"token_ids": self.job.replies[n].tokens} if self.token_ids else {})
            for n, text in enumerate(texts)
        ]
        return self._object("chat.completion", choices) | {"usage": self.usage, "kvweave": self.compression}

    async def chunks(self, include_usage: bool) -> AsyncGenerator[dict[str, Any], None]:
        """The answer in pieces."""
        begun: set[int] = set()
        untold: Any = None
        async with aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                delta: dict[str, Any] = {} if piece.index in begun else {"role": "assistant", "content": ""}
                begun.add(piece.index)
                logprobs = self._logprobs(piece)
                if not (piece.text or piece.finish or delta or logprobs or self.token_ids):
                    continue
                if piece.text:
                    delta["content"] = piece.text
                choice = {
                    "index": piece.index,
                    "delta": delta,
                    "finish_reason": piece.finish or None,
                    "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
                }
                if self.token_ids:
                    choice["token_ids"] = [piece.token]
                chunk = self._object("chat.completion.chunk", [choice])
                if untold != self.compression:  # once it is known, and again where a cut was deferred
                    untold = chunk["kvweave"] = self.compression
                yield chunk
        if include_usage:
            yield self._object("chat.completion.chunk", []) | {"usage": self.usage, "kvweave": self.compression}

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens as people count them, whatever is kept of them."""
        prompt, replies = self.job.source.tokens, sum(len(reply.tokens) for reply in self.job.replies)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": replies,
            "total_tokens": prompt + replies,
            "prompt_tokens_details": {"cached_tokens": self.context},
        }

    @property
    def compression(self) -> dict[str, Any]:
        """What became of the prompt's keys and values."""
        kept = self.kept
        ended = all(reply.finish for reply in self.job.replies)
        waits = "the reply ended before its cut" if ended else "the cut is still to come"
        alone = waits if kept is None else kept.alone
        told: dict[str, Any] = {
            "method": self.method,
            "prompt_bytes": self.whole,
            "kept_bytes": self.whole if kept is None else kept.bytes,
            "decoded": f"alone: {alone}" if alone else "together",
        }
        if kept is not None and kept.shares is not None:
            told["tokens"] = [
                {"text": text, "kept": round(share, 4)} for text, share in zip(self.words, kept.shares, strict=False)
            ]
            told["images"] = [
                {"image": grid.image, "rows": grid.rows, "columns": grid.columns, "tokens": grid.tokens}
                for grid in self.grids
            ]
        return told

    def _object(self, kind: str, choices: Iterable[Any]) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return head | {"choices": list(choices)}

    def _logprobs(self, piece: Piece) -> list[dict[str, Any]]:
        found = piece.logprob
        return [] if found is None else [self._logprob(found)]

    def _logprob(self, found: Logprob) -> dict[str, Any]:
        top = [self._entry(token, value) for token, value in found.top]
        return self._entry(found.token, found.value) | {"top_logprobs": top}

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        text = self.word(token)
        return {"token": text, "logprob": max(value, -9999.0), "bytes": list(text.encode())}
