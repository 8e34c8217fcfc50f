"""A token from logits: the likeliest, or drawn."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability before temperature, and those of the likeliest others.

    Attributes:
        token, value: of the one that was taken.
        top: (token, log-probability), the likeliest first.
    """

    token: int
    value: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Sampler:
    """How one reply's tokens are drawn.

    Attributes:
        temperature: 0: the likeliest token.
        top_p: the likeliest tokens that together have this probability are drawn from.
        seed: None: another one each time.
        logprobs: how many of the likeliest tokens are told beside the one taken; None: nothing is told.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    _draws: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._draws = torch.Generator()
        if self.seed is None:
            self._draws.seed()
        else:
            self._draws.manual_seed(self.seed)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def draw(self, logits: Tensor) -> int:
        """A token from logits [vocabulary]."""
        if self.greedy:
            return int(logits.argmax())
        above = logits.double().cpu()
        above -= above.max()  # or a very low temperature would divide infinities
        chances = (above / self.temperature).softmax(-1).float()
        if self.top_p < 1:
            ordered, tokens = chances.sort(descending=True)
            before = ordered.cumsum(-1) - ordered
            ordered[1:][before[1:] >= self.top_p] = 0  # the first is never left out
            return int(tokens[torch.multinomial(ordered, 1, generator=self._draws)])
        return int(torch.multinomial(chances, 1, generator=self._draws))

    def told(self, logits: Tensor, token: int) -> Logprob | None:
        """The token's log-probability, where it is asked for."""
        if self.logprobs is None:
            return None
        values = logits.float().log_softmax(-1)
        top = values.topk(min(self.logprobs, len(values)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return Logprob(token, float(values[token]), tuple(pairs))
