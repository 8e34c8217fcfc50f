"""The lab's model: transformers' Qwen2.5-VL class, 0.9 million parameters; and a forward made for training.

transformers runs pictures of any size one after the other; the pictures of one world all have the same grid
of cells, so `Forward` runs a whole batch of albums at once through the very same modules. A test holds the
two equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvweave.lab import words
from kvweave.lab.draw import CELL, MERGE, PATCH, SIDE
from kvweave.lab.world import PASSAGE, slot

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration


def configuration() -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL of 4 layers, 4 heads over 2 key-value heads of 32, and a vision tower of one layer.

    Rotary angles turn with base 1e4: with Qwen's 1e6 the share of the angles that encodes a picture's columns
    (mRoPE sections 4, 6, 6) would hardly turn over five cells.
    """
    from transformers import Qwen2_5_VLConfig

    tokens = {"bos_token_id": words.BOS, "eos_token_id": words.EOS, "pad_token_id": words.PAD}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": -(-len(words.VOCABULARY) // 8) * 8,
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "initializer_range": 0.06,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            **tokens,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 1,
            "window_size": SIDE,
            "fullatt_block_indexes": [0],
            "out_hidden_size": 128,
            "initializer_range": 0.06,
        },
        image_token_id=words.IMAGE,
        video_token_id=words.VIDEO,
        vision_start_token_id=words.VISION_START,
        vision_end_token_id=words.VISION_END,
        tie_word_embeddings=True,
        **tokens,
    )


def create(seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained model in float32; projections into the residual stream start smaller, by depth."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(configuration())
    layers = model.model.language_model.layers
    with torch.no_grad():
        for layer in layers:
            layer.self_attn.o_proj.weight *= (2 * len(layers)) ** -0.5
            layer.mlp.down_proj.weight *= (2 * len(layers)) ** -0.5
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id, generation.pad_token_id = (
        words.BOS,
        words.EOS,
        words.PAD,
    )
    generation.do_sample = False
    return model


def patches(pictures: Tensor) -> Tensor:
    """Bytes [..., side, side, 3] -> what the lab's image processor makes of them: float32 [..., patches, 192]."""
    split = pictures.unflatten(-3, (-1, MERGE, PATCH)).unflatten(-2, (-1, MERGE, PATCH))
    lead = split.ndim - 7
    order = [lead + axis for axis in (0, 3, 1, 4, 6, 2, 5)]  # cells, patches of a cell, channel, pixels
    flat = split.permute(*range(lead), *order).flatten(-3).flatten(-5, -2)
    return flat.float() / 127.5 - 1


def positions(images: int, questions: int, grid: int) -> Tensor:
    """Rotary positions (time, row, column) of an album and the tokens after it: [3, length]."""
    cells = torch.arange(grid * grid)
    picture = torch.stack([torch.zeros_like(cells), cells // grid, cells % grid])
    pieces, following = [torch.zeros(3, 1, dtype=torch.int64)], 1
    for _ in range(images):
        for part in (_line(3), picture, _line(1 + PASSAGE)):
            pieces.append(following + part)
            following = int(pieces[-1].max()) + 1
    pieces.append(following + _line(questions))
    return torch.cat(pieces, 1)


def _line(length: int) -> Tensor:
    return torch.arange(length).expand(3, -1)


class Forward:
    """Hidden states of whole batches of albums, from the modules of a transformers model.

    Called with tokens [batch, length] (an album's tokens, then questions) and pictures, bytes
    [batch, images, side, side, 3]; returns [batch, length, hidden]. All albums have as many images.
    """

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, *, compiled: bool = False) -> None:
        self.model = model
        self._run = torch.compile(_hidden_states, dynamic=False) if compiled else _hidden_states
        self._angles: dict[tuple[int, int, int], tuple[Tensor, ...]] = {}

    def __call__(self, tokens: Tensor, pictures: Tensor) -> Tensor:
        shape = (pictures.shape[1], tokens.shape[1], pictures.shape[2] // CELL)
        if shape not in self._angles:
            self._angles[shape] = self._rotary(*shape)
        return self._run(self.model.model, tokens, patches(pictures), *self._angles[shape])

    def _rotary(self, images: int, length: int, cells: int) -> tuple[Tensor, ...]:
        """Cosines and sines, ready to broadcast over heads: the text's [1, 1, length, dim], a picture's."""
        from transformers.vision_utils import get_vision_position_ids

        language, visual = self.model.model.language_model, self.model.model.visual
        like = torch.zeros(1, device=self.model.device)
        places = positions(images, length - 1 - images * slot(cells), cells)[:, None].to(like.device)
        grid = get_vision_position_ids(torch.tensor([[1, cells * MERGE, cells * MERGE]]), MERGE)
        text = language.rotary_emb(like, places)
        picture = visual.rotary_pos_emb(like, grid.to(like.device))
        return (*(part[:, None] for part in text), *(part[None, None] for part in picture))


def _hidden_states(
    model: Any, tokens: Tensor, pixels: Tensor, cos: Tensor, sin: Tensor, cos2d: Tensor, sin2d: Tensor
) -> Tensor:
    batch, images = pixels.shape[:2]
    states = F.embedding(tokens, model.language_model.embed_tokens.weight)  # [batch, length, hidden]
    cells = _see(model.visual, pixels.flatten(0, 1), cos2d, sin2d)  # [batch x images, cells, hidden]
    cells = cells.unflatten(0, (batch, images)).to(states.dtype)
    shown = cells.shape[2]
    album = slice(1, 1 + images * (3 + shown + 1 + PASSAGE))
    slots = states[:, album].unflatten(1, (images, -1))
    slots = torch.cat([slots[:, :, :3], cells, slots[:, :, 3 + shown :]], 2)
    states = torch.cat([states[:, :1], slots.flatten(1, 2), states[:, album.stop :]], 1)
    return _read(model.language_model, states, cos, sin)


def _see(visual: Any, pixels: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The vision tower over pictures of equal grids: [pictures, patches, 192] -> [pictures, cells, hidden]."""
    states = F.linear(pixels, visual.patch_embed.proj.weight.flatten(1))
    for block in visual.blocks:
        attention = block.attn
        split = attention.qkv(_norm(block.norm1, states)).unflatten(-1, (3, attention.num_heads, -1))
        queries, keys, values = split.permute(2, 0, 3, 1, 4)  # [pictures, heads, patches, dim]
        mixed = F.scaled_dot_product_attention(_turn(queries, cos, sin), _turn(keys, cos, sin), values)
        states = states + attention.proj(mixed.transpose(1, 2).flatten(2))
        states = states + block.mlp(_norm(block.norm2, states))
    merger = visual.merger
    return merger.mlp(_norm(merger.ln_q, states).unflatten(1, (-1, MERGE * MERGE)).flatten(2))


def _read(language: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The language model's layers: [batch, length, hidden] -> the same, after the last norm."""
    for layer in language.layers:
        attention, read = layer.self_attn, _norm(layer.input_layernorm, states)
        queries, keys, values = (  # [batch, heads, length, dim]
            project(read).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        mixed = F.scaled_dot_product_attention(
            _turn(queries, cos, sin), _turn(keys, cos, sin), values, is_causal=True, enable_gqa=True
        )
        states = states + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        states = states + layer.mlp(_norm(layer.post_attention_layernorm, states))
    return _norm(language.norm, states)


def _norm(norm: Any, states: Tensor) -> Tensor:
    weight = norm.weight.to(states.dtype)
    return F.rms_norm(states, weight.shape, weight, norm.variance_epsilon)


def _turn(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: turn each pair of (first half, second half) by its angle."""
    first, second = states.chunk(2, -1)
    return (states * cos + torch.cat([-second, first], -1) * sin).to(states.dtype)
