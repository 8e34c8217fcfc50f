"""From a name to where a checkpoint lies: an embedded model, a folder, or the hub, if it can be reached."""

import difflib
import functools
import hashlib
import re
from pathlib import Path
from typing import Any

LAB = "lab"
LABS = {LAB: "weights", "lab-large": "weights_large"}  # folders of the embedded models
SMOL = ("smol", "smol-text")  # put together on this machine from what a package index has

_ALLOWED = (
    "lab, lab-large, smol, smol-text, a folder with a checkpoint, or an id of the Hugging Face hub such as owner/name"
)
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
_PATIENCE = 5.0  # seconds that the hub has for an answer
_DECIDE = (
    ".safetensors",
    ".bin",
    ".json",
    ".jinja",
    ".model",
    ".txt",
)  # files of a checkpoint that answers depend on
_HEAD = 2**24  # bytes of a file that tell it apart


class ModelError(ValueError):
    """A model that cannot be had; the message says which, and what is allowed.

    Attributes:
        option: what is at fault: "model", "dtype", "device", "attention", "weights" or "images".
    """

    def __init__(self, message: str, option: str = "model") -> None:
        super().__init__(message)
        self.option = option


def check(model: str, *, weights: bool = True) -> str:
    """What `from_pretrained` is to be given for `model`; needs neither torch nor transformers, but for smol.

    The first time that smol or smol-text is asked for, it is put together in the user's cache folder.

    Args:
        weights: whether a folder has to hold them, too.
    Raises:
        ModelError: a folder that does not exist or holds no checkpoint, a name that no checkpoint can have, or smol
            without what it is made from.
    """
    if model in LABS:
        return str(Path(__file__).parent.parent / "lab" / LABS[model])
    if model in SMOL:
        return _smol(model)
    folder = Path(model).expanduser()
    if _is(folder, "is_dir"):
        if not (folder / "config.json").is_file():
            raise ModelError(f"model={model!r} is a folder without config.json: allowed is {_ALLOWED}")
        if weights and not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
            raise ModelError(
                f"model={model!r} is a folder without weights (*.safetensors, pytorch_model*.bin): "
                f"allowed is {_ALLOWED}"
            )
        return str(folder)
    if _is(folder, "exists"):
        raise ModelError(f"model={model!r} is a file, not a folder: allowed is {_ALLOWED}")
    if not _ID.fullmatch(model):
        near = difflib.get_close_matches(model, (*LABS, *SMOL), n=1, cutoff=0.6)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ModelError(f"model={model[:200]!r} does not exist{hint}: allowed is {_ALLOWED}")
    return model


def _smol(model: str) -> str:
    from kvweave.lab import smol

    try:
        return str(smol.model_folder() if model == "smol" else smol.language_folder())
    except smol.SmolError as error:
        raise ModelError(f"model={model!r} cannot be had: {error}") from error


def _is(path: Path, what: str) -> bool:
    try:
        return bool(getattr(path, what)())
    except (OSError, ValueError):  # a name that no file can have
        return False


def locate(model: str, *, weights: bool = True) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` is to be given, and with which keywords: on the hub, or in this machine's copies of it.

    Args:
        weights: whether a folder has to hold them, too.

    Raises:
        ModelError: there is no such model on the hub, or it cannot be reached and there is no copy.
    """
    path = check(model, weights=weights)
    if Path(path).is_dir():
        return path, {}
    why = _unreached(path)
    if not why:
        return path, {}
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(path, "config.json"), str):
        raise ModelError(f"model={model!r} is not on this machine, and the hub cannot be reached ({why})")
    return path, {"local_files_only": True}


@functools.cache
def _unreached(name: str) -> str:
    """Why the hub does not answer, asked once and not again and again; empty: it does.

    Raises:
        ModelError: it answers that there is no such model.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=_PATIENCE)
    except GatedRepoError:
        raise ModelError(
            f"model={name!r} is gated: allowed is a model whose terms your account has accepted"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(f"model={name!r} is not on the hub, or is private: allowed is {_ALLOWED}") from None
    except Exception as error:  # whatever lies between this machine and the hub
        return first_line(error)
    return ""


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def checkpoint_mark(model: str) -> str:
    """Changes with a checkpoint: a mark of a local folder's weights, tokenizer and templates, or a hub id's commit.

    Raises:
        ModelError: a hub id that cannot be found.
    """
    path, keywords = locate(model)
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(path, "config.json", **keywords)).parent.name  # a folder for each commit
        except (OSError, ValueError) as error:
            raise ModelError(f"model={model!r} is not found on the hub: {first_line(error)}") from None
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.suffix in _DECIDE):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(_HEAD))
    return digest.hexdigest()[:12]
