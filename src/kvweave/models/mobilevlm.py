"""MobileVLM V2 as its authors publish it, 1.7B to 7B: CLIP's tower, the LDPv2 projector, MobileLLaMA or Vicuna.

transformers has no such model: `MobileVLMForConditionalGeneration` is LLaVA with another projector, known to the auto
classes once `kvweave.models` is imported. Arithmetic: Chu et al., MobileVLM V2, arXiv 2402.03766, section 3.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    PreTrainedConfig,
    ProcessorMixin,
)

from kvweave.models.published import DECODER, DECODER_OPTIONAL, Layout, local, pick, require
from kvweave.models.source import ModelError

_SIDE = 12  # an image is 12 x 12 tokens, whatever its size
_CLIP = "openai/clip-vit-large-patch14-336"
_CLIP_CONFIG = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 768,
}  # fmt: skip


class MobileVLMConfig(LlavaConfig):
    """LLaVA's options. The vocabulary has no free row: the placeholder's id is the one behind it."""

    model_type = "mobilevlm"


class LightweightDownsample(nn.Module):
    """LDPv2: two linear layers, pooling to 12 x 12, and a depthwise convolution that tells positions."""

    def __init__(self, config: MobileVLMConfig) -> None:
        super().__init__()
        wide, narrow = config.vision_config.hidden_size, config.text_config.hidden_size
        self.linear_1, self.linear_2 = nn.Linear(wide, narrow), nn.Linear(narrow, narrow)
        self.position = nn.Conv2d(narrow, narrow, 3, padding=1, groups=narrow)

    def forward(self, patches: Tensor) -> Tensor:
        """[images, side * side, wide] -> [images, 144, narrow]."""
        x = self.linear_2(F.gelu(self.linear_1(patches)))
        side = int(x.shape[1] ** 0.5)
        x = F.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, (side, side)), _SIDE)
        return (self.position(x) + x).flatten(2).transpose(1, 2)


class MobileVLMModel(LlavaModel):
    """LLaVA without a head, whose placeholder never reaches the embedding."""

    config_class = MobileVLMConfig

    def __init__(self, config: MobileVLMConfig) -> None:
        super().__init__(config)
        self.multi_modal_projector = LightweightDownsample(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **inputs: Any,
    ) -> Any:
        """As LLaVA's; images come as pixels, or encoded beforehand as `generate` does it.

        Raises:
            ValueError: placeholders and images' tokens are not equally many.
        """
        if input_ids is not None and inputs_embeds is None:
            visual = input_ids == self.config.image_token_id
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(visual, 0))
            states = (mm_encoder_outputs or {}).get("image")
            if states is None and pixel_values is not None:
                states = self.get_image_features(pixel_values, return_dict=True)
            if states is not None:
                features = torch.cat(list(states.pooler_output)).to(inputs_embeds)  # [images * 144, hidden]
                if int(visual.sum()) != len(features):
                    raise ValueError(
                        f"{int(visual.sum())} placeholders for {len(features)} tokens of images: allowed is one each"
                    )
                inputs_embeds = inputs_embeds.masked_scatter(visual[..., None], features)
        return super().forward(inputs_embeds=inputs_embeds, **inputs)


class MobileVLMForConditionalGeneration(LlavaForConditionalGeneration):
    """MobileVLM V2 with its language model's head."""

    config_class = MobileVLMConfig

    def __init__(self, config: MobileVLMConfig) -> None:
        super().__init__(config)
        self.model = MobileVLMModel(config)
        self.post_init()


AutoConfig.register("mobilevlm", MobileVLMConfig, exist_ok=True)
AutoModelForImageTextToText.register(MobileVLMConfig, MobileVLMForConditionalGeneration, exist_ok=True)


class MobileVLM(Layout):
    """MobileVLM V2's folders: a Llama's configuration with further keys, the vision tower inside the weights."""

    name = "MobileVLM V2"
    model = MobileVLMForConditionalGeneration

    def matches(self, config: Mapping[str, Any]) -> bool:
        """By its model type; what `kvweave convert` wrote has a `text_config` and is loaded by the auto classes."""
        return config.get("model_type") == "mobilevlm" and "text_config" not in config

    def config(self, folder: Path, published: Mapping[str, Any]) -> MobileVLMConfig:
        """The Llama's keys as `text_config`, CLIP's options as `vision_config`."""
        where = str(folder / "config.json")
        require(where, published, mm_projector_type="ldpnetv2", vision_tower_type=("clip", None))
        require(where, published, mm_use_im_start_end=(False, None), mm_use_im_patch_token=False)  # absent: True
        require(where, published, mm_vision_select_feature=("patch", None), rope_scaling=None)
        fields = pick(where, published, *DECODER, optional=DECODER_OPTIONAL)
        rope = {"rope_type": "default", "rope_theta": float(published.get("rope_theta", 10000.0))}
        vision = _tower(folder, published.get("mm_vision_tower"))
        require(where, published, mm_hidden_size=vision.hidden_size)
        return MobileVLMConfig(
            text_config=LlamaConfig(**fields, rope_parameters=rope, tie_word_embeddings=False),
            vision_config=vision,
            image_token_index=published["vocab_size"],
            image_seq_length=_SIDE**2,
            vision_feature_layer=pick(where, published, "mm_vision_select_layer")["mm_vision_select_layer"],
            vision_feature_select_strategy="default",  # without the class token
            tie_word_embeddings=False,
        )

    def stops(self, folder: Path, config: PreTrainedConfig) -> dict[str, Any]:
        """The Llama's; it pads with <unk> where it does not say."""
        text = config.text_config
        return {
            "bos_token_id": text.bos_token_id,
            "eos_token_id": text.eos_token_id,
            "pad_token_id": text.pad_token_id or 0,
        }

    def names(self, config: PreTrainedConfig) -> Sequence[tuple[str, str]]:
        """The tower lies two modules deep; some versions of transformers have one of them, too."""
        return (
            (r"model\.vision_tower\.(?:vision_model\.)?(.+)", r"model.vision_tower.vision_tower.vision_model.\1"),
            (r"model\.multi_modal_projector\.linear_1\.(\w+)", r"model.mm_projector.mlp.mlp.0.\1"),
            (r"model\.multi_modal_projector\.linear_2\.(\w+)", r"model.mm_projector.mlp.mlp.2.\1"),
            (r"model\.multi_modal_projector\.position\.(\w+)", r"model.mm_projector.peg.peg.0.\1"),
            (r"model\.language_model\.(.+)", r"model.\1"),
            (r"(lm_head\.weight)", r"\1"),
        )

    def processor(self, path: str | Path) -> ProcessorMixin:
        """Squares of 336 pixels, Vicuna's prompt, and its pieces tokenized one by one."""
        from kvweave.models.mobilevlm_processor import processor_of

        return processor_of(local(path))


def tower_folder(folder: Path, name: Any) -> Path | None:
    """Where a configuration's `mm_vision_tower` lies, as the folder sees it; None: it is the hub's.

    Raises:
        ModelError: neither a folder nor the tower that is known.
    """
    if name == _CLIP:
        return None
    if isinstance(name, str) and (folder / name / "config.json").is_file():
        return folder / name
    raise ModelError(
        f"{folder / 'config.json'} has mm_vision_tower={name!r}: allowed is {_CLIP}, or a folder with a config.json"
    )


def _tower(folder: Path, name: Any) -> CLIPVisionConfig:
    path = tower_folder(folder, name)
    return CLIPVisionConfig(**_CLIP_CONFIG) if path is None else CLIPVisionConfig.from_pretrained(path)
