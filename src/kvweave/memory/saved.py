"""A cache as a file: tensors and what is known of them, in safetensors, memory-mapped when it is read; no pickle.

The header carries a digest of the whole file, so that one that was cut short or altered is refused.
"""

import hashlib
import json
import mmap
import os
import uuid
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "kvweave cache 1"
#: Stands for a digest where it is not known yet.
NO_DIGEST = "0" * 64
_CHUNK = 1 << 24
_PLAIN = (bool, int, float, str, type(None))


def save(path: str | os.PathLike[str], state: Any, kinds: Mapping[str, type]) -> None:
    """Write `state` to a file that is there whole or not at all.

    Args:
        state: numbers, texts, tensors, dtypes, lists, tuples and dictionaries of such, and dataclasses.
        kinds: the dataclasses that may occur, by name.
    Raises:
        TypeError: something else occurs.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_written(state, {kind: name for name, kind in kinds.items()}, tensors))
    write(path, tensors, {"format": FORMAT, "state": text, "digest": NO_DIGEST})


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write tensors and texts to a file that is there whole or not at all.

    Args:
        metadata: it holds `NO_DIGEST` once, where the file's digest goes.
    Returns:
        the digest: SHA-256 of the file as it is with `NO_DIGEST`.
    """
    goal = Path(path)
    if goal.is_dir():
        raise ValueError(f"{os.fspath(path)} is a folder: allowed is a file, new or not")
    name = goal.with_name(f".{goal.name}.{uuid.uuid4().hex}")
    try:
        save_file(dict(tensors), name, dict(metadata))
        with open(name, "r+b") as file:
            header = _header(file.read(8), file)
            digest = _digest(name, header)
            file.seek(8 + header.index(NO_DIGEST.encode()))
            file.write(digest.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, goal)
    except BaseException:
        name.unlink(missing_ok=True)
        raise
    return digest


def load(path: str | os.PathLike[str], kinds: Mapping[str, type]) -> Any:
    """The state that was saved; tensors lie in the file until they are read.

    Raises:
        ValueError: a file of another kind, or one that is not as it was written.
    """
    try:
        with open(path, "rb") as file:
            header = _header(file.read(8), file)
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}")
            digest = metadata["digest"]
            if _digest(path, header.replace(digest.encode(), NO_DIGEST.encode())) != digest:
                raise ValueError("it was altered after it was written")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return _read(json.loads(metadata["state"]), kinds, tensors)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{os.fspath(path)} is no cache that can be read: {error}; allowed is {FORMAT!r}") from error


def _header(size: bytes, file: Any) -> bytes:
    length = int.from_bytes(size, "little")
    if len(size) < 8 or length > os.fstat(file.fileno()).st_size:
        raise ValueError("it is cut short, or no safetensors")
    return file.read(length)


def _digest(path: str | os.PathLike[str], header: bytes) -> str:
    """SHA-256 of the file with this header."""
    digest = hashlib.sha256(header)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for start in range(8 + len(header), len(mapped), _CHUNK):
            digest.update(mapped[start : start + _CHUNK])
    return digest.hexdigest()


def _written(x: Any, names: Mapping[type, str], tensors: dict[str, Tensor]) -> Any:
    """`x` as JSON, its tensors put aside by name."""
    if isinstance(x, Tensor):
        name = f"{len(tensors):06d}"
        tensors[name] = x.detach().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if type(x) in _PLAIN:
        return x
    if isinstance(x, torch.dtype):
        return {"dtype": str(x).removeprefix("torch.")}
    if type(x) in (list, tuple):
        return {type(x).__name__: [_written(part, names, tensors) for part in x]}
    if type(x) is dict:
        return {"dict": [[_written(part, names, tensors) for part in pair] for pair in x.items()]}
    if is_dataclass(x) and type(x) in names:
        stored = [field.name for field in fields(x) if field.name != "room"]  # buffers with room for more
        parts = {name: _written(getattr(x, name), names, tensors) for name in stored}
        return {"kind": names[type(x)], "fields": parts}
    raise TypeError(
        f"a {type(x).__name__} cannot be saved: allowed are numbers, texts, tensors and {sorted(names.values())}"
    )


def _read(x: Any, kinds: Mapping[str, type], tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(x, dict):
        return x
    if "tensor" in x:
        return tensors[x["tensor"]]
    if "dtype" in x:
        return _dtypes()[x["dtype"]]
    if "kind" in x:
        parts = {name: _read(part, kinds, tensors) for name, part in x["fields"].items()}
        return kinds[x["kind"]](**parts)
    if "dict" in x:
        return {_read(key, kinds, tensors): _read(value, kinds, tensors) for key, value in x["dict"]}
    ((name, parts),) = x.items()
    return {"list": list, "tuple": tuple}[name](_read(part, kinds, tensors) for part in parts)


def _dtypes() -> dict[str, torch.dtype]:
    return {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}
