"""What one request may ask for, and all of them together. The operator sets it; a request never gets past it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from kvweave.methods.base import Method
from kvweave.methods.registry import method_from_dict, parse_method
from kvweave.ops.budget import check_budget, floor
from kvweave.serve.errors import Refusal

#: What `kvweave serve` compresses by: the best on a real model of those with equal counts and no bias.
DEFAULT_METHOD = "weave:form=even"


@dataclass(frozen=True)
class Limits:
    """Of one server.

    Attributes:
        body_bytes: of a request's JSON; body_seconds: until it has arrived.
        images: in a request; image_bytes: of one, as it was sent; image_pixels: of one; pixels: of all together.
        prompt_tokens: of a prompt, its images included; None: as many as the model has positions for.
        new_tokens: of a reply, also where a request names no number.
        choices: replies to a request.
        rows: replies that are decoded at a time; queue: requests that wait beside them.
        memory: bytes of keys and values of replies that are decoded, and of a prompt that is read.
        contexts: contexts of one owner; context_bytes: bytes of keys and values of all contexts together;
            context_seconds: that one lives after it was used last.
    """

    body_bytes: int = 64 << 20
    body_seconds: float = 30.0
    images: int = 32
    image_bytes: int = 8 << 20
    image_pixels: int = 16_000_000
    pixels: int = 64_000_000
    prompt_tokens: int | None = None
    new_tokens: int = 1024
    choices: int = 8
    rows: int = 32
    queue: int = 256
    memory: int = 2 << 30
    contexts: int = 64
    context_bytes: int = 1 << 30
    context_seconds: float = 3600.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name in ("images", "queue", "contexts") else 1
            if isinstance(value, float) and not value > 0:
                raise ValueError(f"{field.name}={value!r} is not allowed: allowed is a number > 0")
            if isinstance(value, int) and value < least:
                raise ValueError(f"{field.name}={value!r} is not allowed: allowed is an int >= {least}")
        if self.choices > self.rows:
            raise ValueError(f"choices={self.choices} is not allowed: allowed is at most rows={self.rows}")


class Offers:
    """The methods that a request may name, and the budgets.

    A request names one of them and never spells its own: options may name files of this machine.

    Args:
        spellings: such as "snapkv" or "flowmm:theta=0.3"; the first is taken where a request names none.
        budget: where a request names none.
        least, most: shares of a prompt that a request may ask to keep.
    """

    def __init__(
        self,
        spellings: Sequence[str] = (DEFAULT_METHOD,),
        budget: float | int | str = 0.2,
        least: float = 0.01,
        most: float = 1.0,
    ) -> None:
        if not 0 < least <= most <= 1:
            raise ValueError(
                f"budgets {least!r} to {most!r} are not allowed: allowed are shares, 0 < least <= most <= 1"
            )
        self.budget, self.least, self.most = check_budget(budget), least, most
        self.methods = {spelling: parse_method(spelling, budget=budget) for spelling in spellings}
        self.default = spellings[0]

    def pick(self, name: str | None, budget: Any) -> Method:
        """The method by this name, at this budget.

        Args:
            name: a spelling that is offered, or as much of it as stands before its options; None: the default.
            budget: a share, or tokens; None: the operator's.
        """
        method = self.methods[self._spelling(name)]
        if budget is None:
            return method
        if isinstance(budget, float) and not self.least <= budget <= self.most:
            raise self._refusal(budget)
        return method_from_dict(method.to_dict() | {"budget": budget})

    def _spelling(self, name: str | None) -> str:
        if name is None:
            return self.default
        if name in self.methods:
            return name
        found = [spelling for spelling in self.methods if spelling.partition(":")[0] == name]
        if not found:
            raise Refusal(
                400,
                f"kvweave.method is not offered here: allowed is one of {', '.join(self.methods)}",
                "kvweave.method",
            )
        return found[0]

    def check(self, budget: Any, tokens: int) -> None:
        """Refuse a budget in tokens that is out of bounds for a prompt of so many."""
        if isinstance(budget, int):
            share = min(budget, tokens)
            if not max(1, floor(self.least * tokens)) <= share <= max(1, floor(self.most * tokens)):
                raise self._refusal(budget)

    def _refusal(self, budget: Any) -> Refusal:
        return Refusal(
            400,
            f"kvweave.budget={budget!r} is not allowed: allowed is {self.least:g} to {self.most:g} of the "
            "prompt, as a share or in tokens",
            "kvweave.budget",
        )
