"""How many entries stay: budgets as users write them, and their integer allocation over layers."""

import math
import re
import sys
import warnings
from collections.abc import Sequence
from numbers import Integral, Real

from kvweave.ops.brief import brief

Budget = float | int | str

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_ALLOWED = "a share in (0, 1], tokens as an int >= 1, bytes such as '256MiB', or a fidelity such as 'auto:kl=0.05'"
LEAST = 1e-9  # a share that comes to one entry, however long the prompt
_MOST = 2**63 - 1  # no cache holds more tokens or bytes
GUARD = 1e-9  # repairs binary rounding such as 0.29 * 100 = 28.999...96 before a floor


def floor(x: float) -> int:
    """Largest integer not above `x`, with the guard against binary rounding that every floor carries."""
    return math.floor(x + GUARD)


def check_budget(budget: Budget) -> Budget:
    """Return `budget` as an int, a float or a string if it is a budget, numpy's numbers included; else raise.

    Raises:
        TypeError: it is neither a number nor a string.
        ValueError: it is not a share in (0, 1], a positive int or a positive number of bytes.
    """
    if isinstance(budget, str):
        if kl_target(budget) is None:
            parse_bytes(budget)
        return budget
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise TypeError(f"budget={brief(budget)} is not a budget: allowed is {_ALLOWED}")
    number = int(budget) if isinstance(budget, Integral) else float(budget)
    allowed = 1 <= number <= _MOST if isinstance(number, int) else 0.0 < number <= 1.0  # NaN fails both comparisons
    if not allowed:
        raise ValueError(f"budget={brief(number)} is not a budget: allowed is {_ALLOWED}")
    return number


def warn_of_one(budget: Budget) -> None:
    """Warn whoever says that one token is to stay, where all of them may have been meant."""
    if isinstance(budget, int) and budget == 1:
        frame, level, ours = sys._getframe(1), 2, ("kvweave.", "dataclasses")
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(ours):
            frame, level = frame.f_back, level + 1
        text = "budget=1 keeps one token of each prompt: the whole prompt is budget=1.0, a share"
        warnings.warn(text, UserWarning, stacklevel=level)


def kl_target(budget: Budget) -> float | None:
    """The divergence in nats that "auto:kl=0.05" asks for; None: it is another kind of budget.

    Raises:
        ValueError: it begins with "auto", and goes on otherwise.
    """
    if not isinstance(budget, str) or not budget.strip().lower().startswith("auto"):
        return None
    match = re.fullmatch(r"\s*auto:kl=([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]{1,3})?)\s*", budget, re.IGNORECASE)
    if match is None or not 0 < float(match[1]) < math.inf:
        raise ValueError(
            f"budget={brief(budget)} is not a budget: allowed is 'auto:kl=' and a number of nats above 0"
        )
    return float(match[1])


def parse_bytes(text: str) -> int:
    """Number of bytes in a string such as `"256MiB"`; units B, KiB, MiB, GiB, KB, MB, GB."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*", text)
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise ValueError(f"budget={brief(text)} is not a budget: allowed is {_ALLOWED} (units {', '.join(_UNITS)})")
    size = float(match[1]) * units[match[2].lower()]
    if size > _MOST:
        raise ValueError(f"budget={brief(text)} is more than any cache holds: allowed is {_ALLOWED}")
    if floor(size) < 1:
        raise ValueError(f"budget={brief(text)} is no byte at all: allowed is {_ALLOWED}")
    return floor(size)


def entries(budget: Budget, length: int, bytes_per_entry: int) -> int:
    """Entries that a row of `length` tokens keeps in each layer, between 1 and `length` (SPEC 1).

    Args:
        budget: as the user wrote it.
        length: tokens of the row, padding not counted.
        bytes_per_entry: of keys and values, over all compressed layers and all rows of the batch.
    """
    if isinstance(budget, str):
        goal = parse_bytes(budget) // bytes_per_entry
    elif isinstance(budget, int):
        goal = budget
    else:
        goal = floor(budget * length)
    return min(length, max(1, goal))


def largest_remainder(shares: Sequence[float], total: int, ceilings: Sequence[int]) -> list[int]:
    """Floor `shares` and give what is missing to `total`, one each, to the largest fractional parts.

    Ties go to the lower index; an entry at its ceiling is skipped.
    """
    counts = [floor(share) for share in shares]
    by_fraction = sorted(range(len(shares)), key=lambda i: (-round(shares[i] - counts[i], 9), i))
    missing = total - sum(counts)
    while missing > 0:
        before = missing
        for i in by_fraction:
            if missing and counts[i] < ceilings[i]:
                counts[i] += 1
                missing -= 1
        if missing == before:
            raise ValueError(f"total={total} does not fit under the ceilings {list(ceilings)}")
    return counts


def allocate(weights: Sequence[float], total: int, lo: int, hi: int | Sequence[int]) -> list[int]:
    """Integers in [lo, hi] that sum to `total`, proportional to `weights` where the bounds allow (SPEC 2.3).

    Args:
        weights: one per layer, any non-negative scale.
        total: clamped to what the bounds can hold.
        lo, hi: bounds of every layer's share; `hi` may be one a layer, and is then stronger than `lo`.
    """
    n = len(weights)
    most = [hi] * n if isinstance(hi, int) else list(hi)
    fewest = [min(lo, ceiling) for ceiling in most]
    top = max(weights)
    scaled = [max(w / top, 1e-12) for w in weights] if top > 0 else [1.0] * n
    total = min(max(total, sum(fewest)), sum(most))

    def shares(factor: float) -> list[float]:
        return [min(max(factor * w, a), b) for w, a, b in zip(scaled, fewest, most, strict=True)]

    low, high = 0.0, max(most) / min(scaled)
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):  # no number lies between
            break
        low, high = (middle, high) if sum(shares(middle)) < total else (low, middle)
    return largest_remainder(shares(high), total, most)


def least(budget: int, length: int) -> int:
    """Entries that a layer keeps at least where budgets follow a statistic (SPEC 2.3)."""
    return min(budget, max(1, floor(0.01 * length)))
