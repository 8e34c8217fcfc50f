"""Compressed prompts as files that engines read, in a folder of this process below the one that they know."""

import fcntl
import os
import shutil
import tempfile
import threading
import weakref
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvweave.seam.cache import CompressedCache

_PREFIX, _LOCK = "kvweave-", ".lock"


@dataclass(eq=False)
class Handoff:
    """A compressed prompt that is handed over.

    Attributes:
        digest: of its file; slots: entries that each head holds; nbytes: of the file.
        users: replies and contexts that need it.
    """

    digest: str
    slots: int
    nbytes: int
    users: int = 0


class Handoffs:
    """All of a process. A file lies there as long as a reply or a context needs it.

    Args:
        root: the folder that the engines know.
        model: whose prompts they are.
    """

    def __init__(self, root: Path, model: Any) -> None:
        self._model = model
        root.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(root)
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        self._lock_file = os.open(self.folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock_file, fcntl.LOCK_EX)
        self._lock = threading.Lock()
        self._held: dict[str, Handoff] = {}
        self._contexts: weakref.WeakKeyDictionary[CompressedCache, Handoff] = weakref.WeakKeyDictionary()
        self._gone: deque[Handoff] = deque()  # of contexts that nobody holds any more

    @property
    def name(self) -> str:
        """Of the folder, as requests tell it."""
        return self.folder.name

    @property
    def nbytes(self) -> int:
        with self._lock:
            self._tidy()
            return sum(held.nbytes for held in self._held.values())

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock_file)

    def take(self, cache: CompressedCache, *, keep: bool = False) -> Handoff:
        """A prompt's file, there until it is dropped.

        Args:
            keep: it stays for others as long as there is the cache, which does not change: a context.
        Raises:
            ValueError: engines cannot go on from it; what is at fault is named.
        """
        with self._lock:
            self._tidy()
            found = self._contexts.get(cache) if keep else None
            if found is None:
                found = self._written(cache)
                if keep:
                    found.users += 1
                    self._contexts[cache] = found
                    weakref.finalize(cache, self._gone.append, found)
            found.users += 1
            return found

    def drop(self, handoff: Handoff) -> None:
        """It is not used any more."""
        with self._lock:
            self._tidy()
            self._release(handoff)

    def _written(self, cache: CompressedCache) -> Handoff:
        told = cache.export(self.folder, self._model)
        digest = str(told["digest"])
        size = self._file(digest).stat().st_size
        return self._held.setdefault(digest, Handoff(digest, int(told["slots"]), size))

    def _tidy(self) -> None:
        while self._gone:
            self._release(self._gone.popleft())

    def _release(self, handoff: Handoff) -> None:
        handoff.users -= 1
        if not handoff.users:
            del self._held[handoff.digest]
            self._file(handoff.digest).unlink(missing_ok=True)

    def _file(self, digest: str) -> Path:
        return self.folder / f"{digest}.safetensors"


def _remove_left_behind(root: Path) -> None:
    """Folders of processes that were killed: nobody holds their locks."""
    for lock in root.glob(f"{_PREFIX}*/{_LOCK}"):
        with open(lock, "r+b") as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            shutil.rmtree(lock.parent, ignore_errors=True)
