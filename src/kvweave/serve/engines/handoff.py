"""What an engine's connector checks of a request and of the exported context that it names.

Runs inside the engine's processes: it needs the standard library alone, and reads no content.
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = "kvweave context 1"
HEADER = "kvweave"  # the header's one text
MARK = "kvweave.json"  # beside a decoder's weights: which model's contexts it goes on from
OLDEST = (0, 28)  # vLLM that the connector is tested with; docs/SERVING.md names the newest
_STAND_IN = 0  # a token that is never embedded
_NO_DIGEST = "0" * 64
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FOLDER = re.compile(r"[a-z0-9_-]{1,64}")
_CHUNK = 1 << 24


class ContextError(ValueError):
    """A request that must not be answered from this context; the message says why."""


def check_version(version: str, parts: Sequence[int | str]) -> None:
    """Refuse a vLLM that is older than the connector's interface; (0, 0) is one built from a checkout without tags.

    Args:
        version, parts: its `__version__` and `__version_tuple__`.
    Raises:
        ImportError: it is older.
    """
    if (0, 0) != tuple(parts[:2]) < OLDEST:
        raise ImportError(f"vLLM {version} is not allowed: allowed is {OLDEST[0]}.{OLDEST[1]} or later")


@dataclass(frozen=True)
class Context:
    """A context that a request may be answered from.

    Attributes:
        path: its file.
        slots: entries that each layer and head holds, the request's first tokens.
    """

    path: str
    slots: int


def context_of(
    parameters: Mapping[str, Any] | None, salt: str | None, prompt: Sequence[int] | None, root: str, model: str
) -> Context | None:
    """The context that a request's `kv_transfer_params` name; None: it names none.

    A request says {"context": DIGEST, "slots": N}. Its first N tokens are all the same and stand for the slots; the
    context is ROOT/DIGEST.safetensors, or ROOT/NAME/DIGEST.safetensors where "folder": NAME stands beside.
    `cache_salt` must be the digest: a prefix cache knows blocks by their tokens' ids and the salt, and the stand-ins
    of all contexts are alike.

    Args:
        root: folder of all contexts; model: the mark of the model whose contexts are taken.
    Raises:
        ContextError: whatever is not as it has to be.
    """
    if not parameters or "context" not in parameters:
        return None
    digest, slots = parameters["context"], parameters.get("slots")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ContextError("context is no digest: allowed is 64 hexadecimal digits")
    if salt != digest:
        raise ContextError("cache_salt is not the context's digest: allowed is no other")
    folder = parameters.get("folder", "")
    if folder != "" and not (isinstance(folder, str) and _FOLDER.fullmatch(folder)):
        raise ContextError("folder is no name: allowed are up to 64 of a-z, 0-9, _ and -")
    path = Path(root) / folder / f"{digest}.safetensors"
    known = described(str(path))
    for name, right in (("digest", digest), ("model", model), ("slots", slots)):
        if known.get(name) != right:
            raise ContextError(
                f"the context's {name} is another: allowed is that of its file, and of this engine's model"
            )
    if not isinstance(slots, int) or not prompt or not 0 < slots < len(prompt):
        raise ContextError("the prompt has no token behind the context's slots: allowed is at least one")
    if len(set(prompt[:slots])) != 1:
        raise ContextError("the prompt's first tokens differ: allowed is one token for all of the context's slots")
    return Context(str(path), slots)


def request_of(context: Mapping[str, Any], tokens: Sequence[int], folder: str = "") -> dict[str, Any]:
    """What a request says to go on from a context, as vLLM's completions name it: `prompt` and the rest.

    Args:
        context: what `cache.export` returned.
        tokens: that follow it, at least one: a question, or the context's `first_token`.
        folder: of the root that the file is in; empty: the root itself.
    """
    digest, slots = context["digest"], context["slots"]
    if not tokens:
        raise ValueError("tokens=[] is not allowed: allowed is at least one")
    named = {"context": digest, "slots": slots} | ({"folder": folder} if folder else {})
    return {
        "prompt": [_STAND_IN] * slots + list(tokens),
        "cache_salt": digest,
        "kv_transfer_params": named,
    }


def described(path: str) -> dict[str, Any]:
    """What a context's file says of itself.

    Raises:
        ContextError: there is no such file, or it is another kind.
    """
    try:
        return dict(_described(path, *_version(path)))
    except (OSError, ValueError, KeyError) as error:
        raise ContextError(
            f"the context cannot be read ({type(error).__name__}): allowed is a file of {FORMAT!r}"
        ) from error


@functools.lru_cache(maxsize=4096)
def _described(path: str, modified: int, size: int) -> dict[str, Any]:
    known = json.loads(json.loads(_header(path))["__metadata__"][HEADER])
    if known["format"] != FORMAT or not _DIGEST.fullmatch(known["digest"]):
        raise ValueError("format")
    return dict(known)


def check_whole(path: str) -> None:
    """The file is as it was written; each is read through once.

    Raises:
        ContextError: it was cut short or altered.
    """
    written = described(path)["digest"]
    if _digest(path, written, *_version(path)) != written:
        raise ContextError("the context was cut short or altered: allowed is a file as it was written")


@functools.lru_cache(maxsize=4096)
def _digest(path: str, written: str, modified: int, size: int) -> str:
    header = _header(path)
    digest = hashlib.sha256(header.replace(written.encode(), _NO_DIGEST.encode()))
    with open(path, "rb") as file:
        file.seek(8 + len(header))
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _header(path: str) -> bytes:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > Path(path).stat().st_size:
            raise ValueError("length")
        return file.read(length)


def _version(path: str) -> tuple[int, int]:
    """Changes when a file is written anew."""
    state = Path(path).stat()
    return state.st_mtime_ns, state.st_size


def mark_of(folder: str) -> str | None:
    """Which model's contexts a decoder goes on from, as `kvweave convert --decoder` notes it; None: nothing says."""
    try:
        return str(json.loads((Path(folder) / MARK).read_text())["model"])
    except (OSError, ValueError, KeyError):
        return None


def heads_here(total: int, rank: int, size: int) -> slice:
    """KV heads of one of `size` tensor parallel processes; where there are fewer heads, several hold the same one."""
    start = rank * total // size
    return slice(start, start + max(1, total // size))
