"""What is asked of the engine, and what it answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol

from kvweave.methods.base import Method
from kvweave.ops.budget import entries
from kvweave.serve.engine.reading import Reading, read_on, read_prompt
from kvweave.serve.engine.reply import Piece, Reply
from kvweave.serve.errors import Refusal


class Source(Protocol):
    """What is read before a reply begins."""

    @property
    def tokens(self) -> int:
        """Tokens of the whole, as users count them."""

    @property
    def fresh(self) -> int:
        """Those of them that are read now."""

    def slots(self, token_bytes: int) -> int:
        """Entries that each head is expected to keep of it, in the mean.

        Args:
            token_bytes: bytes of one token's keys and values, over all layers.
        """

    @property
    def peak(self) -> int:
        """Entries that each head holds at most while it is read."""

    @property
    def defers(self) -> bool:
        """It stays whole while the first tokens of a reply are decoded."""

    def read(self, model: Any) -> Reading:
        """Let the model read it."""

    def split(self, model: Any) -> tuple[Reading, Sequence[int]]:
        """What is compressed of it, and the tokens behind that, which are not and which the model need not read."""


@dataclass(frozen=True)
class PromptSource:
    """A prompt, compressed once it has been read.

    Attributes:
        inputs: of one conversation, as `kvweave.models.encode` makes them.
    """

    inputs: Any
    method: Method

    @property
    def tokens(self) -> int:
        return int(self.inputs["input_ids"].shape[1])

    @property
    def fresh(self) -> int:
        return self.tokens

    def slots(self, token_bytes: int) -> int:
        full = self.method.name == "full"
        return self.tokens if full else entries(self.method.budget, self.tokens, token_bytes)

    @property
    def peak(self) -> int:
        return self.tokens

    @property
    def defers(self) -> bool:
        return self.method.defer > 0

    def read(self, model: Any) -> Reading:
        return read_prompt(model, self.inputs, self.method)

    def split(self, model: Any) -> tuple[Reading, Sequence[int]]:
        return self.read(model), ()


@dataclass(frozen=True)
class ContextSource(PromptSource):
    """A prompt whose question is not known, compressed to be asked about later.

    Attributes:
        probes: what the model is asked before the cut, as in `kvweave.compress`; None: nothing.
        processor: for their texts.
    """

    probes: str | None = None
    processor: Any = None

    @property
    def defers(self) -> bool:
        return False

    def read(self, model: Any) -> Reading:
        reading = read_prompt(model, self.inputs, self.method, hold=self.probes is not None)
        if self.probes is not None:
            reading.cache.compress(self.probes, processor=self.processor)
        reading.cache.freeze()
        return reading


@dataclass(frozen=True)
class QuestionSource:
    """A question behind a context that was compressed before.

    Attributes:
        context: what the model has read of it; it stays as it is.
        held: entries of it that each head holds, in the mean.
        question: tokens behind it.
    """

    context: Reading
    held: int
    question: Sequence[int]

    @property
    def tokens(self) -> int:
        return self.context.length + len(self.question)

    @property
    def fresh(self) -> int:
        return len(self.question)

    def slots(self, token_bytes: int) -> int:
        return self.held + len(self.question)

    @property
    def peak(self) -> int:
        return self.held + len(self.question)

    @property
    def defers(self) -> bool:
        return False

    def read(self, model: Any) -> Reading:
        own = self.context.fork()
        return read_on(model, own.cache, list(self.question), own.position)

    def split(self, model: Any) -> tuple[Reading, Sequence[int]]:
        return self.context, self.question


@dataclass(frozen=True)
class Begun:
    """The prompt was read.

    Attributes:
        whole: bytes of all its keys and values.
        reading: for whoever asked for no reply; else None.
    """

    whole: int
    reading: Reading | None


@dataclass(frozen=True)
class Kept:
    """The prompt was cut; it never comes where a reply ends before its cut.

    Attributes:
        bytes: that are kept of it.
        alone: why replies decode by themselves; empty: together with others.
        shares: of each token of the prompt, how many of all heads of all layers still hold it; None: not asked for.
    """

    bytes: int
    alone: str
    shares: list[float] | None


@dataclass(frozen=True)
class Failed:
    """The job came to nothing.

    Attributes:
        kind: the class of what was raised, whose words may quote the prompt.
        refusal: what the client is told instead, where it may be told.
    """

    kind: str
    refusal: Refusal | None = None


Event = Begun | Kept | Piece | Failed


@dataclass(eq=False)
class Job:
    """One request.

    Attributes:
        source: what is read.
        replies: that are to be decoded; none: it is read only.
        most: tokens of a reply at most.
        emit: told of what happens, in the engine's thread.
        traced: it wants to know which tokens are kept.
        left: nobody waits for it any more.
        told: it knows what was kept.
        born: when it was asked for.
    """

    source: Source
    replies: Sequence[Reply]
    most: int
    emit: Callable[[Event], None]
    traced: bool = False
    left: bool = False
    told: bool = False
    born: float = field(default_factory=monotonic)


@dataclass(eq=False)
class Live:
    """A reply that is being decoded.

    Attributes:
        reading: what it reads on from, alone; None: it is a row of the pool.
    """

    job: Job
    reply: Reply
    reading: Reading | None

    @property
    def left(self) -> int:
        """Tokens that it decodes at most from here."""
        return self.job.most - len(self.reply.tokens)
