"""Checkpoints in layouts of their publishers' own, which transformers does not read; no code of theirs is run.

    model = kvweave.models.from_published("InternVL2_5-8B")
    processor = kvweave.models.processor_from_published("InternVL2_5-8B")

A layout says what its `config.json` comes to and which published tensor holds each tensor of transformers' model;
all that is read, checked and refused is here.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from kvweave.models import weights
from kvweave.models.loading import DTYPES, refusals
from kvweave.models.source import ModelError

#: What a decoder's configuration must say, and what it may.
DECODER = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
DECODER_OPTIONAL = ("num_key_value_heads", "hidden_act", "initializer_range", "bos_token_id", "eos_token_id",
                    "pad_token_id")  # fmt: skip
_DERIVED = ("position_ids", "rotary_emb.inv_freq")  # old files hold these, the model computes them


class Layout(ABC):
    """One publisher's folders.

    Attributes:
        name: for people.
        model: transformers' class, or one of ours, that computes what the publisher's code does.
    """

    name: str
    model: type[PreTrainedModel]

    @abstractmethod
    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether a folder with this `config.json` is one of them."""

    @abstractmethod
    def config(self, folder: Path, published: Mapping[str, Any]) -> PreTrainedConfig:
        """The model's configuration; `image_token_id` is the visual placeholder."""

    @abstractmethod
    def stops(self, folder: Path, config: PreTrainedConfig) -> dict[str, Any]:
        """`bos_token_id`, `eos_token_id` and `pad_token_id` that the publisher's code generates with."""

    @abstractmethod
    def names(self, config: PreTrainedConfig) -> Sequence[tuple[str, str]]:
        """From the model's tensors to the published ones: patterns of whole names, and what they expand to."""

    @abstractmethod
    def processor(self, path: str | Path) -> ProcessorMixin:
        """Pictures and messages to the model's inputs, as the publisher's code makes them."""

    def part(self, name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
        """The model's tensor `name` out of the published one that holds it."""
        return tensor

    def load(
        self, path: str | Path, dtype: str | torch.dtype | None = None, attn_implementation: str | None = None
    ) -> PreTrainedModel:
        """The model of a folder; see `from_published`."""
        folder = local(path)
        published = weights.read_json(folder / "config.json")
        config = self.config(folder, published)
        state = self._state(folder, config, weights.read(folder))
        chosen = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        kind = _dtype(dtype) or _dtype(published.get("torch_dtype")) or next(iter(state.values())).dtype
        model = self.model.from_pretrained(None, config=config, state_dict=state, dtype=kind, **chosen)
        model.generation_config = GenerationConfig(**self.stops(folder, config))  # greedy
        return model.eval()

    def skeleton(self, path: str | Path, dtype: str | torch.dtype | None = None) -> PreTrainedModel:
        """The model on torch's meta device, from `config.json` alone."""
        folder = local(path)
        published = weights.read_json(folder / "config.json")
        kind = _dtype(dtype) or _dtype(published.get("torch_dtype")) or torch.float32
        with torch.device("meta"):
            return self.model._from_config(self.config(folder, published), dtype=kind)

    def _state(self, folder: Path, config: PreTrainedConfig, published: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors, as far as can be views of the published ones."""
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in self.model(config).state_dict().items()}
        holders: dict[str, list[str]] = {}
        for name in shapes:
            holders.setdefault(_renamed(name, self.names(config)), []).append(name)
        for name in published:
            if name not in holders and not name.endswith(_DERIVED):
                raise ModelError(f"{folder} holds a tensor {name!r} that {self.name} has no place for")
        state = {}
        for source, names in holders.items():
            if source not in published:
                raise ModelError(f"{folder} holds no tensor {source!r}, which {self.name} needs")
            tensor = published.pop(source)
            expected = [sum(shapes[name][0] for name in names), *shapes[names[0]][1:]]
            if list(tensor.shape) != expected:
                raise ModelError(
                    f"{folder}: {source} has shape {list(tensor.shape)}, config.json makes it {expected}"
                )
            for name in names:
                state[name] = self.part(name, tensor, config)
        return state


def layouts() -> tuple[Layout, ...]:
    """All that can be read."""
    from kvweave.models.internvl import InternVL
    from kvweave.models.mobilevlm import MobileVLM

    return InternVL(), MobileVLM()


def layout_of(config: Mapping[str, Any]) -> Layout | None:
    """The layout of a folder with this `config.json`; None: not a published one, transformers may know it."""
    return next((layout for layout in layouts() if layout.matches(config)), None)


def from_published(
    folder: str | Path, dtype: str | torch.dtype | None = None, attn_implementation: str | None = None
) -> PreTrainedModel:
    """The model of a published folder of InternVL2.5 or MobileVLM V2, its weights alone, ready to generate.

    Weights are mapped from their files and are not held twice: a tensor that keeps its dtype and layout stays a view
    of the file until it is moved, so leave the file as it is for as long as the model lives.

    Args:
        dtype: "float32", "bfloat16", "float16" or torch's; None or "auto": as `config.json` says.
        attn_implementation: as transformers' `from_pretrained` takes it.
    Raises:
        ModelError: another layout, an option of it that is not known, a tensor that is missing, spare or misshapen
            (`position_ids` and `rotary_emb.inv_freq` may be there), a file that is damaged; one line says which.
    """
    with refusals(str(folder), attn_implementation or "auto"):
        return _known(folder).load(folder, dtype, attn_implementation)


def processor_from_published(folder: str | Path) -> ProcessorMixin:
    """The processor of a published folder: tokenizer, chat template and pictures as the publisher's code has them.

    Raises:
        ModelError: another layout, or tokenizer files that are missing or unknown; one line says which.
    """
    with refusals(str(folder)):
        return _known(folder).processor(folder)


def local(path: str | Path) -> Path:
    """A folder as it is; a hub's id as the folder that its files are kept in, fetched where they are not there."""
    if Path(path).is_dir():
        return Path(path)
    kinds = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt"]  # no code
    return Path(snapshot_download(str(path), allow_patterns=kinds))


def require(where: str, values: Mapping[str, Any], **allowed: Any) -> None:
    """Refuse a configuration whose options are not these; a set allows any of its members.

    Raises:
        ModelError: it names the option, its value and what is allowed.
    """
    for name, choice in allowed.items():
        choices = choice if isinstance(choice, (set, tuple)) else (choice,)
        if values.get(name) not in choices:
            listed = " or ".join(map(repr, choices))
            raise ModelError(f"{where} has {name}={values.get(name)!r}: allowed is {listed}")


def pick(where: str, values: Mapping[str, Any], *names: str, optional: Sequence[str] = ()) -> dict[str, Any]:
    """These entries of a configuration; `optional` ones if they are there.

    Raises:
        ModelError: one is missing.
    """
    for name in names:
        if values.get(name) is None:
            raise ModelError(f"{where} has no {name}")
    return {name: values[name] for name in (*names, *optional) if values.get(name) is not None}


def _known(folder: str | Path) -> Layout:
    config = weights.read_json(Path(folder) / "config.json")
    layout = layout_of(config)
    if layout is None:
        listed = " or ".join(layout.name for layout in layouts())
        raise ModelError(
            f"{folder} is a folder of model_type={config.get('model_type')!r} in no known layout of a publisher's: "
            f"allowed is {listed}; what transformers knows, its auto classes load"
        )
    return layout


def _renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, expansion in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(expansion)
    import transformers

    raise ModelError(f"transformers {transformers.__version__} has a tensor {name!r} that kvweave has no name for")


def _dtype(value: Any) -> torch.dtype | None:
    if value is None or value == "auto" or isinstance(value, torch.dtype):
        return None if value == "auto" else value
    if value not in DTYPES:
        raise ModelError(f"dtype={value!r} is not allowed: allowed is one of {', '.join(DTYPES)}", "dtype")
    return getattr(torch, value)
