"""One reply: its tokens, its text as far as it is certain, and why it ended."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from kvweave.serve.engine.sampling import Logprob, Sampler

STOP, LENGTH = "stop", "length"
_UNFINISHED = "\ufffd"  # what a tokenizer writes for the first bytes of a character


@dataclass(frozen=True)
class Piece:
    """What one token adds to a reply.

    Attributes:
        index: of the reply among the choices.
        token: its id.
        text: new text, maybe none: a character that is not complete, or what may be the beginning of a stop.
        logprob: of the token, where it is asked for; None for one that ends the reply.
        finish: why the reply ends with it; empty: it goes on.
    """

    index: int
    token: int
    text: str
    logprob: Logprob | None
    finish: str


class Reply:
    """One choice of a request, as it is decoded.

    Args:
        index: among the choices.
        sampler: how tokens are drawn.
        most: tokens at most.
        decode: from token ids to text, special tokens left out.
        ends: tokens that end a reply.
        stops: texts that end it, and are not part of it.
        known: its first tokens, whatever is drawn in their place.
    """

    def __init__(
        self,
        index: int,
        sampler: Sampler,
        most: int,
        decode: Callable[[Sequence[int]], str],
        ends: Sequence[int] = (),
        stops: Sequence[str] = (),
        known: Sequence[int] = (),
    ) -> None:
        self.index, self.sampler, self.most = index, sampler, most
        self.tokens: list[int] = []
        self.finish = ""
        self._said: list[int] = []  # the tokens, without one that ends the reply
        self.ends, self._known = frozenset(ends), tuple(known)
        self._decode, self._stops = decode, tuple(stops)
        self._settled = 0  # tokens whose text no later token changes
        self._shown = 0  # tokens whose text is in `_text`, or was
        self._text = ""  # not yet handed out

    @property
    def last(self) -> int:
        """The token that the model reads next."""
        return self.tokens[-1]

    def take(self, logits: Tensor, likeliest: int | None = None) -> Piece:
        """Draw a token from logits [vocabulary].

        Args:
            likeliest: of them, where it is known.
        """
        greedy = self.sampler.greedy and likeliest is not None
        token = likeliest if greedy and likeliest is not None else self.sampler.draw(logits)
        at = len(self.tokens)
        if at < len(self._known):  # drawn all the same: behind the last of them a seed goes on as it would have
            token = self._known[at]
        return self.put(token, self.sampler.told(logits, token))

    def replay(self) -> Iterator[Piece]:
        """Take the tokens that are known and not there yet, nothing drawn and no log-probabilities told."""
        for token in self._known[len(self.tokens) :]:
            piece = self.put(token, None)
            yield piece
            if piece.finish:
                return

    def put(self, token: int, logprob: Logprob | None) -> Piece:
        """Add a token that was drawn."""
        self.tokens.append(token)
        if token in self.ends:
            self.finish = STOP
            return Piece(self.index, token, self._rest(), None, STOP)
        self._said.append(token)
        self._text += self._new_text()
        found = [at for at in map(self._text.find, self._stops) if at >= 0]
        if found:
            self.finish, self._text = STOP, self._text[: min(found)]
            return Piece(self.index, token, self._handed(len(self._text)), logprob, STOP)
        if len(self.tokens) >= self.most:
            self.finish = LENGTH
            return Piece(self.index, token, self._rest(), logprob, LENGTH)
        return Piece(self.index, token, self._handed(len(self._text) - self._held()), logprob, "")

    def _new_text(self, *, whole: bool = False) -> str:
        """Text of the last tokens: what they add to those before, which tokenizers join in ways of their own.

        Args:
            whole: though it ends with a character that is not complete.
        """
        before = self._decode(self._said[self._settled : self._shown])
        now = self._decode(self._said[self._settled :])
        if now.endswith(_UNFINISHED) and not whole:
            return ""
        if before and len(now) > len(before):  # a window of special tokens alone would lose the space behind them
            self._settled = self._shown
        self._shown = len(self._said)
        return now[len(before) :]

    def _rest(self) -> str:
        """All text that is left, at the end."""
        self._text += self._new_text(whole=True)
        return self._handed(len(self._text))

    def _handed(self, count: int) -> str:
        text, self._text = self._text[:count], self._text[count:]
        return text

    def _held(self) -> int:
        """Letters at the end that may begin a stop."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
