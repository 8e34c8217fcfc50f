"""Options of methods: declared once, checked wherever they come from, documented from the same place."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvweave.ops.brief import brief

_LARGEST = 2**63 - 1  # of an int that tensors can count


@dataclass(frozen=True)
class Option:
    """What an option may be.

    Attributes:
        allowed: in words, as errors and tables print it.
        help: what it does, one line.
        check: True for an allowed value.
        parse: from the command line's spelling; raises ValueError.
    """

    allowed: str
    help: str
    check: Callable[[Any], bool]
    parse: Callable[[str], Any]

    def refusal(self, name: str, value: Any, method: str) -> str:
        """Why `value` is not this option of a method."""
        limit = ", below 2**63" if isinstance(value, int) and abs(value) > _LARGEST else ""
        return f"{name}={brief(value)} is not allowed for {method}: allowed is {self.allowed}{limit}"


def _field(default: Any, option: Option) -> Any:
    return dataclasses.field(default=default, metadata={"option": option})


def _is_number(value: Any) -> bool:
    is_int = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST
    return is_int or (isinstance(value, float) and not math.isnan(value))


def finite(text: str) -> float:
    """A number as typed; one that no float holds is none, so that errors show what was typed."""
    number = float(text)
    if math.isinf(number) and "inf" not in text.lower():
        raise ValueError(text)
    return number


def choice(default: str, *names: str, help: str) -> Any:
    """One of some words."""
    return _field(
        default, Option("one of " + ", ".join(names), help, lambda v: isinstance(v, str) and v in names, str)
    )


def flag(default: bool, *, help: str) -> Any:
    """True or False."""

    def parse(text: str) -> bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() not in words:
            raise ValueError(text)
        return words[text.lower()]

    return _field(default, Option("true or false", help, lambda v: isinstance(v, bool), parse))


def integer(default: int | None, *, minimum: int, odd: bool = False, optional: bool = False, help: str) -> Any:
    """An int from `minimum` on; with `optional` also None."""

    def check(value: Any) -> bool:
        if value is None:
            return optional
        is_int = isinstance(value, int) and not isinstance(value, bool)
        return is_int and minimum <= value <= _LARGEST and (not odd or value % 2 == 1)

    def parse(text: str) -> int | None:
        return None if optional and text.lower() == "none" else int(text)

    kind = "an odd int" if odd else "an int"
    return _field(default, Option(f"{kind} >= {minimum}" + (" or None" if optional else ""), help, check, parse))


def one_of(default: int, *numbers: int, help: str) -> Any:
    """One of some ints."""
    allowed = "one of " + ", ".join(map(str, numbers))
    return _field(default, Option(allowed, help, lambda v: type(v) is int and v in numbers, int))


def text(default: str | None, *, allowed: str, help: str) -> Any:
    """A string that is not empty, or None."""

    def parse(words: str) -> str | None:
        return None if words.lower() == "none" else words

    return _field(default, Option(allowed, help, lambda v: v is None or (isinstance(v, str) and v != ""), parse))


def wrapped(default: Callable[[], Any], *, help: str) -> Any:
    """The method inside a wrapper, given by its name on the command line; the wrapper checks it."""
    option = Option("a method, by its name", help, lambda method: True, str)
    return dataclasses.field(default_factory=default, metadata={"option": option})


def real(
    default: float | None,
    *,
    lo: float,
    hi: float,
    open_lo: bool = False,
    open_hi: bool = False,
    optional: bool = False,
    help: str,
) -> Any:
    """A number in [lo, hi], without an end that is open; with `optional` also None."""

    def check(value: Any) -> bool:
        if value is None:
            return optional
        ends = (open_lo and value == lo) or (open_hi and value == hi)
        return _is_number(value) and lo <= value <= hi and not ends

    def parse(text: str) -> float | None:
        return None if optional and text.lower() == "none" else finite(text)

    unbounded = math.isinf(lo) and math.isinf(hi)
    interval = f"{'(' if open_lo else '['}{lo:g}, {hi:g}{')' if open_hi else ']'}"
    allowed = "a number" if unbounded else f"a number in {interval}"
    return _field(default, Option(allowed + (" or None" if optional else ""), help, check, parse))
