"""The original models' forward passes in plain loops over the published tensors, nothing of transformers' used."""

import torch
from torch.nn import functional as F


def linear(state, name, x):
    return F.linear(x, state[name + ".weight"], state.get(name + ".bias"))


def layer_norm(state, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], eps)


def rms_norm(state, name, x, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * state[name + ".weight"]


def attended(q, k, v, seen=None):
    """One head: [rows, dim] each; `seen` bool [rows, columns]."""
    logits = q @ k.T / q.shape[-1] ** 0.5
    if seen is not None:
        logits = logits.masked_fill(~seen, -torch.inf)
    return logits.softmax(-1).nan_to_num() @ v


# -------------------------------------------------------------------- InternVL2.5


def internvl_features(state, config, pixels):
    """[tiles, 3, 56, 56] -> [tiles, 4, hidden]."""
    vision = config["vision_config"]
    norm = layer_norm if vision["norm_type"] == "layer_norm" else rms_norm
    heads, eps, out = vision["num_attention_heads"], vision["layer_norm_eps"], []
    for tile in pixels:
        name = "vision_model.embeddings.patch_embedding"
        patches = F.conv2d(tile[None], state[name + ".weight"], state[name + ".bias"], stride=14)[0].flatten(1).T
        x = torch.cat([state["vision_model.embeddings.class_embedding"][0], patches])
        x = x + state["vision_model.embeddings.position_embedding"][0]
        for n in range(vision["num_hidden_layers"]):
            layer = f"vision_model.encoder.layers.{n}."
            q, k, v = linear(state, layer + "attn.qkv", norm(state, layer + "norm1", x, eps)).chunk(3, -1)
            if vision["qk_normalization"]:
                q, k = (
                    rms_norm(state, layer + "attn.q_norm", q, 1e-6),
                    rms_norm(state, layer + "attn.k_norm", k, 1e-6),
                )
            each = [attended(*parts) for parts in zip(*(part.chunk(heads, -1) for part in (q, k, v)), strict=True)]
            x = x + state[layer + "ls1"] * linear(state, layer + "attn.proj", torch.cat(each, -1))
            inner = F.gelu(linear(state, layer + "mlp.fc1", norm(state, layer + "norm2", x, eps)))
            x = x + state[layer + "ls2"] * linear(state, layer + "mlp.fc2", inner)
        grid = x[1:].unflatten(0, (4, 4))
        corners = [grid[row::2, column::2] for row in (0, 1) for column in (0, 1)]  # four patches make a token
        x = layer_norm(state, "mlp1.0", torch.cat(corners, -1).flatten(0, 1), 1e-5)
        out.append(linear(state, "mlp1.3", F.gelu(linear(state, "mlp1.1", x))))
    return torch.stack(out)


def internlm2_as_llama(state, text):
    """InternLM2's tensors under Llama's names, its packed rows taken out one head at a time."""
    heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
    dim, groups = text["hidden_size"] // heads, heads // kv_heads
    names = {
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "tok_embeddings": "embed_tokens",
    }
    out = {}
    for name, tensor in state.items():
        if "wqkv" in name:
            rows = tensor.split(dim)
            first = [head * (groups + 2) for head in range(kv_heads)]
            parts = {
                "q": [rows[at + n] for at in first for n in range(groups)],
                "k": [rows[at + groups] for at in first],
                "v": [rows[at + groups + 1] for at in first],
            }
            for part, taken in parts.items():
                out[name.replace("attention.wqkv", f"self_attn.{part}_proj")] = torch.cat(taken)
            continue
        for old, new in names.items():
            name = name.replace(f".{old}.", f".{new}.")
        out[name.replace("language_model.output.", "language_model.lm_head.")] = tensor
    return out


def internvl_logits(state, config, ids, mask, pixels, image_token):
    """[batch, length] -> [batch, length, vocabulary]; rows of padding are whatever."""
    text = config["llm_config"]
    if text["architectures"] == ["InternLM2ForCausalLM"]:
        state = internlm2_as_llama(state, text)
    x = F.embedding(ids, state["language_model.model.embed_tokens.weight"])
    if pixels is not None:
        x[ids == image_token] = internvl_features(state, config, pixels).flatten(0, 1)
    return decoder(state, text, x, mask, "language_model.")


# -------------------------------------------------------------------- the decoder of all


def decoder(state, text, x, mask, prefix):
    """Llama's arithmetic, row by row and head by head."""
    return torch.stack([_row(state, text, row, seen.bool(), prefix) for row, seen in zip(x, mask, strict=True)])


def _row(state, text, x, valid, prefix):
    heads, kv_heads, eps = text["num_attention_heads"], text["num_key_value_heads"], text["rms_norm_eps"]
    dim = text["hidden_size"] // heads
    positions = (valid.cumsum(0) - 1).clamp(min=0)
    seen = torch.ones(len(x), len(x)).tril().bool() & valid
    turn = _rotary(text, dim, positions)
    for n in range(text["num_hidden_layers"]):
        layer = f"{prefix}model.layers.{n}."
        normed = rms_norm(state, layer + "input_layernorm", x, eps)
        q, k, v = (linear(state, layer + f"self_attn.{part}_proj", normed).split(dim, -1) for part in "qkv")
        each = [
            attended(turn(q[head]), turn(k[head // (heads // kv_heads)]), v[head // (heads // kv_heads)], seen)
            for head in range(heads)
        ]
        x = x + linear(state, layer + "self_attn.o_proj", torch.cat(each, -1))
        normed = rms_norm(state, layer + "post_attention_layernorm", x, eps)
        gate, up = (
            F.silu(linear(state, layer + "mlp.gate_proj", normed)),
            linear(state, layer + "mlp.up_proj", normed),
        )
        x = x + linear(state, layer + "mlp.down_proj", gate * up)
    return linear(state, prefix + "lm_head", rms_norm(state, prefix + "model.norm", x, eps))


def _rotary(text, dim, positions):
    """Channel m turns with m + dim / 2; beyond its positions a dynamic embedding's base grows."""
    base, length, most = float(text["rope_theta"]), int(positions.max()) + 1, text["max_position_embeddings"]
    if text["rope_scaling"] and length > most:
        factor = text["rope_scaling"]["factor"]
        base *= (factor * length / most - (factor - 1)) ** (dim / (dim - 2))
    angles = positions[:, None] / base ** (torch.arange(0, dim, 2) / dim)
    cos, sin = torch.cat([angles, angles], 1).cos(), torch.cat([angles, angles], 1).sin()

    def turn(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    return turn


# -------------------------------------------------------------------- MobileVLM V2


def mobilevlm_features(state, vision, pixels):
    """[images, 3, 336, 336] -> [images, 144, hidden]."""
    tower, out = "model.vision_tower.vision_tower.vision_model.", []
    for image in pixels:
        patches = F.conv2d(image[None], state[tower + "embeddings.patch_embedding.weight"], stride=14)[0].flatten(1).T
        x = torch.cat([state[tower + "embeddings.class_embedding"][None], patches])
        x = layer_norm(state, tower + "pre_layrnorm", x + state[tower + "embeddings.position_embedding.weight"], 1e-5)
        for n in range(vision["num_hidden_layers"] - 1):  # the last layer is not used
            layer = f"{tower}encoder.layers.{n}."
            normed = layer_norm(state, layer + "layer_norm1", x, 1e-5)
            parts = (linear(state, layer + f"self_attn.{part}_proj", normed) for part in "qkv")
            heads = zip(*(part.chunk(vision["num_attention_heads"], -1) for part in parts), strict=True)
            x = x + linear(state, layer + "self_attn.out_proj", torch.cat([attended(*head) for head in heads], -1))
            inner = linear(state, layer + "mlp.fc1", layer_norm(state, layer + "layer_norm2", x, 1e-5))
            x = x + linear(state, layer + "mlp.fc2", inner * (1.702 * inner).sigmoid())
        x = F.gelu(linear(state, "model.mm_projector.mlp.mlp.0", x[1:]))
        x = linear(state, "model.mm_projector.mlp.mlp.2", x).unflatten(0, (24, 24))
        x = (x[0::2, 0::2] + x[0::2, 1::2] + x[1::2, 0::2] + x[1::2, 1::2]) / 4  # [12, 12, hidden]
        weight, bias = (state[f"model.mm_projector.peg.peg.0.{part}"] for part in ("weight", "bias"))
        around = F.pad(x, (0, 0, 1, 1, 1, 1))
        moved = sum(around[r : r + 12, c : c + 12] * weight[:, 0, r, c] for r in range(3) for c in range(3))
        out.append((x + moved + bias).flatten(0, 1))
    return torch.stack(out)


def mobilevlm_logits(state, config, vision, ids, mask, pixels):
    """[batch, length] with the placeholder behind the vocabulary -> [batch, length, vocabulary]."""
    visual = ids == config["vocab_size"]
    x = F.embedding(ids.masked_fill(visual, 0), state["model.embed_tokens.weight"])
    x[visual] = mobilevlm_features(state, vision, pixels).flatten(0, 1)
    return decoder(state, config, x, mask, "")
