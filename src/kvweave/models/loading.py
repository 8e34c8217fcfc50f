"""From a name to a model and its processor: by a publisher's layout if it is in one, else by the auto classes."""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvweave.models.source import LAB, LABS, ModelError, first_line, locate

if TYPE_CHECKING:
    import torch

    from kvweave.models.published import Layout

DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3")


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
        there = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
        raise ModelError(
            f"device={device[:200]!r} is not available: allowed is auto or one of {', '.join(there)}", "device"
        ) from None
    return device


def load(
    model: str = LAB,
    dtype: "str | torch.dtype" = "auto",
    device: str = "auto",
    attention: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A model, ready to generate, and its processor.

    A checkpoint that reads text only comes with its tokenizer in the processor's place (see `reads_images`).

    Args:
        model: a hub's id, a folder, "lab", "lab-large", "smol" or "smol-text".
        dtype: of the weights, a name or torch's own; "auto": as the checkpoint has them.
        device: "auto": CUDA where there is one.
        attention: "sdpa", "eager" or a flash attention; "auto": what transformers picks, sdpa where the model has it.
        trust_remote_code: run the code that a checkpoint brings along, if it needs it; it can do anything.
    Raises:
        ModelError: it cannot be had; one line says why.
    """
    dtype = str(dtype).removeprefix("torch.")
    _check_choice("dtype", dtype, DTYPES)
    _check_choice("attention", attention, ATTENTIONS)
    device = pick_device(device)
    path, where = locate(model)
    keywords = {**where, "trust_remote_code": trust_remote_code}
    chosen = {} if attention == "auto" else {"attn_implementation": attention}
    if model in LABS:
        import kvweave.lab  # noqa: F401  AutoProcessor finds the lab's processor once this is imported

    with refusals(model, attention):
        layout = _layout(path, where)
        if layout is not None:
            processor, loaded = layout.processor(path), layout.load(path, dtype, **chosen)
        else:
            kind, reader = _kinds(model, path, keywords)
            processor = reader.from_pretrained(path, **keywords)
            loaded, report = kind.from_pretrained(path, dtype=dtype, output_loading_info=True, **chosen, **keywords)
            _check_missing(model, loaded, report)
        loaded = loaded.to(device).eval()
        _check_numbers(model, loaded)
        return loaded, processor


def load_tokenizer(model: str) -> Any:
    """A model's tokenizer alone.

    Raises:
        ModelError: it cannot be had.
    """
    from transformers import AutoTokenizer

    path, where = locate(model)
    with refusals(model):
        layout = _layout(path, where)
        if layout is not None:
            return layout.processor(path).tokenizer
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **where)


def skeleton(model: str, dtype: str = "auto", trust_remote_code: bool = False) -> Any:
    """A model on torch's meta device, whose tensors have shapes and no contents, from its `config.json` alone.

    Raises:
        ModelError: it cannot be had; one line says why.
    """
    import torch
    from transformers import AutoConfig

    _check_choice("dtype", dtype, DTYPES)
    path, where = locate(model, weights=False)
    keywords = {**where, "trust_remote_code": trust_remote_code}
    with refusals(model):
        layout = _layout(path, where)
        if layout is not None:
            return layout.skeleton(path, dtype).eval()
        kind, _ = _kinds(model, path, keywords)
        config = AutoConfig.from_pretrained(path, **keywords)
        stored = config.dtype or config.get_text_config().dtype or torch.float32
        with torch.device("meta"):
            return kind.from_config(config, dtype=stored if dtype == "auto" else getattr(torch, dtype)).eval()


def _layout(path: str, where: dict[str, Any]) -> "Layout | None":
    """The publisher's layout that a checkpoint is in, by its `config.json`."""
    from transformers import PreTrainedConfig

    from kvweave.models.published import layout_of

    return layout_of(PreTrainedConfig.get_config_dict(path, **where)[0])


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ModelError(f"{name}={value!r} is not allowed: allowed is one of {', '.join(allowed)}", name)


def _kinds(model: str, path: str, keywords: dict[str, Any]) -> tuple[Any, Any]:
    """The auto classes of the model and of what reads its prompts."""
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

    config = AutoConfig.from_pretrained(path, **keywords)
    remote = getattr(config, "auto_map", None) or {} if keywords["trust_remote_code"] else {}
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or "AutoModelForImageTextToText" in remote:
        return AutoModelForImageTextToText, AutoProcessor
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in remote:
        return AutoModelForCausalLM, AutoTokenizer
    raise ModelError(
        f"model={model!r} is a {config.model_type} checkpoint, which generates no text from images or text: "
        "allowed is what AutoModelForImageTextToText or AutoModelForCausalLM loads"
    )


def _check_missing(model: str, loaded: Any, report: dict[str, Any]) -> None:
    """Refuse a checkpoint without some of its weights, which transformers draws at random."""
    missing = sorted(set(report["missing_keys"]) & {name for name, _ in loaded.named_parameters()})
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"model={model!r} lacks the weight {missing[0]}{more}: allowed is a whole checkpoint")


def _check_numbers(model: str, loaded: Any) -> None:
    """Refuse weights that are no numbers."""
    for name, weight in loaded.named_parameters():
        if weight.numel() and weight.is_floating_point() and weight.element_size() > 1:
            ends = weight.detach().aminmax()  # one pass, and NaN comes through
            if not all(math.isfinite(end.item()) for end in ends):
                raise ModelError(
                    f"model={model!r}: its weight {name} holds NaN or infinity: allowed is finite numbers"
                )


@contextmanager
def refusals(model: str, attention: str = "auto") -> Iterator[None]:
    """What transformers raises, as one line that says what is at fault."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # whatever a checkpoint holds, transformers may raise
        text, why = str(error), first_line(error)
        if "trust_remote_code" in text:
            raise ModelError(
                f"model={model!r} needs code that it brings along, which would run on this machine: allowed, once "
                "you have read it, is --trust-remote-code (trust_remote_code=True)"
            ) from error
        if (fault := _torchvision_fault()) is not None:
            raise ModelError(f"model={model!r} cannot be loaded: {fault}") from error
        if isinstance(error, ImportError) and "torchvision" in text.lower():
            raise ModelError(
                f"model={model!r} has a processor that needs torchvision: pip install 'kvweave[vision]'{_index()}"
            ) from error
        if attention != "auto" and ("flash" in text.lower() or attention in text):
            raise ModelError(f"attention={attention!r} is not available: {why}", "attention") from error
        raise ModelError(f"model={model!r} cannot be loaded: {why}") from error


def _torchvision_fault() -> str | None:
    """Why an installed torchvision cannot be imported, and the cure: it is built for one torch, from one index."""
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return None
    except Exception as error:  # a build for another torch fails with whatever its loader says
        import torch

        return (
            f"torchvision does not fit torch {torch.__version__} ({first_line(error)}): install both from one index, "
            f"pip install --force-reinstall torch torchvision{_index()}"
        )
    return None


def _index() -> str:
    """What pip needs besides, so that a CPU build of torch stays one."""
    import torch

    cpu = torch.__version__.endswith("+cpu")
    return " --extra-index-url https://download.pytorch.org/whl/cpu" if cpu else ""


@functools.cache
def quiet() -> None:
    """Keep transformers' bars and hints off the terminal; errors come as exceptions."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@contextmanager
def no_bars() -> Iterator[None]:
    """Without transformers' bars, which would be drawn through a caller's own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
