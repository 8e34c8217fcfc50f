"""A plain model goes on from exported keys and values, counting from their number, as the compressed cache does."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_saved import filled
from tiny import (
    DEFAULT,
    MROPE,
    assert_close,
    picture_inputs,
    text_inputs,
    text_model,
    tiny_config,
    vision_model,
    words,
)
from transformers import AutoModelForCausalLM, DynamicCache

import kvweave
from kvweave.seam.names import CACHE
from kvweave.seam.positions import rotations

STEPS = 8
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "llama": lambda: text_model("llama"),
    "llama, yarn": lambda: text_model("llama", rope_parameters=YARN),
    "llama, llama3": lambda: text_model("llama", rope_parameters=LLAMA3),
    "llava": lambda: text_model("llava"),
    "internvl": lambda: text_model("internvl"),
    "glm, interleaved channels": lambda: text_model("glm"),
    "gpt_neox, part of the channels": lambda: text_model(
        "gpt_neox", rope_parameters=MROPE | {"partial_rotary_factor": 0.5}
    ),
    "smollm3, one layer without rotary": lambda: text_model("smollm3", no_rope_layers=[1, 0]),
    "smollm3, no rotary": lambda: text_model("smollm3", no_rope_layers=[0, 0]),
    "qwen2_vl": lambda: vision_model(kind="qwen2_vl"),
    "qwen2_5_vl": vision_model,
}
METHODS = {
    "snapkv": kvweave.SnapKV(budget=0.4, window=4),
    "flowmm": kvweave.FlowMM(budget=0.4, proxies=4, mass_bias=False),
    "full": kvweave.Full(),
}
SNAPKV = METHODS["snapkv"]


def prompt_for(model, length=40):
    pictures = model.config.model_type.startswith("qwen2")
    return picture_inputs((length,)) if pictures else text_inputs((length,))


def prefilled(model, method, inputs=None):
    """A cache that holds the prompt, and the first token of the reply."""
    cache = kvweave.CompressedCache(model.config, method)
    with torch.no_grad(), kvweave.attach(model):
        logits = model(**(prompt_for(model) if inputs is None else inputs), **{CACHE: cache}).logits
    return cache, int(logits[0, -1].argmax())


def compressed_reply(model, cache, token, steps=STEPS):
    """Greedy tokens and logits of the model over the compressed cache; it finds the positions itself."""
    tokens, logits = [], []
    with torch.no_grad(), kvweave.attach(model):
        for _ in range(steps):
            logits.append(model(input_ids=torch.tensor([[token]]), **{CACHE: cache}).logits[0, -1])
            token = int(logits[-1].argmax())
            tokens.append(token)
    return tokens, torch.stack(logits)


def plain_reply(model, path, token, steps=STEPS):
    """The same by the model alone, over a plain cache of the file's tensors, at positions from their number on."""
    tensors, slots = load_file(path), said_by(path)["slots"]
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for layer in range(len(tensors) // 2):
        cache.update(tensors[f"k{layer}"][None], tensors[f"v{layer}"][None], layer)
    axes = (3,) if model.config.model_type.startswith("qwen2") else ()
    tokens, logits = [], []
    with torch.no_grad():
        for n in range(steps):
            position = torch.full((*axes, 1, 1), slots + n)
            step = {"input_ids": torch.tensor([[token]]), "position_ids": position, CACHE: cache}
            logits.append(model(**step).logits[0, -1])
            token = int(logits[-1].argmax())
            tokens.append(token)
    return tokens, torch.stack(logits)


def said_by(path):
    with safe_open(path, "pt") as file:
        assert file.metadata().keys() == {"kvweave"}
        return json.loads(file.metadata()["kvweave"])


def assert_goes_on(model, cache, token, path, **export):
    said = cache.export(path, model, **export)
    assert said == said_by(path)
    plain, expected = plain_reply(model, path, token)
    tokens, logits = compressed_reply(model, cache, token)
    assert plain == tokens
    assert_close(expected, logits)
    return said


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_plain_model_goes_on_as_the_compressed_cache(make, method, tmp_path):
    model = make()
    cache, token = prefilled(model, method)
    said = assert_goes_on(model, cache, token, tmp_path / "context.safetensors", first_token=token)
    assert said["first_token"] == token
    assert said["tokens"] == 40
    assert said["layers"] == 2
    assert said["slots"] == cache.layers[0].keys.shape[2] - STEPS
    assert said["slots"] == 40 or method is not METHODS["full"]
    pictures = model.config.model_type.startswith("qwen2")
    assert said["next_position"] == (40 - 4 if pictures else 40)  # a picture of 2 x 2 tokens is 2 positions long


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_a_cache_goes_on_from_wherever_it_is(kind, tmp_path):
    """After decoded tokens, tokens taken back, a further prompt, and a prompt that came in pieces."""
    model, path = MODELS[kind](), tmp_path / "context.safetensors"
    cache, token = prefilled(model, SNAPKV)
    tokens, _ = compressed_reply(model, cache, token, 5)
    cache.crop(-2)
    said = assert_goes_on(model, cache, tokens[2], path)
    assert said["tokens"] == 43
    with torch.no_grad(), kvweave.attach(model):
        logits = model(input_ids=words(1, 9), **{CACHE: cache}).logits
    assert_goes_on(model, cache, int(logits[0, -1].argmax()), path)
    handle, cache = kvweave.attach(model), kvweave.CompressedCache(model.config, SNAPKV)
    inputs = prompt_for(model)
    cache.declare_prompt(46)
    with torch.no_grad():
        model(**inputs, **{CACHE: cache})
        with pytest.raises(ValueError, match="40 of the prompt's 46 tokens are cached"):
            cache.export(path)
        logits = model(input_ids=words(1, 6), **{CACHE: cache}).logits
    handle.detach()
    assert_goes_on(model, cache, int(logits[0, -1].argmax()), path)


def test_what_generate_filled_is_exported(tmp_path):
    model, path = vision_model(), tmp_path / "context.safetensors"
    inputs = prompt_for(model)
    with kvweave.compress(model, SNAPKV) as session:
        reply = model.generate(**inputs, max_new_tokens=STEPS + 1)[0, 40:].tolist()
        model.generate(**inputs, max_new_tokens=1)
        said = session.cache.export(path, first_token=reply[0])
    assert plain_reply(model, path, reply[0])[0] == reply[1:]
    assert said["method"] == SNAPKV.spelling()


def test_a_cut_that_waited_is_exported_once_it_is_made(tmp_path):
    model, path = text_model("llava"), tmp_path / "context.safetensors"
    weave = kvweave.Weave(budget=0.4, proxies=4, recent=4, mass_bias=False, defer=2)
    cache, token = prefilled(model, weave)
    with pytest.raises(ValueError, match=r"the cut of weave waits; allowed is after cache.cut_waiting"):
        cache.export(path, model)
    tokens, _ = compressed_reply(model, cache, token, 3)
    assert_goes_on(model, cache, tokens[-1], path)


@pytest.mark.parametrize("method", [SNAPKV, METHODS["full"]], ids=["snapkv", "full"])
def test_a_row_of_a_padded_batch_is_what_it_is_alone(method, tmp_path):
    model = text_model("llava")
    inputs = text_inputs((40, 40, 29))
    cache = kvweave.CompressedCache(model.config, method)
    with kvweave.attach(model):
        reply = model.generate(**inputs, max_new_tokens=4, **{CACHE: cache})
    with pytest.raises(ValueError, match="holds a batch of 3 rows; allowed is row=0 to row=2"):
        cache.export(tmp_path / "context.safetensors", model)
    with pytest.raises(ValueError, match="row=3 is not allowed: allowed is an int of 0 to 2"):
        cache.export(tmp_path / "context.safetensors", model, row=3)
    for row, length in enumerate((40, 40, 29)):
        said = cache.export(tmp_path / f"{row}.safetensors", model, row=row)
        assert said["tokens"] == said["next_position"] == length + 3
        alone, token = prefilled(model, method, {"input_ids": inputs["input_ids"][row : row + 1, 40 - length :]})
        compressed_reply(model, alone, token, 3)
        path = tmp_path / "alone.safetensors"
        assert alone.export(path, model)["slots"] == said["slots"]
        for name, tensor in load_file(path).items():
            assert_close(load_file(tmp_path / f"{row}.safetensors")[name], tensor)
        assert (
            plain_reply(model, path, int(reply[row, -1]))[0]
            == plain_reply(model, tmp_path / f"{row}.safetensors", int(reply[row, -1]))[0]
        )


def test_what_is_packed_is_exported_as_attention_reads_it(tmp_path):
    model, path = text_model("llava"), tmp_path / "context"
    cache, token = prefilled(model, kvweave.Quantized(SNAPKV, bits=4, group=4, residual=4))
    cache.export(path, model)
    assert_close(plain_reply(model, path, token, 1)[1], compressed_reply(model, cache, token, 1)[1])


def test_fixed_buffers_are_exported_as_they_are(tmp_path):
    model = text_model("llama")
    cache, token = prefilled(model, SNAPKV)
    other, _ = prefilled(model, SNAPKV)
    other.reserve(8)
    for one, name in ((cache, "slots"), (other, "fixed")):
        compressed_reply(model, one, token, 3)
        one.export(tmp_path / name, model)
    assert other.fixed
    assert said_by(tmp_path / "fixed")["next_position"] == 43
    for name, tensor in load_file(tmp_path / "slots").items():
        assert_close(load_file(tmp_path / "fixed")[name], tensor)


def test_the_same_cache_gives_the_same_file_and_stays_as_it_was(tmp_path):
    model = text_model("qwen2")
    cache = filled(model, SNAPKV, lengths=(30,), steps=3)
    cache.save(tmp_path / "before", model)
    said = [cache.export(tmp_path / name, model) for name in "ab"]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert said[0] == said[1]
    back = kvweave.CompressedCache.load(tmp_path / "before", model)
    assert back.export(tmp_path / "c", text_model("qwen2")) == said[0]  # another process with the same model
    for mine, theirs in zip(cache.layers, back.layers, strict=True):
        for name in ("keys", "values", "positions", "mass"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name))
    assert {file.name for file in tmp_path.iterdir()} == {"before", "a", "b", "c"}  # nothing half-written
    other = filled(model, SNAPKV, lengths=(29,), steps=3).export(tmp_path / "d", model)
    elsewhere = filled(text_model("qwen2", seed=1), SNAPKV, lengths=(30,), steps=3)
    elsewhere = elsewhere.export(tmp_path / "e", text_model("qwen2", seed=1))
    assert len({x["digest"] for x in (said[0], other, elsewhere)}) == 3
    assert elsewhere["model"] != said[0]["model"] == other["model"]


def test_in_a_folder_a_file_is_named_by_its_digest(tmp_path):
    model = text_model("llama")
    cache, _ = prefilled(model, SNAPKV)
    said = cache.export(tmp_path, model)
    assert [file.name for file in tmp_path.iterdir()] == [f"{said['digest']}.safetensors"]
    assert said_by(tmp_path / f"{said['digest']}.safetensors") == said
    assert cache.export(tmp_path, model) == said
    assert len(list(tmp_path.iterdir())) == 1


def test_keys_are_turned_in_full_precision_and_rounded_once(tmp_path):
    model = text_model("llama", dtype=torch.bfloat16)
    cache, _ = prefilled(model, SNAPKV)
    said = cache.export(tmp_path / "context", model)
    back = said["next_position"] - said["slots"]
    angle = -back * model.model.rotary_emb.inv_freq.float()
    cos, sin = angle.cos(), angle.sin()
    for number, layer in enumerate(cache.layers):
        keys = layer.keys[0].float()
        left, right = keys[..., :4], keys[..., 4:]
        turned = torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
        stored = load_file(tmp_path / "context")[f"k{number}"]
        assert stored.dtype == torch.bfloat16
        assert (stored == turned.to(torch.bfloat16)).float().mean() > 0.99  # a tie may fall either way
        assert_close(stored.float(), turned, 2**-8)
        assert torch.equal(load_file(tmp_path / "context")[f"v{number}"], layer.values[0])


def test_layers_without_rotary_stay_as_they_are(tmp_path):
    model = MODELS["smollm3, one layer without rotary"]()
    assert [rotation is None for rotation in rotations(model)] == [False, True]
    cache, _ = prefilled(model, SNAPKV)
    cache.export(tmp_path / "context", model)
    assert torch.equal(load_file(tmp_path / "context")["k1"], cache.layers[1].keys[0])
    assert not torch.equal(load_file(tmp_path / "context")["k0"], cache.layers[0].keys[0])


@pytest.mark.parametrize("kind", ["llama", "glm, interleaved channels", "qwen2_vl"])
def test_turns_add_up(kind):
    keys = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    for rotation in rotations(MODELS[kind]()):
        there = rotation.turned(keys, 17)
        assert_close(rotation.turned(there, -17), keys)
        assert_close(rotation.turned(there, 90), rotation.turned(keys, 107))
        assert_close(there.norm(dim=-1), keys.norm(dim=-1))


# -------------------------------------------------------------------- what is refused


REFUSED = {
    "layers": (
        "layers keep .* entries; allowed is a method that keeps as many",
        "d2o flashcache meda pyramidkv tgv vlcache",
    ),
    "heads": (r"KV heads of layer \d keep .* entries; allowed is a method that keeps as many", "adakv kvzip"),
    "pooled": (r"(layers|KV heads of layer \d) keep .* entries; allowed is a method that keeps as many", "weave"),
    "biases": ("entries of layer 0 add a bias to their logits", "match weave2"),
}
WHY = {name: message for message, names in REFUSED.values() for name in names.split()}


@pytest.mark.parametrize("name", kvweave.list_methods())
def test_an_engine_takes_the_methods_that_docs_serving_names(name, tmp_path):
    model = text_model("llava", text_config={"num_hidden_layers": 3})
    method = kvweave.parse_method(name, **({} if name == "full" else {"budget": 0.2}))
    cache, _ = prefilled(model, method, text_inputs((120,), images=((4, 40), (50, 80))))
    cache.cut_waiting()
    if name not in WHY:
        assert cache.export(tmp_path, model)["slots"] == (120 if name == "full" else 24)
        return
    with pytest.raises(ValueError, match=f"export: {WHY[name]}"):
        cache.export(tmp_path, model)
    assert not list(tmp_path.iterdir())


def test_an_engine_takes_weave_without_its_bias(tmp_path):
    model = text_model("llava")
    cache, token = prefilled(model, kvweave.Weave(budget=0.4, mass_bias=False))
    cache.cut_waiting()
    assert_goes_on(model, cache, token, tmp_path / "context")


POSITIONS = {
    "learned": ("gpt2", {}, "keys of layer 0 are not turned by the rotary tables"),
    "learned, with an offset": ("opt", {}, "keys of layer 0 are not turned by the rotary tables"),
    "dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}},
        "'dynamic'",
    ),
    "scaled queries": ("ministral3", {}, "llama_4_scaling_beta multiplies queries by their position"),
}


@pytest.mark.parametrize(("kind", "special", "message"), POSITIONS.values(), ids=POSITIONS)
def test_positions_that_are_no_pure_rotation_are_refused(kind, special, message, tmp_path):
    model = text_model(kind, **special)
    cache, _ = prefilled(model, SNAPKV, {"input_ids": words(1, 40)})
    with pytest.raises(ValueError, match=f"are no pure rotation: .*{message}"):
        cache.export(tmp_path / "context", model)


def test_alibi_is_refused():
    """By name: no key shows it. kvweave compresses none of its models today."""
    for kind, special in (("falcon", {"alibi": True, "head_dim": DEFAULT}), ("bloom", {})):
        model = AutoModelForCausalLM.from_config(tiny_config(kind, **special))
        with pytest.raises(
            ValueError, match=r"are no pure rotation: (alibi=True adds a bias|it takes no position ids)"
        ):
            rotations(model)


def test_layers_that_are_no_full_attention_are_refused(tmp_path):
    model = text_model("gemma3_text", sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    cache, _ = prefilled(model, SNAPKV)
    with pytest.raises(ValueError, match=r"layer 0 is not compressed \(.*liding.*\); allowed is full attention"):
        cache.export(tmp_path / "context", model)


def test_a_cache_without_content_or_model_is_refused(tmp_path):
    model = text_model("llama")
    cache = kvweave.CompressedCache(model.config, SNAPKV)
    with pytest.raises(ValueError, match=r"no model is attached to this cache: allowed is cache.export"):
        cache.export(tmp_path / "context")
    with pytest.raises(ValueError, match="nothing is cached yet"):
        cache.export(tmp_path / "context", model)
    with pytest.raises(ValueError, match=r"first_token=1\.5 is not allowed: allowed is a token's id, or None"):
        cache.export(tmp_path / "context", model, first_token=1.5)
