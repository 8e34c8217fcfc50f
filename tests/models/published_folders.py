"""Tiny folders in the publishers' layouts, with random weights: every file as their own code writes it."""

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file

WORDS = ["▁the", "▁cat", "▁sat", "▁on", "▁mat", "▁What", "▁is", "▁this", "ing", "ed", "你好", "书生", "▁▁", "▁▁▁▁"]
UNUSED = 6  # pieces that InternLM2 gives other names in its configuration
NAMED = ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>")
APPENDED = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")


# -------------------------------------------------------------------- tokenizers


def pieces(unused=UNUSED):
    """Text, score and kind of each piece: specials, bytes, characters, and words with all their beginnings."""
    listed = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    listed += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    listed += [(f"[UNUSED_TOKEN_{n}]", 0.0, 4) for n in range(unused)]
    merged = dict.fromkeys(word[:end] for word in WORDS for end in range(2, len(word) + 1))
    single = dict.fromkeys("▁" + "".join(WORDS) + "etaoinshrdlucmfwypvbgkjqxz:.,ABSUER")
    return listed + [(text, -float(n), 1) for n, text in enumerate([*merged, *single])]


def sentencepiece_model(prefix, unused=UNUSED, collapse=False, kind=2):
    """A SentencePiece model as protocol buffers write it."""
    data = b""
    for text, score, sort in pieces(unused):
        piece = _field(1, text.encode()) + b"\x15" + struct.pack("<f", score)
        data += _field(1, piece + (_field(3, sort) if sort != 1 else b""))
    trainer, normalizer = _field(3, kind) + _field(35, True), _field(1, b"identity") + _field(3, prefix)
    return data + _field(2, trainer) + _field(3, normalizer + _field(4, collapse))


def _field(number, value):
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(int(value))


def _varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def write_internlm2_tokenizer(folder, *, prefix=False, split=False):
    """As OpenGVLab's folders have it; with `split` the appended tokens stand in a file of their own as well."""
    count = len(pieces())
    first = 3 + 256
    added = dict(enumerate(("<unk>", "<s>", "</s>"))) | {first + n: name for n, name in enumerate(NAMED)}
    added |= {count + n: name for n, name in enumerate(APPENDED)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>",
        "unk_token": "<unk>", "tokenizer_class": "InternLM2Tokenizer", "model_max_length": 8192,
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "additional_special_tokens": [*NAMED, *APPENDED], "chat_template": "{{ 'not this one' }}",
        "added_tokens_decoder": {str(n): {"content": name, **flags} for n, name in added.items()},
    }  # fmt: skip
    _write(folder / "tokenizer_config.json", config)
    if split:
        _write(folder / "added_tokens.json", {name: count + n for n, name in enumerate(APPENDED)})
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(prefix))
    return count + len(APPENDED)


def write_qwen2_tokenizer(folder):
    """Byte-level BPE of a few merges, the model's own specials, and the nine appended."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {character: n for n, character in enumerate(bytes_to_unicode().values())}
    merges = ["t h", "th e", "Ġ the", "c a", "ca t", "Ġ cat"]
    vocabulary |= {merge.replace(" ", ""): len(vocabulary) + n for n, merge in enumerate(merges)}
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *APPENDED)
    added = {len(vocabulary) + n: name for n, name in enumerate(names)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "unk_token": None, "tokenizer_class": "Qwen2Tokenizer", "errors": "replace", "model_max_length": 8192,
        "additional_special_tokens": list(names[1:]), "split_special_tokens": False,
        "added_tokens_decoder": {str(n): {"content": name, **flags} for n, name in added.items()},
    }  # fmt: skip
    _write(folder / "tokenizer_config.json", config)
    _write(folder / "added_tokens.json", {name: n for n, name in added.items()})
    _write(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return len(vocabulary) + len(added)


def write_llama_tokenizer(folder, **config):
    """As MobileLLaMA's folder has it: three specials, a blank put in front."""
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    _write(folder / "special_tokens_map.json", {name: {"content": token} for name, token in named.items()})
    _write(
        folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "model_max_length": 2048, **config}
    )
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(True, unused=0))
    return len(pieces(0))


# -------------------------------------------------------------------- models


def write_internvl(folder, llm="internlm2", tower="300m", *, seed=0, **top):
    """A folder of InternVL2.5's: its configuration and its weights, which are returned as well."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = (write_internlm2_tokenizer if llm == "internlm2" else write_qwen2_tokenizer)(folder)
    text = {
        "architectures": ["InternLM2ForCausalLM" if llm == "internlm2" else "Qwen2ForCausalLM"], "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": vocabulary, "max_position_embeddings": 48, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "rope_theta": 1000000, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "top_k": 50, "max_length": 20,
    }  # fmt: skip
    if llm == "internlm2":
        text |= {"bias": False, "attn_implementation": "flash_attention_2"}
    big = tower == "6b"
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 56, "patch_size": 14, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
        "norm_type": "rms_norm" if big else "layer_norm", "qkv_bias": not big,
        "qk_normalization": big, "drop_path_rate": 0.1, "use_flash_attn": True,
    }  # fmt: skip
    config = {
        "model_type": "internvl_chat", "architectures": ["InternVLChatModel"], "template": "internvl2_5",
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
                     "AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "downsample_ratio": 0.5, "dynamic_image_size": True, "force_image_size": 56, "max_dynamic_patch": 12,
        "min_dynamic_patch": 1, "ps_version": "v2", "select_layer": -1, "use_thumbnail": True, "use_backbone_lora": 0,
        "use_llm_lora": 0, "torch_dtype": "float32", "llm_config": text, "vision_config": vision,
    }  # fmt: skip
    _write(folder / "config.json", config | top)
    _write(folder / "generation_config.json", {"_from_model_config": True})
    state = _random(_internvl_shapes(text, vision), seed)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return state


def _internvl_shapes(text, vision):
    wide, mlp, hidden = vision["hidden_size"], vision["intermediate_size"], text["hidden_size"]
    shapes = {
        "vision_model.embeddings.class_embedding": (1, 1, wide),
        "vision_model.embeddings.position_embedding": (1, 17, wide),
        "vision_model.embeddings.patch_embedding.weight": (wide, 3, 14, 14),
        "vision_model.embeddings.patch_embedding.bias": (wide,),
        "mlp1.0.weight": (4 * wide,), "mlp1.0.bias": (4 * wide,), "mlp1.1.weight": (hidden, 4 * wide),
        "mlp1.1.bias": (hidden,), "mlp1.3.weight": (hidden, hidden), "mlp1.3.bias": (hidden,),
    }  # fmt: skip
    for n in range(vision["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{n}."
        shapes |= {layer + name: (wide,) for name in ("ls1", "ls2", "norm1.weight", "norm2.weight", "attn.proj.bias")}
        shapes |= {layer + "attn.qkv.weight": (3 * wide, wide), layer + "attn.proj.weight": (wide, wide)}
        shapes |= {layer + "mlp.fc1.weight": (mlp, wide), layer + "mlp.fc1.bias": (mlp,)}
        shapes |= {layer + "mlp.fc2.weight": (wide, mlp), layer + "mlp.fc2.bias": (wide,)}
        if vision["norm_type"] == "layer_norm":
            shapes |= {layer + "norm1.bias": (wide,), layer + "norm2.bias": (wide,)}
        if vision["qkv_bias"]:
            shapes[layer + "attn.qkv.bias"] = (3 * wide,)
        if vision["qk_normalization"]:
            shapes |= {layer + "attn.q_norm.weight": (wide,), layer + "attn.k_norm.weight": (wide,)}
    if text["architectures"] == ["InternLM2ForCausalLM"]:
        return shapes | _internlm2_shapes(text, "language_model.")
    return shapes | _llama_shapes(text, "language_model.", bias=True)


def _internlm2_shapes(text, prefix):
    hidden, inner, vocabulary = text["hidden_size"], text["intermediate_size"], text["vocab_size"]
    kv = hidden // text["num_attention_heads"] * text["num_key_value_heads"]
    shapes = {prefix + "model.tok_embeddings.weight": (vocabulary, hidden), prefix + "model.norm.weight": (hidden,)}
    shapes[prefix + "output.weight"] = (vocabulary, hidden)
    for n in range(text["num_hidden_layers"]):
        layer = f"{prefix}model.layers.{n}."
        shapes |= {
            layer + "attention.wqkv.weight": (hidden + 2 * kv, hidden),
            layer + "attention.wo.weight": (hidden, hidden),
        }
        shapes |= {layer + f"feed_forward.w{m}.weight": (inner, hidden) for m in (1, 3)}
        shapes |= {layer + "feed_forward.w2.weight": (hidden, inner)}
        shapes |= {layer + "attention_norm.weight": (hidden,), layer + "ffn_norm.weight": (hidden,)}
    return shapes


def _llama_shapes(text, prefix, *, bias):
    hidden, inner, vocabulary = text["hidden_size"], text["intermediate_size"], text["vocab_size"]
    kv = hidden // text["num_attention_heads"] * text["num_key_value_heads"]
    shapes = {prefix + "model.embed_tokens.weight": (vocabulary, hidden), prefix + "model.norm.weight": (hidden,)}
    shapes[prefix + "lm_head.weight"] = (vocabulary, hidden)
    for n in range(text["num_hidden_layers"]):
        layer = f"{prefix}model.layers.{n}."
        for part, rows in (("q", hidden), ("k", kv), ("v", kv)):
            shapes[layer + f"self_attn.{part}_proj.weight"] = (rows, hidden)
            if bias:
                shapes[layer + f"self_attn.{part}_proj.bias"] = (rows,)
        shapes |= {
            layer + "self_attn.o_proj.weight": (hidden, hidden),
            layer + "mlp.down_proj.weight": (hidden, inner),
        }
        shapes |= {layer + f"mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
        shapes |= {layer + f"{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    return shapes


def write_mobilevlm(folder, *, seed=0, kind="bin", **top):
    """A folder of MobileVLM V2's, the vision tower inside, and beside it a folder with the tower's configuration."""
    folder = Path(folder)
    tower = folder.parent / "clip-tiny"
    for each in (folder, tower):
        each.mkdir(parents=True, exist_ok=True)
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 2, "image_size": 336, "patch_size": 14, "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5, "projection_dim": 8,
    }  # fmt: skip
    _write(tower / "config.json", vision)
    config = {
        "model_type": "mobilevlm", "architectures": ["MobileLlamaForCausalLM"], "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "vocab_size": write_llama_tokenizer(folder), "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "rope_theta": 10000.0, "rope_scaling": None, "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": False, "attention_bias": False, "torch_dtype": "float32",
        "mm_vision_tower": "../clip-tiny", "vision_tower_type": "clip", "mm_projector_type": "ldpnetv2",
        "mm_hidden_size": 16, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad", "image_grid_pinpoints": None, "use_mm_proj": True, "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False, "tune_mm_mlp_adapter": False, "freeze_mm_mlp_adapter": False,
    }  # fmt: skip
    config = {name: value for name, value in (config | top).items() if value != "absent"}
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", {"temperature": 0.9, "top_p": 0.6})  # as Vicuna's: sampling unsaid
    hidden, wide = 32, 16
    shapes = _llama_shapes(config, "", bias=False)
    shapes |= {"model.mm_projector.mlp.mlp.0.weight": (hidden, wide), "model.mm_projector.mlp.mlp.0.bias": (hidden,)}
    shapes |= {
        "model.mm_projector.mlp.mlp.2.weight": (hidden, hidden),
        "model.mm_projector.mlp.mlp.2.bias": (hidden,),
    }
    shapes |= {
        "model.mm_projector.peg.peg.0.weight": (hidden, 1, 3, 3),
        "model.mm_projector.peg.peg.0.bias": (hidden,),
    }
    shapes |= _clip_shapes(vision, "model.vision_tower.vision_tower.vision_model.")
    state = _random(shapes, seed)
    if kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")
    return state


def _clip_shapes(vision, prefix):
    wide, inner = vision["hidden_size"], vision["intermediate_size"]
    shapes = {
        prefix + "embeddings.class_embedding": (wide,),
        prefix + "embeddings.patch_embedding.weight": (wide, 3, 14, 14),
        prefix + "embeddings.position_embedding.weight": (577, wide),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    for n in range(vision["num_hidden_layers"]):
        layer = f"encoder.layers.{n}."
        norms += [layer + "layer_norm1", layer + "layer_norm2"]
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {prefix + layer + f"self_attn.{part}.weight": (wide, wide)}
            shapes |= {prefix + layer + f"self_attn.{part}.bias": (wide,)}
        shapes |= {prefix + layer + "mlp.fc1.weight": (inner, wide), prefix + layer + "mlp.fc1.bias": (inner,)}
        shapes |= {prefix + layer + "mlp.fc2.weight": (wide, inner), prefix + layer + "mlp.fc2.bias": (wide,)}
    return shapes | {prefix + name + part: (wide,) for name in norms for part in (".weight", ".bias")}


def _random(shapes, seed):
    """Weights large enough that attention and logits differ between tokens; no norm's is one, no bias nought."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        spread = torch.randn(shape, generator=generator)
        width = 1 if "embed" in name else max(1, spread[0].numel())
        centre = 1.0 if len(shape) == 1 and name.endswith((".weight", "ls1", "ls2")) else 0.0
        state[name] = centre + spread * (0.2 if len(shape) == 1 else 1.5 * width**-0.5)
    return state


def _write(file, content):
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def edit(file, **changes):
    """Change entries of a JSON file; "absent" takes one away. A name such as llm_config__bias reaches inside."""
    content = json.loads(Path(file).read_text(encoding="utf-8"))
    for name, value in changes.items():
        *path, last = name.split("__")
        inner = content
        for key in path:
            inner = inner[key]
        if value == "absent":
            del inner[last]
        else:
            inner[last] = value
    _write(Path(file), content)
