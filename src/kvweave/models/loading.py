"""From a name to a model and its processor: a hub's id, a folder, or `lab`, all by transformers' auto classes."""

import os
from pathlib import Path
from typing import Any

LAB = "lab"
LABS = {LAB: "weights", "lab-large": "weights_large"}  # folders of the embedded models
DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("auto", "sdpa", "eager")

_ALLOWED = "lab, lab-large, a folder with a checkpoint, or an id of the Hugging Face hub"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")


class ModelError(ValueError):
    """A model that cannot be had; the message says which, and what is allowed."""


def check(model: str) -> str:
    """What `from_pretrained` is to be given for `model`; needs neither torch nor transformers.

    Raises:
        ModelError: a folder that does not exist, or that holds no checkpoint.
    """
    if model in LABS:
        return str(Path(__file__).parent.parent / "lab" / LABS[model])
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model={model!r} is a folder without config.json: allowed is {_ALLOWED}")
        if not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
            raise ModelError(
                f"model={model!r} is a folder without weights (*.safetensors, pytorch_model*.bin): "
                f"allowed is {_ALLOWED}"
            )
        return str(folder)
    parts = model.split("/")
    named = len(parts) <= 2 and all(part and part.strip(".~ ") for part in parts) and os.sep != "\\"
    if not named or folder.exists():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ModelError(f"model={model!r} {what}: allowed is {_ALLOWED}")
    return model


def pick_device(device: str) -> str:
    """The device to run on: `device`, or with "auto" CUDA where there is one.

    Raises:
        ModelError: there is no such device.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        found = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
        raise ModelError(
            f"device={device!r} is not available: allowed is auto or one of {', '.join(found)}"
        ) from None
    return device


def load(model: str = LAB, dtype: str = "auto", device: str = "auto", attention: str = "auto") -> tuple[Any, Any]:
    """A model, ready to generate, and its processor.

    A checkpoint that reads text only comes with its tokenizer in the processor's place (see `reads_images`).

    Args:
        model: a hub's id, a folder, "lab" or "lab-large".
        dtype: of the weights; "auto": as the checkpoint has them.
        device: "auto": CUDA where there is one.
        attention: "sdpa" or "eager"; "auto": what transformers picks, sdpa where the model has it.
    Raises:
        ModelError: it cannot be had; one line says why.
    """
    path = check(model)
    for name, value, allowed in (("dtype", dtype, DTYPES), ("attention", attention, ATTENTIONS)):
        if value not in allowed:
            raise ModelError(f"{name}={value!r} is not allowed: allowed is one of {', '.join(allowed)}")
    device = pick_device(device)
    chosen = {} if attention == "auto" else {"attn_implementation": attention}

    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    if model in LABS:
        import kvweave.lab  # noqa: F401  AutoProcessor finds the lab's processor once this is imported

    try:
        config = AutoConfig.from_pretrained(path)
        kinds: tuple[Any, Any] | None = None
        if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            kinds = AutoModelForImageTextToText, AutoProcessor
        elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            kinds = AutoModelForCausalLM, AutoTokenizer
        if kinds is None:
            raise ModelError(
                f"model={model!r} is a {config.model_type} checkpoint, which generates no text from images or text: "
                "allowed is what AutoModelForImageTextToText or AutoModelForCausalLM loads"
            )
        processor = kinds[1].from_pretrained(path)
        loaded = kinds[0].from_pretrained(path, dtype=dtype, **chosen)
    except ModelError:
        raise
    except ImportError as error:
        if "torchvision" in str(error).lower():
            raise ModelError(
                f"model={model!r} has a processor that needs torchvision: pip install 'kvweave[vision]'"
            ) from error
        raise ModelError(f"model={model!r} cannot be loaded: {_first_line(error)}") from error
    except Exception as error:  # whatever a checkpoint holds, transformers may raise
        raise ModelError(f"model={model!r} cannot be loaded: {_first_line(error)}") from error
    return loaded.to(device).eval(), processor


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
