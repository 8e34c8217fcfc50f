"""Every model type that transformers builds for text or for pictures and text, as small as its configuration allows.

Sizes are set by what a field is called; a handful of types get fields of their own. Weights are random.
"""

import copy
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

IMAGE, VOCABULARY, LENGTH = 5, 96, 20
LARGEST = 40e6  # parameters
SECONDS = 40  # that a type may take
#: Classes of transformers that build them, and what each knows; the first that knows a type does.
AUTO = (
    (transformers.AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    (transformers.AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES),
    (transformers.AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
)
TYPES = sorted({kind for _, known in AUTO for kind in known})

#: The first pattern that a field's whole name matches says its value; only fields whose default is an int are asked.
SIZES = (
    (r"pad_token_id", 0),
    (r"bos_token_id|sep_token_id", 1),
    (r"eos_token_id|decoder_start_token_id", 2),
    (r"image_token_(id|index)|image_patch_id", IMAGE),
    (r"video_token_(id|index)", 6),
    (r"audio_token_(id|index)", 9),
    (r"(vision|image)_start_token_id|boi_token_id", 7),
    (r"(vision|image)_end_token_id|eoi_token_id", 8),
    (r".*vocab_size.*|n_?words|num_embeddings|type_vocab_size", VOCABULARY),
    (r"num_key_value_heads|num_kv_heads|.*_num_key_value_heads|n_kv_heads", 2),
    (r"num_(attention_)?heads|n_heads?|(encoder|decoder)_attention_heads|.*num_attention_heads", 4),
    (r"index_n_heads|linear_num_(key|value)_heads", 2),
    (r"(global_)?head_dim|.*head_dim|v_head_dim|.*_head_size|d_kv|kv_channels", 8),
    (r"qk_(rope|nope)_head_dim", 4),
    (r"(q|kv|o)_lora_rank|.*lora_rank", 8),
    (r"index_topk", 8),
    (r"adapter_input_size|adapter_out_dim", 32),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|num_selected_experts|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_groups?", 1),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts|num_routed_experts", 4),
    (r"first_k_dense_replace", 1),
    (r"(moe|shared_expert|.*expert).*intermediate_size|.*expert_ffn.*", 16),
    (r".*intermediate_size.*|.*ffn.*(dim|size)|n_inner|d_ff|dim_ff|intermediate_dim", 48),
    (r"(num_)?(encoder|decoder)?_?(hidden_)?layers|n_layers?|num_blocks", 2),
    (r"num_kv_shared_layers", 0),
    (r"depth|num_.*_layers", 1),
    (r"hidden_size_per_layer_input|projector_.*dim", 32),
    (r".*hidden_size|n_embd|n_embed|d_model|emb_dim|embed_dim|.*embedding_dim|dim|.*hidden_dim|.*_embed_dim", 32),
    (r".*project.*(dim|size)|out_(hidden_size|dim)|output_dim|.*vision_output_dim", 32),
    (r".*patch_size", 4),
    (r".*image_size|.*img_size", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|.*max_position.*", 512),
    (r"(attention_)?sliding_window|.*window_size|attention_chunk_size", 6),
    (r"base_channels", 32),
    (r"rotary_dim", 4),
    (r"mamba_(n_heads|num_heads)|(mamba_)?d_head|mamba_head_dim|mamba_d_head", 8),
)
#: Fields that are None where nothing is set, and ints else.
UNSET = (
    "head_dim",
    "image_token_id",
    "video_token_id",
    "num_experts",
    "top_k_experts",
    "moe_intermediate_size",
)
MROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
#: Fields of some types; a dictionary goes to the part of that name.
_AXES: dict[str, Any] = {"text_config": {"rope_parameters": MROPE}}
_TOKENS = {f"<|visual token {i:06d}|>": 20 + i for i in range(8)}
_INDEXER = {
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
}
_CODES = {"embed_dim": 8, "latent_channels": 32, "channel_multiplier": [1]}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "paddleocr_vl", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga"), _AXES
    ),
    "ernie4_5_vl_moe": {
        "text_config": {"rope_parameters": MROPE | {"mrope_section": [1, 1, 2]}, "moe_intermediate_size": [16, 16]}
    },
    "dots3_note": {"text_config": {"num_key_value_heads": 4}, "vision_config": {"adapter_in_dim": 32}},
    "dots3_note_text": {"num_key_value_heads": 4, "intermediate_size": 48},
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "index_topk": 64, "qk_rope_head_dim": 0}},
    "cohere_compass": {
        "text_config": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), MROPE)}
    },
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "dense"]}},
    "granite4_vision": {
        "deepstack_layer_map": [],
        "spatial_target_layers": [],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},
    },
    "hunyuan_vl": _AXES,
    "step3p7": {"text_config": {"sliding_window": 6}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [0, 1]}},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "muse_spark": {
        "audio_config": {"patch_sizes": [4, 2], "hidden_sizes": [16, 32], "depths": [1, 1], "num_hidden_layers": 2}
    },
    "nemotron_h_omni": {"video_temporal_patch_size": 4, "vision_config": {"video_temporal_patch_size": 4}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 16, "head_dim": 8},
    "zaya": {"num_experts_per_tok": 1},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "nemotron": {"num_key_value_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "chameleon": {
        "vocabulary_map": {"<image>": IMAGE, **{f"IMGIMGBS{chr(65 + i)}Z": 20 + i for i in range(8)}},
        "vq_config": {"base_channels": 32, "num_embeddings": 8, "num_res_blocks": 1, **_CODES},
    },
    "emu3": {
        "vocabulary_map": {"<image>": IMAGE, "<|extra_200|>": 9, **_TOKENS},
        "vq_config": {"base_channels": 32, "codebook_size": 8, "channel_multiplier": [1]},
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 7, **_AXES},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 7, **_AXES},
    "janus": {"vq_config": {"base_channels": 32, "num_embeddings": 8, "channel_multiplier": [1]}},
}


class UnbuildableError(Exception):
    """A type that cannot be built tiny, or that transformers itself does not run: the message says why."""


@dataclass
class Model:
    """A tiny model and what it is given.

    Attributes:
        model: in evaluation mode; inputs: a prompt of `LENGTH` tokens.
        pictures: it takes pictures or sounds too.
    """

    model: Any
    inputs: dict[str, Tensor]
    pictures: bool = False


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """A TimeoutError after that many seconds; in the main thread."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tiny(kind: str, attention: str) -> Model:
    """A model of type `kind`.

    Raises:
        UnbuildableError: it cannot be built small, does not take this attention, or does not answer a prompt of text.
    """
    with within(SECONDS):
        try:
            return _tiny(kind, attention, sized_heads=True)
        except UnbuildableError:
            raise
        except Exception as error:
            reason = one_line(error)
        try:  # some make the size of their heads out of others
            return _tiny(kind, attention, sized_heads=False)
        except Exception:
            raise UnbuildableError(reason) from None


def _tiny(kind: str, attention: str, sized_heads: bool) -> Model:
    auto: Any = next(auto for auto, known in AUTO if kind in known)
    config = _shrunk(CONFIG_MAPPING[kind], SPECIAL.get(kind, {}), sized_heads)
    config._attn_implementation = attention
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise UnbuildableError(f"{size / 1e6:.0f} million parameters are its smallest here")
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    _spread(model)
    if not hasattr(model, "generation_config"):
        raise UnbuildableError("does not generate")
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id, settings.do_sample = None, 0, False
    ids = torch.randint(10, VOCABULARY, (1, LENGTH // 2), generator=torch.Generator().manual_seed(1)).repeat(1, 2)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        out = model(**inputs).logits
    if not out.isfinite().all():
        raise UnbuildableError("its logits are not finite with random weights")
    return Model(model, inputs, auto is not transformers.AutoModelForCausalLM)


def _spread(model: Any) -> None:
    """Weights large enough that a wrong mask shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                width = 1.0 if "embed" in name and weight.shape[0] > 32 else weight.shape[-1]
                weight.copy_(torch.randn(weight.shape, generator=generator) * 1.5 * width**-0.5)
            elif not weight.isfinite().all() or "dt_bias" in name:
                weight.zero_()


def _shrunk(kind: type, special: dict[str, Any], sized_heads: bool) -> Any:
    default: Any = kind()
    parts = getattr(kind, "sub_configs", {})
    renamed = getattr(kind, "attribute_map", {})
    fields: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        if name in parts or name in renamed:
            continue
        if (isinstance(value, int) and not isinstance(value, bool)) or (value is None and name in UNSET):
            size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
            if size is not None:
                fields[name] = size
    fields |= _by_layer(default, fields)
    for name in parts:
        if getattr(default, name, None) is not None and special.get(name, 0) is not None:
            fields[name] = _shrunk(type(getattr(default, name)), special.get(name) or {}, sized_heads)
    fields |= {name: value for name, value in special.items() if name not in parts or value is None}
    if not sized_heads:
        fields.pop("head_dim", None)
    return kind(**fields)


def _by_layer(default: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields that speak of each layer, or of each channel of rotary."""
    found: dict[str, Any] = {}
    own = default.to_dict()
    if "kv_lora_rank" in own or "kv_lora_dim" in own:  # latent attention: heads are made anew from what is cached
        found |= {name: 4 for name in ("num_key_value_heads", "head_dim") if name in own}
    kinds = list(dict.fromkeys(own.get("layer_types") or ()))
    if kinds:
        kinds = kinds if len(kinds) > 1 else kinds * 2
        layers = next((n for n in ("num_hidden_layers", "n_layer", "num_layers") if n in fields), "num_hidden_layers")
        found |= {"layer_types": kinds, layers: len(kinds)}
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        found["rope_parameters"] = MROPE
    for name in ("mlp_layer_types",):
        if own.get(name):
            found[name] = list(own[name])[: len(kinds) or 2]
    return found


def one_line(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:110]}" + ("..." if len(text) > 110 else "")
