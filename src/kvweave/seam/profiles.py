"""Which model a profile of heads' shares belongs to (`kvweave.methods.allocation.Profile`)."""

import hashlib
import json

import torch
from transformers import PreTrainedModel

from kvweave.methods.allocation import SHIPPED, Profile
from kvweave.methods.base import Method

_SAMPLES = 16  # numbers of each weight that tell models apart
_SHAPES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


def model_mark(model: PreTrainedModel) -> str:
    """What tells a model from others in whatever dtype it was loaded: its class, its shapes, some of its weights."""
    config = model.config.get_text_config(decoder=True)
    shapes = {name: getattr(config, name, None) for name in _SHAPES}
    mark = hashlib.sha256(json.dumps([type(model).__name__, shapes]).encode())
    for name, weight in model.named_parameters():
        mark.update(f"{name} {tuple(weight.shape)}".encode())
        if weight.device.type != "meta" and weight.numel():
            some = weight.detach().reshape(-1)[:: max(1, weight.numel() // _SAMPLES)]
            mark.update(some.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return mark.hexdigest()[:16]


def working(method: Method, model: PreTrainedModel) -> Method:
    """The method as it works on this model, with the profile that is shipped for it if there is one."""
    return method.on_model(lambda: shipped_for(model)).searching()


def shipped_for(model: PreTrainedModel) -> str | None:
    """The name of the profile that is shipped for a model, or None."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    shape = getattr(config, "num_hidden_layers", None), heads
    read = {file.stem: Profile.read(file.stem) for file in sorted(SHIPPED.glob("*.json"))}
    alike = {name: profile.fingerprint for name, profile in read.items() if profile.shape == shape}
    mark = model_mark(model) if alike else None
    return next((name for name, fingerprint in alike.items() if fingerprint == mark), None)


def check_profiles(method: Method, model: PreTrainedModel) -> None:
    """Refuse a profile that was made with another model.

    Raises:
        ValueError: it was, or cannot be read.
    """
    for path in method.profiles:
        mark, own = Profile.read(path).fingerprint, model_mark(model)
        if mark != own:
            raise ValueError(
                f"profile={path!r} was made with another model ({mark}, and this {type(model).__name__} is {own}): "
                "allowed is this model's own, which kvweave calibrate makes"
            )
