"""Tiny models with random weights, and an oracle that knows nothing of kvweave.

The oracle runs the plain model, cache and all, with an attention of its own: every layer and KV head sees only the
columns that it is told to see, computed eagerly in float64 over the whole, uncompressed sequence.
"""

import contextlib
from dataclasses import dataclass

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

IMAGE = 5  # placeholder of image tokens in every tiny vocabulary
VOCABULARY = 96
ORACLE = "seam_oracle"
DEFAULT = object()  # in a configuration's overrides: leave the field at its default

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "video_token_id": 6,
    "video_token_index": 6,
    "depth": 1,
    "embed_dim": 32,
    "num_heads": 2,
    "patch_size": 4,
    "image_size": 8,
    "out_hidden_size": 32,
    "projection_dim": 32,
}


def tiny_config(model_type, **special):
    """The smallest configuration of an architecture; `special` overrides fields, nested ones as dicts."""
    return _shrunk(CONFIG_MAPPING[model_type], special)


def _shrunk(kind, special):
    default = kind()
    renamed = getattr(kind, "attribute_map", {})
    parts = getattr(kind, "sub_configs", {})
    fields = {name: value for name, value in _SMALL.items() if _has(default, name) and name not in renamed}
    fields |= {name: value for name, value in special.items() if name not in parts}
    for name in parts:
        if getattr(default, name, None) is not None:
            fields[name] = _shrunk(type(getattr(default, name)), special.get(name, {}))
    return kind(**{name: value for name, value in fields.items() if value is not DEFAULT})


def _has(config, name):
    try:
        return hasattr(config, name)
    except Exception:  # gemma4: a head size of its own for each kind of layer
        return False


def build(config, *, attention="sdpa", dtype=torch.float32, seed=0):
    """A model of this configuration whose attention is far from uniform, so that a wrong mask shows."""
    config._attn_implementation = attention
    torch.manual_seed(seed)
    for auto in (
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForSeq2SeqLM,
    ):
        if type(config) in auto._model_mapping:
            model = auto.from_config(config).eval()
            break
    else:
        name = config.architectures[0] if config.architectures else f"{type(config).__name__[:-6]}Model"
        model = getattr(transformers, name)(config).eval()
    spread(model, seed)
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id, settings.do_sample = None, 0, False
    return model.to(dtype)


def spread(model, seed=0):
    """Weights large enough that logits and attention differ between tokens."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                width = 1.0 if "embed" in name and weight.shape[0] > 32 else weight.shape[-1]
                weight.copy_(torch.randn(weight.shape, generator=generator) * 1.5 * width**-0.5)


def text_model(kind="llama", *, attention="sdpa", dtype=torch.float32, seed=0, **special):
    return build(tiny_config(kind, **special), attention=attention, dtype=dtype, seed=seed)


def vision_model(*, attention="sdpa", dtype=torch.float32, seed=0, kind="qwen2_5_vl"):
    """A Qwen2-VL of either generation that takes pictures of 4 x 4 patches, four visual tokens each."""
    vision = {"spatial_merge_size": 2, "temporal_patch_size": 1, "in_channels": 3}
    if kind == "qwen2_5_vl":
        vision |= {"window_size": 16, "fullatt_block_indexes": [0]}
    if kind == "qwen2_vl":
        vision |= {"hidden_size": 32, "mlp_ratio": 2}
    special = {"text_config": {"rope_parameters": MROPE}, "vision_config": vision}
    special |= {"vision_start_token_id": 7, "vision_end_token_id": 8}
    return build(tiny_config(kind, **special), attention=attention, dtype=dtype, seed=seed)


def gemma4(*, attention="sdpa"):
    """Layers that slide and full ones in turn, which have heads of another size, and fewer."""
    special = {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 6,
        "num_kv_shared_layers": 0,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 8,
    }
    return build(tiny_config("gemma4", text_config=special, audio_config=None), attention=attention)


MROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}


def words(batch, length, *, seed=0, images=()):
    """Random ids without padding or placeholders, but image placeholders in the ranges of `images`."""
    generator = torch.Generator().manual_seed(100 + seed)
    ids = torch.randint(10, VOCABULARY, (batch, length), generator=generator)
    for start, stop in images:
        ids[:, start:stop] = IMAGE
    return ids


def text_inputs(lengths=(24,), *, seed=0, images=((4, 12),)):
    """Prompts of these lengths, left-padded to the longest."""
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = words(1, length, seed=seed + row, images=images)[0]
        mask[row, longest - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def picture_inputs(lengths=(24,), *, pictures=2, seed=0, dtype=torch.float32):
    """Prompts for `vision_model`: text with pictures of four visual tokens, left-padded."""
    inputs = text_inputs(lengths, seed=seed, images=())
    ids, longest = inputs["input_ids"], max(lengths)
    for row, length in enumerate(lengths):
        for n in range(pictures):
            start = longest - length + 1 + 7 * n
            ids[row, start : start + 6] = torch.tensor([7, IMAGE, IMAGE, IMAGE, IMAGE, 8])
    generator = torch.Generator().manual_seed(200 + seed)
    total = pictures * len(lengths)
    if total:
        inputs["pixel_values"] = torch.randn(total * 16, 3 * 4 * 4, generator=generator).to(dtype)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * total)
    inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    return inputs


def decode(model, inputs, steps=4, **options):
    """Greedy tokens [batch, steps] and the raw logits of each step [batch, steps, vocabulary]."""
    out = model.generate(**inputs, max_new_tokens=steps, return_dict_in_generate=True, output_logits=True, **options)
    return out.sequences[:, -steps:], torch.stack(out.logits, 1)


def storages(layer):
    """The storages that a compressed layer's keys and values lie in, each once, in bytes."""
    tensors = [x for block in layer.block.parts for x in (block.keys, block.values)]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values()


# -------------------------------------------------------------------- the oracle


@dataclass
class Cut:
    """What queries from column `start` on see of the columns before it, by layer: a bias, and other contents.

    Attributes:
        bias: [batch, kv_heads, start], added to the logits; -inf: not seen.
        contents: keys and values [batch, kv_heads, start, dim] in place of the model's own, or None.
    """

    start: int
    bias: dict[int, torch.Tensor]
    contents: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None


def cut_of(cache, start, *, merged=False, mass_bias=False):
    """The cut that a compressed cache made at logical column `start`, read from the public contract alone."""
    bias, contents = {}, {}
    for number, layer in enumerate(cache.layers):
        if not cache.report["layers"][number]["compressed"]:
            continue
        positions = layer.positions
        batch, kv_heads, _ = positions.shape
        seen = torch.full((batch, kv_heads, start), -torch.inf, dtype=torch.float64)
        keys, values = (x.new_zeros(batch, kv_heads, start, x.shape[-1]) for x in (layer.keys, layer.values))
        for row in range(batch):
            for head in range(kv_heads):
                slots = ((positions[row, head] >= 0) & (positions[row, head] < start)).nonzero().flatten()
                columns = positions[row, head, slots]
                seen[row, head, columns] = layer.mass[row, head, slots].double().log() if mass_bias else 0.0
                keys[row, head, columns] = layer.keys[row, head, slots]
                values[row, head, columns] = layer.values[row, head, slots]
        bias[number], contents[number] = seen, (keys, values)
    return Cut(start, bias, contents if merged else None)


_CUTS: list[Cut] = []


def _oracle_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    batch, heads, rows, dim = query.shape
    kv_heads, columns = key.shape[1], key.shape[2]
    first = columns - rows  # logical column of the first query
    scaling = dim**-0.5 if scaling is None else scaling
    out = torch.zeros(batch, heads, rows, value.shape[-1], dtype=torch.float64)
    number = module.layer_idx
    if getattr(module, "is_kv_shared_layer", False):  # gemma4: reads the keys of an earlier layer
        kinds = module.config.layer_types
        own = len(kinds) - module.config.num_kv_shared_layers
        number = max(i for i in range(own) if kinds[i] == kinds[number])
    for row in range(rows):
        k, v = key, value
        extra = torch.zeros(batch, kv_heads, columns, dtype=torch.float64)
        past = [cut for cut in _CUTS if cut.start <= first + row and number in cut.bias]
        if past:
            cut = past[-1]
            extra[..., : cut.start] = cut.bias[number]
            if cut.contents is not None:
                k, v = (
                    torch.cat([old, own[:, :, cut.start :]], 2)
                    for old, own in zip(cut.contents[number], (key, value), strict=True)
                )
        k, v, extra = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v, extra))
        logits = (query[:, :, row, None].double() @ k.double().transpose(-1, -2))[:, :, 0] * scaling
        if kwargs.get("softcap") is not None:
            logits = torch.tanh(logits / kwargs["softcap"]) * kwargs["softcap"]
        if attention_mask is not None:
            shown = attention_mask[:, :, row, :columns].double()
            logits = logits + shown.masked_fill(shown < -1e4, -torch.inf)
        logits = logits + extra
        if kwargs.get("s_aux") is not None:
            sinks = kwargs["s_aux"].double().expand(batch, heads)[..., None]
            weight = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
        else:
            weight = logits.softmax(-1)
        weight = weight.nan_to_num(1 / columns)  # rows of padding: whatever
        out[:, :, row] = (weight[:, :, None] @ v.double())[:, :, 0]
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register(ORACLE, _oracle_attention)
AttentionMaskInterface.register(ORACLE, eager_mask)


@contextlib.contextmanager
def masked(model, *cuts):
    """Inside, the plain model's text layers see what the cuts leave."""
    text = model.config.get_text_config(decoder=True)
    before = text._attn_implementation_internal
    text._attn_implementation_internal = ORACLE
    _CUTS[:] = sorted(cuts, key=lambda cut: cut.start)
    try:
        yield model
    finally:
        text._attn_implementation_internal = before
        _CUTS.clear()


def assert_close(mine, theirs, tolerance=1e-5):
    error = (mine.double() - theirs.double()).abs().max().item()
    scale = max(1.0, theirs.abs().max().item())
    assert error <= tolerance * scale, f"error {error:.2e} at scale {scale:.1f}"
