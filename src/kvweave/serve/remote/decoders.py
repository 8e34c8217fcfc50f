"""Tokens from one engine, and on from another where that one breaks."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from kvweave.serve.engine.reply import Reply
from kvweave.serve.engine.sampling import Logprob
from kvweave.serve.engines.handoff import request_of
from kvweave.serve.errors import Refusal
from kvweave.serve.fleet.processes import Fleet
from kvweave.serve.fleet.replicas import Replica
from kvweave.serve.fleet.tries import Tries
from kvweave.serve.remote.files import Handoff

_PATIENCE = 300.0  # seconds until an engine that was started anew answers
_PATH = "/v1/completions"
_ID = "token_id:"  # how vLLM names a token whose log-probability it tells

Token = tuple[int, Logprob | None]


class Decoders(Fleet):
    """vLLM servers that know one folder of contexts.

    Args:
        urls: where they are.
        key: that they ask for; empty: none.
    """

    def __init__(self, urls: Sequence[str], key: str, *, again: Callable[[], None]) -> None:
        super().__init__(urls, "decoder", patience=_PATIENCE)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._again = again

    async def tokens(
        self, handoff: Handoff, folder: str, behind: Sequence[int], reply: Reply, held: int = 0
    ) -> AsyncGenerator[Token, None]:
        """What follows a compressed prompt and the tokens that `reply` has, each to be put into it before the next.

        All requests of one prompt go to one engine, which has its blocks, as long as that one answers. Where it
        breaks another one goes on behind the tokens that are known.

        Args:
            folder: of the engines' root where the file is.
            behind: tokens between the compressed prompt and the reply.
            held: first tokens of the reply that the file holds.
        Raises:
            Refusal: none answers, or one refuses.
        """

        async def ask(replica: Replica) -> AsyncGenerator[Token, None]:
            body = _body(handoff, folder, [*behind, *reply.tokens[held:]], reply)
            async with aclosing(self.events(replica, _PATH, self._headers, body)) as events:
                async for event in events:
                    for choice in event.get("choices", ()):
                        if choice.get("finish_reason") == "error":
                            raise Refusal(500, "the decoder could not go on from the prompt")
                        for token in _tokens(choice, reply.sampler.logprobs):
                            yield token

        async with aclosing(Tries(self, self._again, key=handoff.digest).pieces(ask)) as found:
            async for token in found:
                yield token


def _body(handoff: Handoff, folder: str, tokens: Sequence[int], reply: Reply) -> dict[str, Any]:
    """What vLLM is asked, behind a file and tokens: it ends where the reply ends, and of text it knows nothing."""
    sampler = reply.sampler
    body: dict[str, Any] = {
        **request_of({"digest": handoff.digest, "slots": handoff.slots}, tokens, folder),
        "max_tokens": reply.most - len(reply.tokens),
        "temperature": sampler.temperature,
        "top_p": sampler.top_p,
        "stop_token_ids": sorted(reply.ends),
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    if sampler.seed is not None:
        body["seed"] = sampler.seed
    if sampler.logprobs is not None:
        body |= {"logprobs": sampler.logprobs, "return_tokens_as_token_ids": True}
    return body


def _tokens(choice: dict[str, Any], most: int | None) -> list[Token]:
    """Tokens of one event, with what it tells of them and of `most` likely others."""
    ids, told = choice.get("token_ids") or [], choice.get("logprobs")
    if not told:
        return [(token, None) for token in ids]
    top = told.get("top_logprobs") or [{} for _ in ids]
    return [
        (token, Logprob(token, value, _likeliest(likely or {})[:most]))
        for token, value, likely in zip(ids, told["token_logprobs"], top, strict=True)
    ]


def _likeliest(told: dict[str, float]) -> tuple[tuple[int, float], ...]:
    pairs = [(int(name.removeprefix(_ID)), value) for name, value in told.items()]
    return tuple(sorted(pairs, key=lambda pair: -pair[1]))
