"""Tensors of a checkpoint's folder by name, mapped from its files: nothing is read before it is used."""

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kvweave.models.source import ModelError

_FILES = ("model.safetensors", "pytorch_model.bin")  # one file, or many beside an index, in this order
_UNREADABLE = (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError)


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's weights, on the CPU, shard by shard.

    Raises:
        ModelError: no weights, or a file that is missing, damaged or holds something else; the message names it.
    """
    weights: dict[str, Tensor] = {}
    for file in _shards(folder):
        tensors = _tensors(file)
        twice = weights.keys() & tensors.keys()
        if twice:
            raise ModelError(f"{file} holds {min(twice)!r} again: allowed is each tensor once")
        weights |= tensors
    return weights


def read_json(file: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        ModelError: it is missing, or is no such thing.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read ({type(error).__name__}): allowed is a JSON object") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds a {type(content).__name__}: allowed is a JSON object")
    return content


def _shards(folder: Path) -> list[Path]:
    for name in _FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = read_json(index).get("weight_map")
            names = sorted(set(map(str, shards.values()))) if isinstance(shards, Mapping) else []
            if not names or any(Path(shard).name != shard for shard in names):  # "../" would leave the folder
                raise ModelError(f"{index} has no weight_map from tensors to the names of files beside it")
            for shard in names:
                if not (folder / shard).is_file():
                    raise ModelError(f"{folder / shard} is missing, which {index.name} names")
            return [folder / shard for shard in names]
        if (folder / name).is_file():
            return [folder / name]
    raise ModelError(f"{folder} holds no weights: allowed is {' or '.join(_FILES)}, or their shards with an index")


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except _UNREADABLE as error:
        raise ModelError(
            f"{file} is damaged, cut short, or holds more than tensors ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no more is known'})"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ModelError(f"{file} holds a {type(tensors).__name__}: allowed is a dictionary of tensors")
    return tensors
