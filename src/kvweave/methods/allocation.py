"""How many entries each head keeps: by score over the heads of a layer or of all layers, or by the model's profile.

SPEC 16.9 and 17.7, on the ideas of KVzip (2505.23416), AdaKV (2407.11550), HeadKV and DuoAttention: few heads
want nearly everything and most very little, and which ones is a property of the model more than of the prompt.
"""

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvweave.ops.budget import allocate, floor
from kvweave.ops.select import best_by, of_some

SHIPPED = Path(__file__).parent.parent / "profiles"  # by name, such as "smol-text"


@dataclass(frozen=True)
class Quota:
    """How many entries a head keeps, and how many of them by force: the first and the last tokens."""

    budget: int
    sinks: int = 0
    recent: int = 0

    @property
    def forced(self) -> int:
        return self.sinks + self.recent

    @property
    def free(self) -> int:
        """Entries that are chosen by score."""
        return self.budget - self.forced


@dataclass(frozen=True)
class Pool:
    """One layer's tokens, as they compete for entries.

    Attributes:
        keys: what they are ranked by, [batch, kv_heads, length] each, the first decides.
        forced: bool [1 or batch, 1 or kv_heads, length], tokens that stay whatever their rank.
        valid: bool, alike, slots that hold a token.
        quota: of a head if all had equally many.
    """

    keys: Sequence[Tensor]
    forced: Tensor
    valid: Tensor
    quota: Quota

    def row(self, n: int) -> "Pool":
        """One row of the batch: tensors of [kv_heads, length]."""
        like = self.keys[0]

        def of(x: Tensor) -> Tensor:
            return x.expand_as(like)[n]

        return Pool([of(key) for key in self.keys], of(self.forced), of(self.valid), self.quota)


def share_out(pools: Sequence[Pool], share: float) -> list[list[int]]:
    """Entries of each KV head of each layer, forced ones included; they sum to layers x KV heads x budget.

    Every head has its forced tokens and its own best `share` of its free entries (its best one where that is none at
    all); the best of all other tokens, over all heads of these layers, get the rest. Ties go to the lower layer,
    head, position.

    Args:
        pools: of one row of the batch, one a layer.
        share: in [0, 1].
    """
    quota, home = pools[0].quota, pools[0].valid.device
    own = floor(share * quota.free)
    own = own if own or quota.forced else 1
    keys, rests, counts, total = [], [], [], 0
    for pool in pools:
        free = pool.valid & ~pool.forced
        mine = free & best_by(of_some(pool.keys, free), min(own, free.shape[-1]))
        counts.append(((pool.forced & pool.valid).sum(-1) + mine.sum(-1)).to(home))
        keys.append([key.flatten().to(home) for key in pool.keys])
        rests.append((free & ~mine).flatten().to(home))
        total += quota.budget * len(free)
    rest, heads = torch.cat(rests), [len(count) for count in counts]
    taken, left = torch.stack([torch.cat(counts).sum(), rest.sum()]).tolist()  # one wait for the device
    together = [torch.cat(parts) for parts in zip(*keys, strict=True)]
    wins = best_by(of_some(together, rest), max(0, min(total - taken, left))).split([len(part) for part in rests])
    won = torch.cat([win.view(count, -1).sum(-1) for win, count in zip(wins, heads, strict=True)])
    entries = iter((torch.cat(counts) + won).tolist())  # and another
    return [list(islice(entries, count)) for count in heads]


@dataclass(frozen=True)
class Profile:
    """Shares of the prompt that each head keeps when a model's heads compete, the mean over calibration prompts.

    Attributes:
        fingerprint: of the model that it was made with.
        budgets: descending shares of the whole.
        shares: [budgets, layers, kv_heads], the share of each head at each of these.
    """

    fingerprint: str
    budgets: tuple[float, ...]
    shares: tuple[tuple[tuple[float, ...], ...], ...]

    @staticmethod
    def file(path: str) -> Path:
        """Where a profile lies: a file, or one of those that are shipped, by its name."""
        shipped = SHIPPED / f"{path}.json"
        return shipped if path == shipped.stem and shipped.is_file() else Path(path)

    @staticmethod
    def read(path: str) -> "Profile":
        """The profile in a JSON file, or one that is shipped.

        Raises:
            ValueError: there is none, or it is not one.
        """
        try:
            data = json.loads(Profile.file(path).read_text())
            shares = tuple(tuple(tuple(map(float, layer)) for layer in table) for table in data["shares"])
            profile = Profile(str(data["fingerprint"]), tuple(map(float, data["budgets"])), shares)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"profile={path!r} cannot be read ({error}): allowed is a profile's JSON file") from None
        sizes = {(len(table), len(layer)) for table in shares for layer in table}
        down = sorted(profile.budgets, reverse=True) == list(profile.budgets)
        if not profile.budgets or len(profile.budgets) != len(shares) or len(sizes) != 1 or not down:
            raise ValueError(
                f"profile={path!r} is not one: allowed is a table of shares [layers][kv_heads] for each of its "
                "descending budgets"
            )
        return profile

    def write(self, path: str, **about: Any) -> None:
        """Into a JSON file, a line for each layer's shares; it is there whole or not at all.

        Args:
            about: what else the file is to say, JSON-able.
        """
        lines = [f'"{name}": {json.dumps(value)}' for name, value in about.items()]
        lines += [f'"fingerprint": {json.dumps(self.fingerprint)}', f'"budgets": {json.dumps(self.budgets)}']
        tables = [",\n ".join(map(json.dumps, table)) for table in self.shares]
        lines += ['"shares": [\n[' + "],\n[".join(tables) + "]\n]"]
        file = Path(path)
        part = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            part.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and KV heads."""
        return len(self.shares[0]), len(self.shares[0][0])

    def at(self, budget: float) -> list[list[float]]:
        """Shares at a budget, linear between those of the profile and constant beyond: [layers][kv_heads]."""
        budget = min(max(budget, self.budgets[-1]), self.budgets[0])
        above = max(n for n, b in enumerate(self.budgets) if b >= budget)
        below = min(above + 1, len(self.budgets) - 1)
        high, low = self.budgets[above], self.budgets[below]
        part = (budget - low) / (high - low) if high > low else 1.0
        tables = zip(self.shares[above], self.shares[below], strict=True)
        return [[part * a + (1 - part) * b for a, b in zip(*layers, strict=True)] for layers in tables]


def profile_counts(
    path: str,
    layers: int,
    quota: Quota,
    length: int,
    pooled: Sequence[Sequence[int]] | None = None,
    mix: float = 0.0,
    ceilings: Sequence[Sequence[int]] | None = None,
) -> list[tuple[int, ...]]:
    """Entries of each KV head of each layer by a profile, forced ones included; they sum to layers x KV heads x
    budget.

    Args:
        layers: of the model; quota: of a head if all had equally many; length: tokens of the prompt.
        pooled: what `share_out` gives this prompt over all layers; mix: its weight.
        ceilings: tokens that each head has; None: `length`.
    """
    file = Profile.file(path)
    changed = file.stat().st_mtime if file.is_file() else 0.0
    flat, most = (None if of is None else tuple(n for layer in of for n in layer) for of in (pooled, ceilings))
    return _profile_counts(path, changed, layers, quota, length, flat, mix, most)


@functools.lru_cache(maxsize=64)  # asked for once a layer
def _profile_counts(
    path: str,
    changed: float,
    layers: int,
    quota: Quota,
    length: int,
    pooled: tuple[int, ...] | None,
    mix: float,
    ceilings: tuple[int, ...] | None,
) -> list[tuple[int, ...]]:
    profile = Profile.read(path)
    own, kv_heads = profile.shape
    if own != layers or (pooled is not None and len(pooled) != layers * kv_heads):
        model = f"{layers} layers" + ("" if pooled is None else f" of {len(pooled) // layers}")
        raise ValueError(
            f"profile={path!r} has {own} layers of {kv_heads} KV heads, and the model {model}: allowed is a "
            "profile of this model"
        )
    shares = [share for layer in profile.at(quota.budget / length) for share in layer]
    if pooled is not None:
        shares = [(1 - mix) * share + mix * count / length for share, count in zip(shares, pooled, strict=True)]
    counts = allocate(shares, layers * kv_heads * quota.budget, max(1, quota.forced), ceilings or length)
    return [tuple(counts[n * kv_heads : (n + 1) * kv_heads]) for n in range(layers)]
