"""The model: SmolLM2 in transformers' LLaVA class, with a small SigLIP tower, a projector and low-rank adapters.

A picture of 96 x 96 pixels becomes 36 visual tokens. Only the tower, the projector and the adapters are this
project's; `assemble` puts them and the language model together, the adapters added to its weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from kvweave.lab.smol.files import cache_folder, complete
from kvweave.lab.smol.language import language_folder
from kvweave.lab.smol.scenes import PATCH, SIDE

OWN = Path(__file__).with_name("weights") / "smol.safetensors"  # tower, projector, adapters
RANK = 32
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_ROOM = 64  # rows added to the vocabulary, the first of them for <image>; more keeps products of matrices aligned


def configuration(language: LlamaConfig) -> LlavaConfig:
    """Of the whole, around a language model's own."""
    text = language.to_dict() | {"vocab_size": language.vocab_size + _ROOM}
    vision = SiglipVisionConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    return LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text,
        image_token_index=language.vocab_size,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )


def create(language: LlamaForCausalLM, seed: int = 0) -> LlavaForConditionalGeneration:
    """The whole around a language model, in its dtype, with a tower and a projector by chance."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(configuration(language.config))
    weights = dict(language.model.state_dict())
    embedding = weights["embed_tokens.weight"]
    weights["embed_tokens.weight"] = torch.cat([embedding, embedding.new_zeros(_ROOM, embedding.shape[1])])
    model.model.language_model.load_state_dict(weights)
    model.tie_weights()
    model.generation_config = language.generation_config
    return model


class Adapters(nn.Module):
    """Low-rank additions to the attention's four projections, of all layers at once (LoRA, Hu et al. 2021).

    down: by projection [layers, rank, in]; up [layers, out, rank], zero at first.
    """

    SCALE = 2.0

    def __init__(self, language_model: nn.Module, rank: int = RANK, seed: int = 0) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(seed)
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name in PROJECTIONS:
            layers, out, fan_in = self._weights(language_model, name).shape
            self.down[name] = nn.Parameter(torch.randn(layers, rank, fan_in, generator=drawn) / fan_in**0.5)
            self.up[name] = nn.Parameter(torch.zeros(layers, out, rank))

    def merged(self, language_model: nn.Module) -> dict[str, Tensor]:
        """The projections' weights with the additions, by their names in the language model, in its dtype."""
        found = {}
        for name in PROJECTIONS:
            weights = self._weights(language_model, name)
            total = weights.float() + self.SCALE * torch.bmm(self.up[name], self.down[name])
            for layer, weight in enumerate(total.to(weights.dtype)):
                found[f"layers.{layer}.self_attn.{name}.weight"] = weight
        return found

    @staticmethod
    def _weights(language_model: Any, name: str) -> Tensor:
        return torch.stack([getattr(layer.self_attn, name).weight.detach() for layer in language_model.layers])


_PARTS = ("vision_tower", "multi_modal_projector")


def own_state(model: LlavaForConditionalGeneration, adapters: Adapters) -> dict[str, Tensor]:
    """What this project trains, by name."""
    found = {f"{part}.{name}": w for part in _PARTS for name, w in getattr(model.model, part).state_dict().items()}
    return found | {f"adapters.{name}": weight for name, weight in adapters.state_dict().items()}


def load_own_state(model: LlavaForConditionalGeneration, adapters: Adapters, state: Mapping[str, Tensor]) -> None:
    """Put what `own_state` gave into a model and its adapters."""
    for prefix, module in [*((part, getattr(model.model, part)) for part in _PARTS), ("adapters", adapters)]:
        mine = {name.removeprefix(f"{prefix}."): w for name, w in state.items() if name.startswith(f"{prefix}.")}
        module.load_state_dict(mine)


@torch.no_grad()
def assemble(language: LlamaForCausalLM, state: Mapping[str, Tensor]) -> LlavaForConditionalGeneration:
    """The whole, the adapters added to the language model's weights."""
    model = create(language)
    adapters = Adapters(model.model.language_model, rank=state["adapters.down.q_proj"].shape[1])
    load_own_state(model, adapters, state)
    merged = adapters.merged(model.model.language_model)
    model.model.language_model.load_state_dict(merged, strict=False)
    return model.eval()


def load_language(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The language model in a folder, as `language_folder` makes it."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype)


def model_folder() -> Path:
    """A folder for `from_pretrained` with the whole model and its processor; made when first asked for.

    Raises:
        SmolError: what it is made from is not installed.
    """
    folder = cache_folder() / f"smol-{hashlib.sha256(OWN.read_bytes()).hexdigest()[:8]}"
    if not folder.is_dir():
        language = language_folder()
        with complete(folder) as partial:
            write_model(partial, language, load_file(OWN))
    return folder


def write_model(folder: Path, language: Path, state: Mapping[str, Tensor]) -> None:
    """Write the whole and its processor to a folder: bfloat16 on disk, loaded in float32."""
    from kvweave.lab.smol.processor import create_processor

    model = assemble(load_language(language), state)
    weights = {name: w.to(torch.bfloat16) for name, w in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=weights)
    create_processor(language).save_pretrained(folder)
