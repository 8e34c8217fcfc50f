"""The decoder alone is written as a text model, and gives what the whole model gives."""

import json

import pytest
import torch
from published_folders import write_internvl
from safetensors.torch import load_file
from test_export import prompt_for
from tiny import assert_close, text_model, vision_model, words
from transformers import AutoModelForCausalLM, DynamicCache

import kvweave
from kvweave import models
from kvweave.models import decoder


def in_bfloat16(model):
    """As `from_pretrained` loads it: weights rounded, and not the angles of rotary."""
    for weight in model.parameters():
        weight.data = weight.data.bfloat16()
    return model


MODELS = {
    "llama": lambda: text_model("llama"),
    "llava": lambda: text_model("llava"),
    "llava, bfloat16": lambda: in_bfloat16(text_model("llava")),
    "internvl": lambda: text_model("internvl"),
    "smolvlm": lambda: text_model("smolvlm"),
    "qwen2_vl": lambda: vision_model(kind="qwen2_vl"),
    "qwen2_5_vl": vision_model,
    "qwen3_vl": lambda: text_model("qwen3_vl"),
    "qwen3_vl_moe": lambda: text_model("qwen3_vl_moe"),
    "tied": lambda: text_model("llava", text_config={"tie_word_embeddings": True}, tie_word_embeddings=True),
}
CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_text_model_gives_the_logits_of_the_whole(make, tmp_path):
    model = make()
    said = models.export_decoder(model, tmp_path / "decoder")
    text, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder", output_loading_info=True)
    assert not any(loading.values()), loading
    ids = words(2, 70)
    with torch.no_grad():
        ours, theirs = text.eval()(input_ids=ids).logits, model(input_ids=ids).logits
    assert_close(ours, theirs, 1e-6 if model.dtype == torch.float32 else 1e-2)
    assert said["model"] == type(text).__name__ == f"{CLASSES[text.config.model_type]}ForCausalLM"
    assert said["parameters"] == text.num_parameters()
    assert text.dtype == model.dtype
    assert text.get_output_embeddings().weight.shape == (96, 32)
    assert [file.name for file in tmp_path.iterdir()] == ["decoder"]
    config = json.loads((tmp_path / "decoder" / "config.json").read_text())
    assert config["architectures"] == [said["model"]]
    assert "vision" not in json.dumps(config)
    assert "mrope" not in json.dumps(config)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "qwen2_5_vl"])
def test_the_decoder_goes_on_from_an_exported_context(kind, tmp_path):
    """Pictures, method and all went into the context; the decoder has never seen any."""
    model = MODELS[kind]()
    inputs = prompt_for(model)
    with kvweave.compress(model, kvweave.SnapKV(budget=0.4, window=4)) as session:
        reply = model.generate(**inputs, max_new_tokens=9)[0, 40:].tolist()
        model.generate(**inputs, max_new_tokens=1)
        context = session.cache.export(tmp_path / "context", first_token=reply[0])
    said = models.export_decoder(model, tmp_path / "decoder")
    assert json.loads((tmp_path / "decoder" / decoder.MARK).read_text()) == {"model": context["model"]}
    assert said["mark"] == context["model"]
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder").eval()
    tensors, cache = load_file(tmp_path / "context"), DynamicCache(config=text.config)
    for layer in range(2):
        cache.update(tensors[f"k{layer}"][None], tensors[f"v{layer}"][None], layer)
    ids = torch.tensor([[0] * context["slots"] + reply[:1]])  # what stands for the slots is never read
    out = text.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
    )
    assert out[0, -8:].tolist() == reply[1:]


@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
def test_the_tokenizer_and_the_stops_are_written_too(tmp_path, kind):
    write_internvl(tmp_path / "model", kind)
    model, processor = models.load(str(tmp_path / "model"))
    tokenizer = processor.tokenizer
    models.export_decoder(model, tmp_path / "decoder", processor)
    back = models.load_tokenizer(str(tmp_path / "decoder"))
    assert back.encode("the red one") == tokenizer.encode("the red one")
    assert back.chat_template == tokenizer.chat_template
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")
    assert text.generation_config.eos_token_id == model.generation_config.eos_token_id


def test_a_tokenizer_that_would_be_read_otherwise_is_refused(tmp_path):
    model, processor = models.load("lab")
    with pytest.raises(models.ModelError, match="read back as a Qwen2Tokenizer, and encodes otherwise"):
        models.export_decoder(model, tmp_path / "decoder", processor)
    assert not list(tmp_path.iterdir())
    assert models.export_decoder(model, tmp_path / "decoder")["model"] == "Qwen2ForCausalLM"


# -------------------------------------------------------------------- what is refused

REFUSED = {
    "glm4v_text": ("glm4v", "model_type='glm4v_text', which no text model computes: allowed is one of qwen2_vl_text"),
    "cross attention": ("mllama", "reads an encoder's states"),
}


@pytest.mark.parametrize(("kind", "message"), REFUSED.values(), ids=REFUSED)
def test_a_decoder_that_no_text_model_computes_is_refused(kind, message, tmp_path):
    with pytest.raises(models.ModelError, match=message):
        models.export_decoder(text_model(kind), tmp_path / "decoder")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_plain_are_refused(tmp_path):
    model = text_model("llava")
    layer = model.model.language_model.layers[1].self_attn
    layer.q_proj = torch.nn.Sequential(layer.q_proj)
    with pytest.raises(models.ModelError, match=r"'model.layers.1.self_attn.q_proj.*allowed are plain weights"):
        models.export_decoder(model, tmp_path / "decoder")
    assert not list(tmp_path.iterdir())


def test_other_logits_are_refused_and_nothing_is_left(tmp_path):
    model = text_model("llava")
    model.lm_head.register_forward_hook(lambda module, args, out: out + 0.01)
    with pytest.raises(models.ModelError, match="is no LlamaForCausalLM: its logits differ by 1"):
        models.export_decoder(model, tmp_path / "decoder")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("gap", [1, -1])
def test_a_position_too_many_is_seen_in_half_precision(tmp_path, gap, monkeypatch):
    """Though it changes logits by less than half precision may round them."""
    monkeypatch.setattr(decoder, "_ULPS", 1e4)
    model = in_bfloat16(text_model("llava"))

    def shift(module, args, kwargs):
        places = torch.arange(kwargs["inputs_embeds"].shape[1])
        return args, kwargs | {"position_ids": (places + gap * (places >= len(places) // 2))[None]}

    model.model.language_model.register_forward_pre_hook(shift, with_kwargs=True)
    with pytest.raises(models.ModelError, match="is no LlamaForCausalLM: its logits differ"):
        models.export_decoder(model, tmp_path / "decoder")


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder" / "mine.txt").write_text("keep")
    with pytest.raises(models.ModelError, match="decoder is not empty: allowed is a folder that is, or a new one"):
        models.export_decoder(text_model("llama"), tmp_path / "decoder")
    assert [file.name for file in (tmp_path / "decoder").iterdir()] == ["mine.txt"]
    (tmp_path / "decoder" / "mine.txt").unlink()
    assert models.export_decoder(text_model("llama"), tmp_path / "decoder")["model"] == "LlamaForCausalLM"
