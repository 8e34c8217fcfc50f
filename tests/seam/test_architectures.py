"""Every architecture: full-attention layers are compressed, exactly; the rest is left alone, and said so."""

import json
import warnings
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import transformers
from methods_for_tests import Heavier
from tiny import (
    DEFAULT,
    IMAGE,
    MROPE,
    assert_close,
    build,
    cut_of,
    decode,
    masked,
    picture_inputs,
    text_inputs,
    text_model,
    tiny_config,
    vision_model,
)

import kvweave
from kvweave.evals.calibration import fit

LENGTHS = (24, 19)  # the second row is left-padded
FULL = ["full_attention", "full_attention"]
SLIDING = ["sliding_attention", "full_attention"]


def rotary(*sections):
    return {
        "rope_type": "default",
        "rope_theta": 100.0,
        "mrope_section": list(sections),
        "partial_rotary_factor": 1.0,
    }


@dataclass
class Architecture:
    """How to build it tiny, and the kinds of its layers as the report should name them."""

    special: dict
    kinds: tuple = ("full_attention", "full_attention")
    attention: str = "sdpa"


def text(**special):
    return {"text_config": special}


CODEBOOK = {"base_channels": 32, "embed_dim": 8, "latent_channels": 32, "channel_multiplier": [1]}
ARCHITECTURES = {
    "qwen2_vl": Architecture(text(rope_parameters=MROPE)),
    "qwen2_5_vl": Architecture(text(rope_parameters=MROPE)),
    "qwen3_vl": Architecture(text(rope_parameters=MROPE)),
    "qwen3_vl_moe": Architecture(text(rope_parameters=MROPE)),
    "qwen3_5": Architecture(
        text(
            layer_types=["linear_attention", "full_attention"],
            rope_parameters=rotary(2, 1, 1),
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
        ("linear_attention", "full_attention"),
    ),
    "qwen2_5_omni_thinker": Architecture(
        text(rope_parameters=MROPE)
        | {
            "vision_start_token_id": 7,
            "audio_config": {
                "d_model": 32,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "n_window": 10,
                "output_dim": 32,
                "num_mel_bins": 16,
            },
        }
    ),
    "glm4v": Architecture(text(rope_parameters=rotary(2, 1, 1))),
    "glm4v_moe": Architecture(text(rope_parameters=rotary(2, 1, 1))),
    "ernie4_5_vl_moe": Architecture(text(rope_parameters=rotary(1, 1, 2), moe_intermediate_size=[16, 16])),
    "video_llama_3": Architecture({}),
    "llava": Architecture({}),
    "llava_next": Architecture({}),
    "llava_onevision": Architecture({}),
    "video_llava": Architecture({}),
    "internvl": Architecture({}),
    "ovis2": Architecture({}),
    "got_ocr2": Architecture({}, attention="eager"),
    "gemma3": Architecture(text(layer_types=SLIDING, sliding_window=6), tuple(SLIDING)),
    "paligemma": Architecture({}),
    "idefics2": Architecture(
        text(sliding_window=None)
        | {
            "vision_config": {"hidden_size": 32},
            "perceiver_config": {"num_key_value_heads": 2, "resampler_n_heads": 4, "resampler_head_dim": 8},
        }
    ),
    "idefics3": Architecture({}),
    "smolvlm": Architecture({}),
    "mistral3": Architecture(text(sliding_window=None)),
    "llama4": Architecture(
        text(
            layer_types=["chunked_attention", "full_attention"],
            num_local_experts=2,
            intermediate_size_mlp=48,
            attention_chunk_size=8,
        )
        | {"vision_config": {"intermediate_size": 64, "vision_output_dim": 32, "projector_input_dim": 32}},
        ("chunked_attention", "full_attention"),
    ),
    "aria": Architecture({}),
    "phi4_multimodal": Architecture({}),
    "cohere2_vision": Architecture(text(layer_types=SLIDING, sliding_window=6), tuple(SLIDING)),
    "aya_vision": Architecture(text(layer_types=SLIDING, sliding_window=6), tuple(SLIDING)),
    "chameleon": Architecture(
        {
            "vocabulary_map": {"<image>": IMAGE, **{f"IMGIMGBS{chr(65 + i)}Z": 20 + i for i in range(8)}},
            "vq_config": CODEBOOK | {"num_embeddings": 8, "num_res_blocks": 1},
        }
    ),
    "deepseek_vl": Architecture({}),
    "emu3": Architecture(
        {
            "vocabulary_map": {
                "<image>": IMAGE,
                "<|extra_200|>": 9,
                **{f"<|visual token {i:06d}|>": 20 + i for i in range(8)},
            },
            "vq_config": {"base_channels": 32, "codebook_size": 8, "channel_multiplier": [1]},
        }
    ),
    "janus": Architecture({"vq_config": {"base_channels": 32, "num_embeddings": 8, "channel_multiplier": [1]}}),
    "fuyu": Architecture({}),
    "lfm2_vl": Architecture(text(layer_types=["conv", "full_attention"]), ("conv", "full_attention")),
    "mllama": Architecture({}),
    "gpt_oss": Architecture({"layer_types": SLIDING, "sliding_window": 6}, tuple(SLIDING), "eager"),
    "blip-2": Architecture({"num_query_tokens": 8, "text_config": {"ffn_dim": 32, "word_embed_proj_dim": 32}}),
    "gemma4": Architecture(
        text(
            num_hidden_layers=4,
            layer_types=SLIDING * 2,
            sliding_window=6,
            num_kv_shared_layers=2,
            head_dim=8,
            global_head_dim=8,
            num_global_key_value_heads=2,
            vocab_size_per_layer_input=96,
            hidden_size_per_layer_input=8,
        )
        | {"audio_config": None},
        ("sliding_attention", "full_attention", "sliding_attention", "full_attention"),
    ),
}
if transformers.__version__ == "5.24.0":
    del ARCHITECTURES["llama4"]  # transformers itself asks its output for `image_outputs`, which it has not
SHARED = {"gemma4": {2, 3}}  # layers that read the keys of an earlier one


@cache
def tiny(name):
    case = ARCHITECTURES[name]
    return build(tiny_config(name, **case.special), attention=case.attention)


def inputs_for(name):
    inputs = text_inputs(LENGTHS)
    if name == "blip-2":  # its generate asks for pictures
        inputs = text_inputs(LENGTHS, images=())
        inputs["input_ids"][:, 8:16] = IMAGE
        inputs["pixel_values"] = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return inputs


@pytest.fixture(params=ARCHITECTURES, scope="module")
def name(request):
    return request.param


def compressed_numbers(name):
    kinds = ARCHITECTURES[name].kinds
    return [i for i, kind in enumerate(kinds) if kind == "full_attention" and i not in SHARED.get(name, ())]


def test_full_attention_layers_keep_the_floor_and_decode_equals_the_oracle(name):
    model, inputs = tiny(name), inputs_for(name)
    _, plain = decode(model, inputs)
    with kvweave.compress(model, kvweave.SnapKV(budget=0.3, window=4)) as session:
        tokens, logits = decode(model, inputs)
    layers = session.report["layers"]
    assert [layer["kind"] for layer in layers if layer["layer"] not in SHARED.get(name, ())] == [
        kind for i, kind in enumerate(ARCHITECTURES[name].kinds) if i not in SHARED.get(name, ())
    ]
    for number in range(len(ARCHITECTURES[name].kinds)):
        if number not in compressed_numbers(name):
            assert number >= len(layers) or not layers[number]["compressed"]
            continue
        positions = session.cache.layers[number].positions
        for row, length in enumerate(LENGTHS):
            kept = ((positions[row] >= 0) & (positions[row] < max(LENGTHS))).sum(-1)
            assert kept.tolist() == [int(0.3 * length)] * positions.shape[1]
            assert ((positions[row] < 0) | (positions[row] >= max(LENGTHS) - length)).all()
    json.dumps(session.report)
    assert torch.equal(logits[:, 0], plain[:, 0])
    assert (logits - plain)[:, 1:].abs().max() > 1e-2  # the cut is felt, so that agreement means something
    with masked(model, cut_of(session.cache, max(LENGTHS))):
        same_tokens, expected = decode(model, inputs)
    assert torch.equal(tokens, same_tokens)
    assert_close(logits, expected)


def test_budget_one_is_bit_identical(name):
    model, inputs = tiny(name), inputs_for(name)
    tokens, logits = decode(model, inputs)
    with kvweave.compress(model, kvweave.SnapKV(budget=1.0)):
        mine, mine_logits = decode(model, inputs)
    assert torch.equal(mine, tokens)
    assert torch.equal(mine_logits, logits)


def test_layer_adaptive_methods_cut_every_full_attention_layer(name):
    model = tiny(name)
    with kvweave.compress(model, Heavier(budget=0.25)) as session:
        _, logits = decode(model, inputs_for(name), 3)
    cut = [layer["layer"] for layer in session.report["layers"] if layer["compressed"]]
    assert cut == compressed_numbers(name)
    totals = [0, 0]
    for number in cut:
        positions = session.cache.layers[number].positions
        for row in range(2):
            counts = ((positions[row] >= 0) & (positions[row] < max(LENGTHS))).sum(-1)
            assert counts.unique().numel() == 1
            totals[row] += int(counts[0])
    assert totals == [len(cut) * int(0.25 * length) for length in LENGTHS]
    with masked(model, cut_of(session.cache, max(LENGTHS))):
        assert_close(logits, decode(model, inputs_for(name), 3)[1])


def test_heads_shares_can_be_fitted_or_are_refused_by_name(name, monkeypatch):
    """What is whole costs nothing, what is cut something, and every head's count has a gradient."""
    monkeypatch.setattr(fit, "REPLY", 12)
    model, inputs = tiny(name), {key: value[:1] for key, value in inputs_for(name).items()}
    if name == "blip-2":
        with pytest.raises(ValueError, match="Blip2ForConditionalGeneration generates without calling"):
            fit.Lesson.of(model, inputs)
        return
    lesson = fit.Lesson.of(model, inputs)
    assert lesson is not None
    assert len(lesson.ranks) == len(compressed_numbers(name))
    counts = torch.full((sum(map(len, lesson.ranks)),), float(LENGTHS[0]))
    with torch.no_grad():
        assert float(lesson.cost(model, counts, soft=False)) == pytest.approx(0, abs=1e-6)
    counts = (counts / 5).requires_grad_(True)
    cost = lesson.cost(model, counts)
    if "linear_attention" in ARCHITECTURES[name].kinds:
        with pytest.raises(ValueError, match="writes over what a gradient needs"):
            fit.descend(model, cost)
        return
    fit.descend(model, cost)
    assert counts.grad is not None
    assert (counts.grad != 0).all()


# -------------------------------------------------------------------- pictures themselves


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_models_that_are_given_pictures(kind):
    model = vision_model(kind=kind)
    inputs = picture_inputs((24, 19))
    plain = decode(model, inputs)[1]
    with kvweave.compress(model, kvweave.SnapKV(budget=0.3, window=4)) as session:
        logits = decode(model, inputs)[1]
    assert torch.equal(session.cache.prompt.visual[:, :24], inputs["input_ids"] == IMAGE)
    assert torch.equal(logits[:, 0], plain[:, 0])
    assert (logits - plain)[:, 1:].abs().max() > 1e-2
    with masked(model, cut_of(session.cache, 24)):
        assert_close(logits, decode(model, inputs)[1])


def mllama(attention="sdpa"):
    vision = {
        "num_global_layers": 1,
        "max_num_tiles": 1,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 64,
        "attention_heads": 2,
        "supported_aspect_ratios": [[1, 1]],
    }
    special = {"text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]}, "vision_config": vision}
    return build(tiny_config("mllama", **special), attention=attention)


@pytest.mark.parametrize("length", [5, 8, 24])  # five vision keys, eight with their padding
def test_cross_attention_layers_are_left_alone_whatever_the_prompts_length(length):
    model = mllama()
    inputs = text_inputs((length,), images=((0, 1),)) | {
        "pixel_values": torch.randn(1, 1, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, length, 1, 1, dtype=torch.long),
    }
    _, plain = decode(model, inputs)
    with kvweave.compress(model, kvweave.SnapKV(budget=0.4, window=4)) as session:
        _, logits = decode(model, inputs)
    layers = session.report["layers"]
    assert [layer["compressed"] for layer in layers] == [True, False, True]
    assert layers[1]["kind"] == "cross_attention"
    assert [layer["kept"] for layer in layers if layer["compressed"]] == [int(0.4 * length)] * 2
    assert torch.equal(logits[:, 0], plain[:, 0])
    with masked(model, cut_of(session.cache, length)):
        assert_close(logits, decode(model, inputs)[1])


# -------------------------------------------------------------------- those that cannot


def opaque(kind):
    if kind == "git":
        return text_model("git", attention="eager")
    return text_model(kind, **({"kv_channels": 8, "head_dim": DEFAULT} if kind == "jetmoe" else {}))


OPAQUE = {
    "git": "attention is not looked up by name",
    "jetmoe": "keys are transformed after the cache",
    "diffllama": "values are transformed after the cache",  # a head reads values of two heads' tokens
    "doge": "attention adds a bias of each head's own",  # made from the values that the cache returns
}


@pytest.mark.parametrize("kind", OPAQUE)
def test_a_model_without_a_layer_to_compress_warns_and_runs_as_it_would_alone(kind):
    model = opaque(kind)
    tokens, logits = decode(model, text_inputs())
    with (
        kvweave.compress(model, kvweave.SnapKV(budget=0.3, window=4)) as session,
        pytest.warns(UserWarning, match=f"compressed no layer of {type(model).__name__}"),
    ):
        mine, mine_logits = decode(model, text_inputs())
    assert torch.equal(mine, tokens)
    assert torch.equal(mine_logits, logits)
    assert [(layer["compressed"], layer["kind"]) for layer in session.report["layers"]] == [(False, OPAQUE[kind])] * 2
    assert session.report["totals"]["layers"] == 0


def test_a_model_of_sliding_layers_alone_is_warned_about_and_reported_by_their_kind():
    model = text_model("mistral", sliding_window=6)
    with (
        kvweave.compress(model, kvweave.SnapKV(budget=0.3)) as session,
        pytest.warns(UserWarning, match="compressed no layer.*sliding"),
    ):
        decode(model, text_inputs())
    assert [layer["kind"] for layer in session.report["layers"]] == ["sliding_attention"] * 2


@pytest.mark.parametrize("kind", ["t5", "florence2"])
def test_encoder_decoders_are_refused_by_name(kind):
    vision = {
        "patch_size": DEFAULT,
        "embed_dim": [8] * 4,
        "num_heads": [1] * 4,
        "num_groups": [1] * 4,
        "depths": [1] * 4,
    }
    inner = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    special = {"vision_config": vision, "text_config": inner} if kind == "florence2" else {}
    model = build(tiny_config(kind, **special), attention="eager")
    with pytest.raises(ValueError, match="encoder-decoder"), kvweave.compress(model, kvweave.H2O(budget=0.5)):
        pass


def test_flex_attention_is_refused_by_name():
    model = text_model()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="flex_attention"), kvweave.compress(model, kvweave.H2O(budget=0.5)):
        pass
    assert model.config._attn_implementation == "flex_attention"


def test_what_is_no_transformers_model_is_refused():
    with pytest.raises(TypeError, match="Linear"), kvweave.compress(torch.nn.Linear(2, 2), kvweave.H2O(budget=0.5)):
        pass


def test_no_warning_where_layers_were_compressed():
    model = text_model()
    with warnings.catch_warnings(), kvweave.compress(model, kvweave.SnapKV(budget=0.3)):
        warnings.simplefilter("error")
        decode(model, text_inputs())


SLIDERS = {
    "gemma2": lambda seed: text_model("gemma2", attention="eager", seed=seed, layer_types=SLIDING, sliding_window=6),
    "gemma3": lambda seed: build(tiny_config("gemma3", **ARCHITECTURES["gemma3"].special), seed=seed),
    "gemma4": lambda seed: build(tiny_config("gemma4", **ARCHITECTURES["gemma4"].special), seed=seed),
    "gpt_oss": lambda seed: text_model(
        "gpt_oss", attention="eager", seed=seed, layer_types=SLIDING, sliding_window=6
    ),
    "cohere2": lambda seed: text_model("cohere2", seed=seed, layer_types=SLIDING, sliding_window=6),
    "mistral": lambda seed: text_model("mistral", seed=seed, sliding_window=6),  # no layer to compress
    "llama4": lambda seed: build(tiny_config("llama4", **ARCHITECTURES["llama4"].special), seed=seed),
}
if "llama4" not in ARCHITECTURES:
    del SLIDERS["llama4"]
#: 5.17 itself cannot decode gemma2 with an assistant that slides: eager attention is given more keys than mask.
ASSISTED = ("gpt_oss", "mistral", *(() if transformers.__version__.startswith("5.17.") else ("gemma2",)))


@pytest.mark.filterwarnings("ignore:kvweave compressed no layer")
@pytest.mark.parametrize("method", [kvweave.SnapKV(budget=0.3, window=4), kvweave.Full()], ids=["snapkv", "full"])
@pytest.mark.parametrize(
    ("kind", "how"),
    [(kind, "look-up") for kind in SLIDERS] + [(kind, "assistant") for kind in ASSISTED],
)
def test_drafts_are_taken_back_from_layers_that_slide(kind, how, method):
    """`generate` tells the cache that it makes to record their past, before the first forward pass."""
    model, inputs = SLIDERS[kind](0), text_inputs((30,), images=())
    if kind == "gemma3":
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    options = {"prompt_lookup_num_tokens": 4} if how == "look-up" else {"assistant_model": SLIDERS[kind](1)}
    with kvweave.compress(model, method):
        tokens = model.generate(**inputs, max_new_tokens=12)
        drafted = model.generate(**inputs, max_new_tokens=12, **options)
    assert torch.equal(drafted, tokens)


SMALL = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
KOSMOS = {
    "kosmos-2": ({}, {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))}),
    "kosmos-2.5": (
        {"vision_config": {"patch_embed_hidden_size": 12, "max_num_patches": 16}},
        {"flattened_patches": torch.rand(2, 6, 14, generator=torch.Generator().manual_seed(5)).round()},
    ),
}


@pytest.mark.parametrize("kind", KOSMOS)
def test_image_positions_of_a_models_own_input_count_as_visual(kind):
    """Kosmos has no placeholder: it is told where its images stand."""
    special, images = KOSMOS[kind]
    model = build(tiny_config(kind, latent_query_num=4, text_config=SMALL, **special))
    inputs = text_inputs(LENGTHS, images=())
    places = torch.zeros_like(inputs["input_ids"])
    places[:, 8:12] = 1
    inputs |= images | {"image_embeds_position_mask": places}
    plain = model.generate(**inputs, max_new_tokens=4)
    with warnings.catch_warnings(), kvweave.compress(model, kvweave.FlowMM(budget=1.0)) as session:
        warnings.simplefilter("error")
        assert torch.equal(model.generate(**inputs, max_new_tokens=4), plain)
        seen = session.cache.prompt.visual
        with torch.no_grad():
            model(**inputs)
    assert torch.equal(seen[:, :24], places.bool())
    assert not seen[:, 24:].any()
    assert torch.equal(session.cache.prompt.visual, places.bool())


def test_images_that_no_token_stands_for_are_said_so():
    """To a method that goes by modality, and to no other."""
    model, inputs = vision_model(), picture_inputs((24,))
    inputs["mm_token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    told = r"flowmm.*no token was recognised as visual although pixel_values"
    with torch.no_grad(), kvweave.compress(model, kvweave.FlowMM(budget=0.5)), pytest.warns(UserWarning, match=told):
        model(**inputs)
    with torch.no_grad(), kvweave.compress(model, kvweave.H2O(budget=0.5)), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs)
