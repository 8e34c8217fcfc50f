"""Contexts: read once, compressed once, asked about many times; each is its owner's alone, and survives a restart.

All of it runs in the thread that prepares prompts.
"""

import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvweave.seam.cache import CompressedCache
from kvweave.serve.engine.reading import Reading
from kvweave.serve.errors import Refusal
from kvweave.serve.limits import Limits

_ID = re.compile(r"ctx_[0-9a-f]{32}")


@dataclass
class Context:
    """What was read.

    Attributes:
        id, owner: whose it is; created, used: seconds since the epoch.
        method: the spelling that it was compressed by.
        tokens: that were read; whole: bytes of all their keys and values; kept: of those that are left.
        text: as the chat template wrote it; turns: its messages, without what is on the images.
        position: of the next token, as nested lists; None: the model is given none.
    """

    owner: str
    method: str
    tokens: int
    whole: int
    kept: int
    text: str
    turns: list[dict[str, Any]]
    position: list[Any] | None
    id: str = field(default_factory=lambda: f"ctx_{secrets.token_hex(16)}")
    created: float = field(default_factory=time.time)
    used: float = field(default_factory=time.time)

    def told(self, model: str, seconds: float) -> dict[str, Any]:
        """What its owner is told."""
        return {
            "id": self.id,
            "object": "context",
            "created": int(self.created),
            "expires": int(self.used + seconds),
            "model": model,
            "usage": {"prompt_tokens": self.tokens, "completion_tokens": 0, "total_tokens": self.tokens},
            "kvweave": {"method": self.method, "prompt_bytes": self.whole, "kept_bytes": self.kept},
        }


class Contexts:
    """All contexts of a server.

    Where there is no room for a new one, the owner who holds most bytes loses the one that was used longest ago.

    Args:
        folder: where they survive a restart; None: nowhere.
        model: that reads them.
        shared: other servers keep theirs in the folder as well: what one has read all can be asked about, and limits
            count what this one knows of.
        clock: seconds since the epoch.
        counted: told how many there are and their bytes, whenever that changes.
    """

    def __init__(
        self,
        limits: Limits,
        folder: Path | None,
        model: Any,
        *,
        shared: bool = False,
        clock: Callable[[], float] = time.time,
        counted: Callable[[int, int], None] = lambda number, kept: None,
    ) -> None:
        self._limits, self._folder, self._model, self._shared = limits, folder, model, shared
        self._clock, self._counted = clock, counted
        self._known: dict[str, Context] = {}
        self._readings: dict[str, Reading] = {}
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._known = {context.id: context for context in self._found(folder)}
        self._expire()

    def add(self, context: Context, reading: Reading) -> None:
        """Keep a context that was read, if it fits at all.

        Raises:
            Refusal: it does not, though nothing else were there.
        """
        most = self._limits.context_bytes
        if not self._limits.contexts or context.kept > most:
            raise Refusal(
                400, f"messages: the context keeps {context.kept:,} bytes: allowed are at most {most:,}", "messages"
            )
        self._expire()
        mine = self._of(context.owner)
        for old in mine[: max(0, len(mine) + 1 - self._limits.contexts)]:
            self._forget(old)
        while self._bytes + context.kept > most:
            self._forget(self._of(self._largest_owner())[0])
        context.created = context.used = self._clock()
        self._known[context.id], self._readings[context.id] = context, reading
        if self._folder is not None:
            reading.cache.save(self._cache_file(context.id), self._model)
            self._note(context)
        self._count()

    def get(self, id: str, owner: str) -> tuple[Context, Reading]:
        """A context and what was read of it; it lives on from now.

        Raises:
            Refusal: there is none, it is another's, or it has expired: nobody can tell which.
        """
        context = self._own(id, owner)
        if id not in self._readings:
            try:
                cache = CompressedCache.load(self._cache_file(id), self._model)
            except (ValueError, OSError):  # another model's, or damaged
                self._forget(context)
                self._count()
                raise self._none() from None
            position = None if context.position is None else torch.tensor(context.position, device=self._model.device)
            self._readings[id] = Reading(cache, torch.empty(0), position, context.tokens)
        context.used = self._clock()
        if self._folder is not None:
            self._note(context)
        return context, self._readings[id]

    def look(self, id: str, owner: str) -> Context:
        """A context, which lives on no longer for it."""
        return self._own(id, owner)

    def all_of(self, owner: str) -> list[Context]:
        """An owner's contexts, the one used last at the end."""
        if self._shared and self._folder is not None:
            self._known |= {context.id: context for context in self._found(self._folder)}
        self._expire()
        return self._of(owner)

    def delete(self, id: str, owner: str) -> None:
        """Forget a context."""
        self._forget(self._own(id, owner))
        self._count()

    # ---------------------------------------------------------------- who goes

    def _own(self, id: str, owner: str) -> Context:
        self._expire()
        if self._shared and _ID.fullmatch(id):
            self._look_again(id)
        context = self._known.get(id)
        if context is None or context.owner != owner:
            raise self._none()
        return context

    @staticmethod
    def _none() -> Refusal:
        return Refusal(404, "there is no such context", "kvweave.context", code="context_not_found")

    def _of(self, owner: str) -> list[Context]:
        return sorted((c for c in self._known.values() if c.owner == owner), key=lambda context: context.used)

    def _largest_owner(self) -> str:
        held: dict[str, int] = {}
        for context in self._known.values():
            held[context.owner] = held.get(context.owner, 0) + context.kept
        return max(held, key=lambda owner: held[owner])

    @property
    def _bytes(self) -> int:
        return sum(context.kept for context in self._known.values())

    def _expire(self) -> None:
        end = self._clock() - self._limits.context_seconds
        for context in [context for context in self._known.values() if context.used < end]:
            if self._shared:
                self._look_again(context.id)
            if self._known.get(context.id, context).used < end:
                self._forget(context)
        self._count()

    def _look_again(self, id: str) -> None:
        """What another server may have done with a context: read it, used it or forgotten it."""
        context = self._noted(id)
        if context is not None:
            self._known[id] = context
        elif id in self._known:
            self._forget(self._known[id])

    def _forget(self, context: Context) -> None:
        self._known.pop(context.id, None)
        self._readings.pop(context.id, None)
        if self._folder is not None:
            self._cache_file(context.id).unlink(missing_ok=True)
            self._note_file(context.id).unlink(missing_ok=True)

    def _count(self) -> None:
        self._counted(len(self._known), self._bytes)

    # ---------------------------------------------------------------- on disk

    def _cache_file(self, id: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{id}.safetensors"

    def _note_file(self, id: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{id}.json"

    def _note(self, context: Context) -> None:
        """Write what is known of it; the file is there whole or not at all, and its owner's alone."""
        file = self._note_file(context.id)
        part = file.with_suffix(".part")
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as opened:
            json.dump(asdict(context), opened)
        self._cache_file(context.id).chmod(0o600)
        part.replace(file)

    def _noted(self, id: str) -> Context | None:
        """What the folder says of a context; None: nothing."""
        try:
            context = Context(**json.loads(self._note_file(id).read_text(encoding="utf-8")))
        except (ValueError, TypeError, OSError):
            return None
        return context if self._cache_file(id).exists() else None

    def _found(self, folder: Path) -> Iterator[Context]:
        """The contexts in the folder; what is left of others is removed, unless somebody may be writing it."""
        for file in sorted(folder.iterdir()):
            id = file.name.partition(".")[0]
            if not _ID.fullmatch(id):
                continue
            context = self._noted(id)
            if context is None or file.suffix == ".part":
                if not self._shared:
                    file.unlink()
            elif file.suffix == ".json":
                yield context
