"""A multimodal model's decoder alone, as the text model that an engine loads: what contexts are decoded with.

    kvweave.models.export_decoder(model, "decoder", processor)
    vllm serve decoder ...

Its text positions are what they are in the whole model: where rotary has three axes, they are equal for text.
"""

import inspect
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvweave.models.source import ModelError
from kvweave.ops.separation import share_of_way
from kvweave.prompt import visual_token_ids
from kvweave.seam.export import mark
from kvweave.seam.reader import parts_of, unwrapped

#: Which text model computes what a decoder of this type does, where its own has no class with a head.
TEXT_MODELS: dict[str, dict[str, Any]] = {
    "qwen2_vl_text": {"model_type": "qwen2"},
    "qwen2_5_vl_text": {"model_type": "qwen2"},
    "qwen3_vl_text": {"model_type": "qwen3"},
    "qwen3_vl_moe_text": {"model_type": "qwen3_moe", "norm_topk_prob": True},
}
#: Beside the weights: which model's contexts the decoder goes on from.
MARK = "kvweave.json"
_OF_AXES = ("mrope_section", "mrope_interleaved")  # rotary parameters that equal positions make no use of
_CHECKED = 48  # tokens whose logits are compared
_READ = 2000  # tokens that the tokenizer is compared on
_ULPS = 64  # error of a logit against the largest


def export_decoder(model: Any, folder: str | os.PathLike[str], processor: Any = None) -> dict[str, Any]:
    """Write the decoder of `model` as a text model that transformers' AutoModelForCausalLM, and an engine, load.

    The folder appears once it is whole and what it holds gives the logits that `model` gives for text.

    Args:
        folder: new, or empty.
        processor: the model's, or its tokenizer, which is written too; None: without one.
    Returns:
        What was written: `model`, the class; `parameters`; `dtype`; `mark`, that of contexts exported from `model`.
    Raises:
        ModelError: a decoder that no text model computes, adapters or packed weights, a tokenizer that the auto
            classes would read otherwise beside that text model, or a folder that is not empty.
    """
    goal, full = Path(folder), unwrapped(model)
    if goal.exists() and (not goal.is_dir() or any(goal.iterdir())):
        raise ModelError(f"{goal} is not empty: allowed is a folder that is, or a new one")
    config = text_config(full)
    state = _state(full, config)
    partial = goal.with_name(f".{goal.name}.{uuid.uuid4().hex}")
    try:
        _built(full, config, state).save_pretrained(partial)
        if processor is not None:
            _write_tokenizer(getattr(processor, "tokenizer", processor), partial)
        (partial / MARK).write_text(json.dumps({"model": mark(full)}) + "\n")
        decoder = AutoModelForCausalLM.from_pretrained(partial, dtype=full.dtype).to(full.device).eval()
        _check_logits(full, decoder)
        partial.rename(goal)  # the whole folder takes its name at once
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {
        "model": type(decoder).__name__,
        "parameters": decoder.num_parameters(),
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "mark": mark(full),
    }


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of the text model that computes what the decoder of `model` does with text.

    Raises:
        ModelError: there is none.
    """
    name, decoder = type(model).__name__, model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or getattr(decoder, "cross_attention_layers", None):
        raise ModelError(f"the decoder of {name} reads an encoder's states: allowed is one that reads tokens alone")
    fields = {key: value for key, value in decoder.to_dict().items() if key not in ("model_type", "architectures")}
    fields["tie_word_embeddings"] = _tied(model)
    if type(decoder) in AutoModelForCausalLM._model_mapping:
        return type(decoder)(**fields)
    if decoder.model_type not in TEXT_MODELS:
        listed = ", ".join(TEXT_MODELS)
        raise ModelError(
            f"the decoder of {name} has model_type={decoder.model_type!r}, which no text model computes: allowed is "
            f"one of {listed}, or a text model of transformers such as llama, qwen2 or mistral"
        )
    rope = fields.get("rope_parameters") or {}
    fields["rope_parameters"] = {key: value for key, value in rope.items() if key not in _OF_AXES}
    fields |= TEXT_MODELS[decoder.model_type]
    return CONFIG_MAPPING[fields.pop("model_type")](**fields)


def _tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no language head: allowed is a model that generates text")
    return head.weight is model.get_input_embeddings().weight


def _state(model: PreTrainedModel, config: PreTrainedConfig) -> dict[str, Tensor]:
    """The weights of the decoder's innermost stack and of the head, as a text model names them."""
    decoder = model.config.get_text_config(decoder=True)
    stack = parts_of(model, decoder)[-1]
    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(config)
    prefix, head = text.base_model_prefix, text.get_output_embeddings()
    named = {f"{prefix}.{key}": value for key, value in stack.state_dict().items()}
    heads = {id(module): key for key, module in text.named_modules()}
    named |= {f"{heads[id(head)]}.{key}": value for key, value in model.get_output_embeddings().state_dict().items()}
    shapes = {key: value.shape for key, value in text.state_dict().items()}
    if odd := sorted(set(named) ^ set(shapes)) or sorted(key for key in shapes if named[key].shape != shapes[key]):
        raise ModelError(
            f"the decoder of {type(model).__name__} is no {type(text).__name__}: {odd[0]!r} is one of {len(odd)} "
            "tensors that differ; allowed are plain weights: adapters merged, nothing packed"
        )
    return named


def _built(model: PreTrainedModel, config: PreTrainedConfig, state: dict[str, Tensor]) -> PreTrainedModel:
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    built = kind.from_pretrained(None, config=config, state_dict=state, dtype=model.dtype)
    built.generation_config = model.generation_config
    return built


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    back, text = AutoTokenizer.from_pretrained(folder), tokenizer.decode(range(min(len(tokenizer), _READ)))
    if back.encode(text) != tokenizer.encode(text):
        raise ModelError(
            f"its {type(tokenizer).__name__} is read back as a {type(back).__name__}, and encodes otherwise: allowed "
            "is none (--no-tokenizer), for an engine that is given token ids (vllm serve --skip-tokenizer-init)"
        )


@torch.no_grad()
def _check_logits(full: PreTrainedModel, text: PreTrainedModel) -> None:
    vocabulary = torch.arange(full.config.get_text_config(decoder=True).vocab_size)
    plain = vocabulary[~torch.isin(vocabulary, torch.tensor(visual_token_ids(full.config), dtype=torch.long))]
    some = torch.randperm(len(plain), generator=torch.Generator().manual_seed(0))[:_CHECKED]
    ids = plain[some][None].to(full.device)
    ours, theirs = (part(input_ids=ids, use_cache=False).logits.float() for part in (text, full))
    error, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
    near = error <= _ULPS * torch.finfo(full.dtype).eps * scale
    if near and error and "position_ids" in inspect.signature(text.forward).parameters:
        places = torch.arange(ids.shape[1], device=ids.device)
        gap = (places + (places >= len(places) // 2))[None]  # half precision may round by more than that changes
        near = abs(share_of_way(theirs, ours, text(input_ids=ids, position_ids=gap, use_cache=False).logits)) < 0.5
    if not near:
        raise ModelError(
            f"the decoder of {type(full).__name__} is no {type(text).__name__}: its logits differ by {error:.1e} of "
            f"{scale:.1e}"
        )
