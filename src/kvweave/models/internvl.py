"""InternVL2.5 as OpenGVLab publishes it, 1B to 78B, loaded into transformers' own InternVL classes.

Its language model is InternLM2, with queries, keys and values packed into one tensor, or Qwen2; its vision tower is
InternViT of 300 million or 6 billion parameters.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    PreTrainedConfig,
    ProcessorMixin,
    Qwen2Config,
)

from kvweave.models import tokens
from kvweave.models.published import DECODER, DECODER_OPTIONAL, Layout, local, pick, require
from kvweave.models.source import ModelError

CONTEXT, END = "<IMG_CONTEXT>", "<|im_end|>"
_FROM_THE_END = 7  # <img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box> end the vocabulary

_SLIDING = ("use_sliding_window", "sliding_window", "max_window_layers")
_VIT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")

_TOWER, _LAYER = r"model\.vision_tower\.", r"model\.vision_tower\.encoder\.layer\.(\d+)\."
_VISION_NAMES = (
    (_TOWER + r"embeddings\.cls_token", "vision_model.embeddings.class_embedding"),
    (_TOWER + r"embeddings\.position_embeddings", "vision_model.embeddings.position_embedding"),
    (_TOWER + r"embeddings\.patch_embeddings\.projection\.(\w+)", r"vision_model.embeddings.patch_embedding.\1"),
    (_LAYER + r"lambda_([12])", r"vision_model.encoder.layers.\1.ls\2"),
    (_LAYER + r"layernorm_before\.(\w+)", r"vision_model.encoder.layers.\1.norm1.\2"),
    (_LAYER + r"layernorm_after\.(\w+)", r"vision_model.encoder.layers.\1.norm2.\2"),
    (_LAYER + r"attention\.[qkv]_proj\.(\w+)", r"vision_model.encoder.layers.\1.attn.qkv.\2"),
    (_LAYER + r"attention\.([qk]_norm)\.(\w+)", r"vision_model.encoder.layers.\1.attn.\2.\3"),
    (_LAYER + r"attention\.projection_layer\.(\w+)", r"vision_model.encoder.layers.\1.attn.proj.\2"),
    (_LAYER + r"mlp\.(fc[12])\.(\w+)", r"vision_model.encoder.layers.\1.mlp.\2.\3"),
    (r"model\.multi_modal_projector\.layer_norm\.(\w+)", r"mlp1.0.\1"),
    (r"model\.multi_modal_projector\.linear_1\.(\w+)", r"mlp1.1.\1"),
    (r"model\.multi_modal_projector\.linear_2\.(\w+)", r"mlp1.3.\1"),
)
_BLOCK = r"model\.language_model\.layers\.(\d+)\."
_INTERNLM2_NAMES = (
    (r"model\.language_model\.embed_tokens\.weight", "language_model.model.tok_embeddings.weight"),
    (r"lm_head\.weight", "language_model.output.weight"),
    (_BLOCK + r"self_attn\.[qkv]_proj\.(\w+)", r"language_model.model.layers.\1.attention.wqkv.\2"),
    (_BLOCK + r"self_attn\.o_proj\.(\w+)", r"language_model.model.layers.\1.attention.wo.\2"),
    (_BLOCK + r"mlp\.gate_proj\.(\w+)", r"language_model.model.layers.\1.feed_forward.w1.\2"),
    (_BLOCK + r"mlp\.up_proj\.(\w+)", r"language_model.model.layers.\1.feed_forward.w3.\2"),
    (_BLOCK + r"mlp\.down_proj\.(\w+)", r"language_model.model.layers.\1.feed_forward.w2.\2"),
    (_BLOCK + r"input_layernorm\.(\w+)", r"language_model.model.layers.\1.attention_norm.\2"),
    (_BLOCK + r"post_attention_layernorm\.(\w+)", r"language_model.model.layers.\1.ffn_norm.\2"),
    (r"model\.language_model\.norm\.weight", "language_model.model.norm.weight"),
)
_QWEN2_NAMES = (
    (r"model\.language_model\.(.+)", r"language_model.model.\1"),
    (r"lm_head\.weight", "language_model.lm_head.weight"),
)


class InternVL(Layout):
    """InternVL2.5's folders: InternViT, a projector, and InternLM2 or Qwen2."""

    name = "InternVL2.5"
    model = InternVLForConditionalGeneration

    def matches(self, config: Mapping[str, Any]) -> bool:
        """By its own model type, which no class of transformers' has."""
        return config.get("model_type") == "internvl_chat"

    def config(self, folder: Path, published: Mapping[str, Any]) -> InternVLConfig:
        """transformers' configuration of the same arithmetic; the head's weights are never the embedding's."""
        where = str(folder / "config.json")
        require(where, published, ps_version="v2", use_backbone_lora=(0, None), use_llm_lora=(0, None))
        require(where, published, pad2square=(False, None))
        parts = pick(where, published, "llm_config", "vision_config")
        vision = _vision(f"{where}: vision_config", parts["vision_config"])
        require(where, published, force_image_size=(vision.image_size[0], None))
        text = _text(f"{where}: llm_config", parts["llm_config"])
        ratio = published.get("downsample_ratio", 0.5)
        return InternVLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=self._image_token(folder, text.vocab_size),
            image_seq_length=int((vision.image_size[0] // vision.patch_size[0]) ** 2 * ratio**2),
            downsample_ratio=ratio,
            vision_feature_layer=published.get("select_layer", -1),
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        )

    def stops(self, folder: Path, config: PreTrainedConfig) -> dict[str, Any]:
        """A turn ends with <|im_end|>, not with the end of a text."""
        text = config.text_config
        end = tokens.special_ids(folder).get(END, text.eos_token_id)
        pad = text.pad_token_id if text.pad_token_id is not None else text.eos_token_id
        return {"bos_token_id": text.bos_token_id, "eos_token_id": end, "pad_token_id": pad}

    def names(self, config: PreTrainedConfig) -> Sequence[tuple[str, str]]:
        """The tower's and the projector's names, and the language model's."""
        return (*_VISION_NAMES, *(_INTERNLM2_NAMES if config.text_config.model_type == "llama" else _QWEN2_NAMES))

    def part(self, name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
        """Queries, keys or values of a packed tensor.

        The tower stacks them. InternLM2 packs each KV head's query heads, then its key, then its value:
        [kv_heads, groups + 2, head_dim, ...].
        """
        match = re.search(r"\.([qkv])_proj\.", name)
        text = config.text_config
        if match and name.startswith("model.vision_tower."):
            return tensor.chunk(3)["qkv".index(match[1])]
        if match and text.model_type == "llama":
            groups = text.num_attention_heads // text.num_key_value_heads
            packed = tensor.unflatten(0, (text.num_key_value_heads, groups + 2, -1))
            chosen = {"q": slice(groups), "k": slice(groups, groups + 1), "v": slice(groups + 1, None)}[match[1]]
            return packed[:, chosen].flatten(0, 2)
        return tensor

    def processor(self, path: str | Path) -> ProcessorMixin:
        """Tiles of 448 pixels, a system turn always, and the language model's tokenizer."""
        from kvweave.models.internvl_processor import processor_of

        return processor_of(local(path))

    @staticmethod
    def _image_token(folder: Path, vocabulary: int) -> int:
        """The placeholder, from the tokenizer's files; of weights that lie alone by its place in the vocabulary."""
        ids = tokens.special_ids(folder)
        token = ids.get(CONTEXT) if ids else vocabulary - _FROM_THE_END
        if token is None or not 0 <= token < vocabulary:
            raise ModelError(f"{folder}: {CONTEXT} has id {token} in a vocabulary of {vocabulary}")
        return token


def _text(where: str, llm: Mapping[str, Any]) -> PreTrainedConfig:
    kind = (llm.get("architectures") or [None])[0]
    require(where, {"architectures[0]": kind}, **{"architectures[0]": ("InternLM2ForCausalLM", "Qwen2ForCausalLM")})
    fields = pick(where, llm, *DECODER, optional=DECODER_OPTIONAL)
    fields |= {"rope_parameters": _rope(where, llm), "tie_word_embeddings": False}
    if kind == "InternLM2ForCausalLM":
        return LlamaConfig(**fields, attention_bias=bool(llm.get("bias", True)), mlp_bias=False)
    return Qwen2Config(**fields, **pick(where, llm, optional=_SLIDING))


def _rope(where: str, llm: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary embedding, with the scaling that the file asks for (of Qwen2's the code of its time took no notice)."""
    theta = {"rope_theta": float(llm.get("rope_theta", 10000.0))}
    scaling = llm.get("rope_scaling")
    if not scaling:
        return {"rope_type": "default", **theta}
    kind = scaling.get("rope_type") or scaling.get("type")
    require(f"{where}: rope_scaling", {"type": kind}, type=("dynamic", "linear"))
    return {"rope_type": kind, **pick(f"{where}: rope_scaling", scaling, "factor"), **theta}


def _vision(where: str, vit: Mapping[str, Any]) -> InternVLVisionConfig:
    norm = vit.get("norm_type", "rms_norm")
    require(where, {"norm_type": norm}, norm_type=("layer_norm", "rms_norm"))
    return InternVLVisionConfig(
        **pick(where, vit, *_VIT),
        hidden_act=vit.get("hidden_act", "gelu"),
        norm_type=norm,
        layer_norm_eps=vit.get("layer_norm_eps", 1e-6),
        attention_bias=vit.get("qkv_bias", False),
        use_qk_norm=vit.get("qk_normalization", True),
        use_mean_pooling=True,  # no norm behind the last layer, as in the original
        use_absolute_position_embeddings=True,
    )
