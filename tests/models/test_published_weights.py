"""Published folders' weights: the publishers' arithmetic, tensor for tensor, or a refusal that says what is wrong."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from plain_forward import internvl_features, internvl_logits, mobilevlm_features, mobilevlm_logits
from published_folders import edit, write_internvl, write_mobilevlm
from safetensors.torch import save_file

from kvweave.models import ModelError, from_published

INTERNVL = [("internlm2", "300m"), ("internlm2", "6b"), ("qwen2", "300m"), ("qwen2", "6b")]


def close(mine, theirs, tolerance=2e-5):
    scale = max(1.0, theirs.abs().max().item())
    error = (mine - theirs).abs().max().item()
    assert error <= tolerance * scale, f"error {error:.2e} at scale {scale:.1f}"


def internvl_inputs(model, lengths=(30, 21), tiles=2):
    """Prompts of text and pictures of four tokens a tile, left-padded."""
    generator = torch.Generator().manual_seed(1)
    vocabulary, visual = model.config.text_config.vocab_size, model.config.image_token_id
    ids = torch.randint(3, visual - 2, (len(lengths), max(lengths)), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        start = max(lengths) - length
        mask[row, start:] = 1
        ids[row, :start] = 2
        ids[row, start + 3 : start + 3 + 4 * tiles] = visual
    pixels = torch.randn(len(lengths) * tiles, 3, 56, 56, generator=generator)
    assert ids.max() < vocabulary
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "pixel_values": pixels,
    }


def mobilevlm_inputs(model, lengths=(160, 152), images=1):
    """Prompts of text and images of 144 tokens, left-padded."""
    generator = torch.Generator().manual_seed(1)
    visual = model.config.image_token_id
    ids = torch.randint(3, visual, (len(lengths), max(lengths)), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        start = max(lengths) - length
        mask[row, start:] = 1
        ids[row, :start] = 0
        ids[row, start + 3 : start + 3 + 144 * images] = visual
    pixels = torch.randn(len(lengths) * images, 3, 336, 336, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "pixel_values": pixels,
    }


def read(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("llm", "tower"), INTERNVL)
def test_internvl_computes_what_the_original_does(tmp_path, llm, tower, attention):
    state = write_internvl(tmp_path, llm, tower)
    model = from_published(tmp_path, attn_implementation=attention)
    inputs = internvl_inputs(model)
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        logits = model(**inputs).logits
    config, real = read(tmp_path), inputs["attention_mask"].bool()
    close(features, internvl_features(state, config, inputs["pixel_values"]))
    ids, mask, pixels = (inputs[name] for name in ("input_ids", "attention_mask", "pixel_values"))
    expected = internvl_logits(state, config, ids, mask, pixels, model.config.image_token_id)
    close(logits[real], expected[real])
    assert expected[real].std() > 0.3  # else anything would be close


@pytest.mark.parametrize("llm", ["internlm2", "qwen2"])
def test_a_prompt_beyond_the_positions_of_a_dynamic_embedding(tmp_path, llm):
    state = write_internvl(tmp_path, llm)
    model = from_published(tmp_path)
    ids = torch.randint(3, 200, (1, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    config = read(tmp_path)
    close(logits, internvl_logits(state, config, ids, torch.ones_like(ids), None, -1), 1e-4)
    edit(tmp_path / "config.json", llm_config__rope_scaling=None)
    plain = internvl_logits(state, read(tmp_path), ids, torch.ones_like(ids), None, -1)
    assert (plain - logits).abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_mobilevlm_computes_what_the_original_does(tmp_path, attention, kind):
    state = write_mobilevlm(tmp_path / "model", kind=kind)
    model = from_published(tmp_path / "model", attn_implementation=attention)
    inputs = mobilevlm_inputs(model)
    with torch.no_grad():
        features = torch.stack(list(model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output))
        logits = model(**inputs).logits
    vision, real = read(tmp_path / "clip-tiny"), inputs["attention_mask"].bool()
    close(features, mobilevlm_features(state, vision, inputs["pixel_values"]))
    ids, mask, pixels = (inputs[name] for name in ("input_ids", "attention_mask", "pixel_values"))
    expected = mobilevlm_logits(state, read(tmp_path / "model"), vision, ids, mask, pixels)
    close(logits[real], expected[real])
    assert expected[real].std() > 0.3


def test_a_batch_padded_on_the_left_generates_what_each_row_generates_alone(tmp_path):
    write_internvl(tmp_path / "a")
    write_mobilevlm(tmp_path / "b")
    for folder, make in (("a", internvl_inputs), ("b", mobilevlm_inputs)):
        model = from_published(tmp_path / folder)
        inputs = make(model)
        del inputs["position_ids"]
        options = {"max_new_tokens": 6, "eos_token_id": None}
        together = model.generate(**inputs, **options)[:, -6:]
        start = int((inputs["attention_mask"][1] == 0).sum())
        alone = {name: inputs[name][1:, start:] for name in ("input_ids", "attention_mask")}
        alone["pixel_values"] = inputs["pixel_values"].chunk(2)[1]
        assert torch.equal(together[1:], model.generate(**alone, **options)[:, -6:])


def test_the_head_is_never_the_embedding(tmp_path):
    for number, llm in enumerate(["internlm2", "qwen2"]):
        write_internvl(tmp_path / llm, llm, llm_config={**_text(tmp_path, llm), "tie_word_embeddings": True})
        model = from_published(tmp_path / llm)
        assert model.lm_head.weight is not model.get_input_embeddings().weight, number
        assert not model.config.tie_word_embeddings


def _text(tmp_path, llm):
    write_internvl(tmp_path / "first" / llm, llm)
    return read(tmp_path / "first" / llm)["llm_config"]


@pytest.mark.parametrize(
    ("given", "dtype"),
    [(None, torch.float16), ("auto", torch.float16), ("bfloat16", torch.bfloat16), (torch.float32, torch.float32)],
)
def test_dtype_is_the_folders_unless_another_is_asked_for(tmp_path, given, dtype):
    state = write_internvl(tmp_path, torch_dtype="float16")
    save_file({name: tensor.half() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    model = from_published(tmp_path, dtype=given)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_weights_are_mapped_from_their_file_and_not_held_twice(tmp_path):
    """All but the packed tensors of InternLM2 lie in the file's own memory."""
    write_internvl(tmp_path)
    model = from_published(tmp_path)
    copied = [name for name, tensor in model.named_parameters() if not _in_file(tensor, tmp_path)]
    assert all(".self_attn." in name and name.startswith("model.language_model.") for name in copied)
    assert sum(model.state_dict()[name].numel() for name in copied) < model.num_parameters() / 4


def _in_file(tensor, folder):
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        area, *_, name = line.split()
        low, high = (int(end, 16) for end in area.split("-"))
        if low <= tensor.data_ptr() < high:
            return name.startswith(str(folder))
    return False


def test_the_placeholder_and_the_stops_are_the_tokenizers(tmp_path):
    for llm in ("internlm2", "qwen2"):
        write_internvl(tmp_path / llm, llm)
        model = from_published(tmp_path / llm)
        added = json.loads((tmp_path / llm / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        ids = {entry["content"]: int(number) for number, entry in added.items()}
        assert model.config.image_token_id == ids["<IMG_CONTEXT>"]
        assert model.generation_config.eos_token_id == ids["<|im_end|>"]
        for file in ("tokenizer_config.json", "added_tokens.json", "tokenizer.model"):
            (tmp_path / llm / file).unlink(missing_ok=True)
        assert from_published(tmp_path / llm).config.image_token_id == ids["<IMG_CONTEXT>"]  # the ninth but two last
    write_mobilevlm(tmp_path / "mobile")
    model = from_published(tmp_path / "mobile")
    assert model.config.image_token_id == model.config.text_config.vocab_size
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    assert not model.generation_config.do_sample


# -------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_with_an_index(tmp_path, kind):
    state = write_internvl(tmp_path)
    whole = from_published(tmp_path).state_dict()
    _shard(tmp_path, state, kind)
    shards = from_published(tmp_path).state_dict()
    assert all(torch.equal(shards[name], tensor) for name, tensor in whole.items())


def _shard(folder, state, kind="safetensors"):
    (folder / "model.safetensors").unlink()
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names, places = list(state), {}
    for number in range(3):
        file = f"{stem}-{number + 1:05}-of-00003.{kind}"
        part = {name: state[name] for name in names[number::3]}
        save_file(part, folder / file) if kind == "safetensors" else torch.save(part, folder / file)
        places |= dict.fromkeys(part, file)
    name = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


def test_what_old_files_hold_besides_is_left_alone(tmp_path):
    state = write_mobilevlm(tmp_path / "model")
    tower = "model.vision_tower.vision_tower.vision_model.embeddings.position_ids"
    extra = {tower: torch.arange(577)[None], "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    torch.save(state | extra, tmp_path / "model" / "pytorch_model.bin")
    assert from_published(tmp_path / "model").num_parameters() == sum(tensor.numel() for tensor in state.values())


@pytest.mark.parametrize("folder", ["internvl", "mobilevlm"])
def test_each_missing_tensor_is_named(tmp_path, folder):
    state = (write_internvl if folder == "internvl" else write_mobilevlm)(tmp_path / folder)
    file = "model.safetensors" if folder == "internvl" else "pytorch_model.bin"
    for gone in list(state)[:: max(1, len(state) // 6)]:
        rest = {name: tensor for name, tensor in state.items() if name != gone}
        save_file(rest, tmp_path / folder / file) if folder == "internvl" else torch.save(
            rest, tmp_path / folder / file
        )
        with pytest.raises(ModelError, match=gone.replace(".", r"\.")):
            from_published(tmp_path / folder)


def test_a_spare_tensor_and_a_shape_are_named(tmp_path):
    state = write_internvl(tmp_path)
    save_file(state | {"language_model.lora.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"'language_model\.lora\.weight' that InternVL2\.5 has no place for"):
        from_published(tmp_path)
    packed = "language_model.model.layers.0.attention.wqkv.weight"
    save_file(state | {packed: state[packed][:-8]}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"wqkv\.weight has shape \[56, 32\], config\.json makes it \[64, 32\]"):
        from_published(tmp_path)


def test_a_shard_that_is_missing_cut_short_or_elsewhere_is_named(tmp_path):
    state = write_internvl(tmp_path)
    places = _shard(tmp_path, state)
    second = "model-00002-of-00003.safetensors"
    whole = (tmp_path / second).read_bytes()
    for left in (0, 4, 100, len(whole) - 1):
        (tmp_path / second).write_bytes(whole[:left])
        with pytest.raises(ModelError, match=f"{second} is damaged"):
            from_published(tmp_path)
    (tmp_path / second).unlink()
    with pytest.raises(ModelError, match=f"{second} is missing"):
        from_published(tmp_path)
    (tmp_path / second).write_bytes(whole)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(places, f"../{second}")}))
    with pytest.raises(ModelError, match="files beside it"):
        from_published(tmp_path)
    shutil.copy(tmp_path / second, tmp_path / "twice.safetensors")
    index.write_text(json.dumps({"weight_map": {**places, "x": "twice.safetensors"}}))
    with pytest.raises(ModelError, match=r"twice\.safetensors holds .* again"):
        from_published(tmp_path)


class Evil:
    def __reduce__(self):
        import pathlib

        return pathlib.Path.touch, (pathlib.Path("ran"),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_bin_file_runs_nothing_and_is_refused_if_cut_short(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_mobilevlm(tmp_path / "model")
    file = tmp_path / "model" / "pytorch_model.bin"
    whole = file.read_bytes()
    for left in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:left])
        with pytest.raises(ModelError, match=r"pytorch_model\.bin is damaged"):
            from_published(tmp_path / "model")
    torch.save({"model.norm.weight": Evil()}, file)
    with pytest.raises(ModelError, match="more than tensors"):
        from_published(tmp_path / "model")
    file.write_bytes(pickle.dumps({"model.norm.weight": Evil()}))
    with pytest.raises(ModelError, match="more than tensors"):
        from_published(tmp_path / "model")
    torch.save([torch.ones(2)], file)
    with pytest.raises(ModelError, match="holds a list"):
        from_published(tmp_path / "model")
    assert not (tmp_path / "ran").exists()


# -------------------------------------------------------------------- layouts

REFUSED = {
    "another pixel shuffle": ({"ps_version": "v1"}, "ps_version='v1': allowed is 'v2'"),
    "no pixel shuffle said": ({"ps_version": "absent"}, "ps_version=None: allowed is 'v2'"),
    "another language model": ({"llm_config__architectures": ["PhiForCausalLM"]}, "PhiForCausalLM"),
    "adapters": ({"use_llm_lora": 16}, "use_llm_lora=16: allowed is 0"),
    "squares": ({"pad2square": True}, "pad2square=True: allowed is False"),
    "another size": ({"force_image_size": 112}, "force_image_size=112: allowed is 56"),
    "another norm": ({"vision_config__norm_type": "batch"}, "norm_type='batch'"),
    "another rotary embedding": ({"llm_config__rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn': allowed is"),
    "no language model": ({"llm_config": "absent"}, "has no llm_config"),
    "no width": ({"llm_config__hidden_size": "absent"}, "llm_config has no hidden_size"),
}


@pytest.mark.parametrize(("changes", "words"), REFUSED.values(), ids=REFUSED)
def test_internvl_that_is_not_known_is_refused_by_name(tmp_path, changes, words):
    write_internvl(tmp_path)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(ModelError, match=r"config\.json") as refusal:
        from_published(tmp_path)
    assert words in str(refusal.value)


MOBILE_REFUSED = {
    "V1's projector": ({"mm_projector_type": "ldpnet"}, "mm_projector_type='ldpnet': allowed is 'ldpnetv2'"),
    "a patch token": ({"mm_use_im_patch_token": True}, "mm_use_im_patch_token=True: allowed is False"),
    "a patch token unsaid": ({"mm_use_im_patch_token": "absent"}, "mm_use_im_patch_token=None: allowed is False"),
    "start and end": ({"mm_use_im_start_end": True}, "mm_use_im_start_end=True"),
    "the class token": ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature='cls_patch'"),
    "another tower": (
        {"mm_vision_tower": "google/siglip"},
        "mm_vision_tower='google/siglip': allowed is openai/clip",
    ),
    "another width": ({"mm_hidden_size": 17}, "mm_hidden_size=17: allowed is 16"),
    "rotary scaling": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling="),
}


@pytest.mark.parametrize(("changes", "words"), MOBILE_REFUSED.values(), ids=MOBILE_REFUSED)
def test_mobilevlm_that_is_not_known_is_refused_by_name(tmp_path, changes, words):
    write_mobilevlm(tmp_path / "model", **changes)
    with pytest.raises(ModelError, match=r"config\.json") as refusal:
        from_published(tmp_path / "model")
    assert words in str(refusal.value)


def test_the_towers_published_name_needs_no_folder(tmp_path):
    """At its published size the tower does not fit the tiny weights; its own sizes say so."""
    write_mobilevlm(tmp_path / "model", mm_vision_tower="openai/clip-vit-large-patch14-336", mm_hidden_size=1024)
    with pytest.raises(ModelError, match=r"class_embedding has shape \[16\], config\.json makes it \[1024\]"):
        from_published(tmp_path / "model")


def test_a_folder_of_another_layout_is_refused(tmp_path):
    for config, words in (
        ({"model_type": "llama"}, "model_type='llama'"),
        ({}, "model_type=None"),
        ([], "holds a list"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=words):
            from_published(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        from_published(tmp_path)
    write_internvl(tmp_path)
    with pytest.raises(ModelError, match="dtype='int8' is not allowed"):
        from_published(tmp_path, dtype="int8")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        from_published(tmp_path)


@pytest.mark.parametrize("value", ["text", 3, [], {}, -1, True, None])
@pytest.mark.parametrize(
    "name", ["llm_config", "llm_config__vocab_size", "vision_config__patch_size", "select_layer"]
)
def test_values_of_another_kind_are_one_line(tmp_path, name, value):
    write_internvl(tmp_path)
    edit(tmp_path / "config.json", **{name: value})
    try:
        from_published(tmp_path)
    except ModelError as refused:
        assert len(str(refused).splitlines()) == 1  # noqa: PT017
    else:
        assert name == "select_layer"  # which other layers may be


def test_two_files_that_disagree_on_an_id_are_refused(tmp_path):
    write_internvl(tmp_path, "qwen2")
    edit(tmp_path / "added_tokens.json", **{"<IMG_CONTEXT>": 7})
    with pytest.raises(ModelError, match="'<IMG_CONTEXT>' has id"):
        from_published(tmp_path)


def test_parameters_are_those_of_the_file(tmp_path):
    state = write_internvl(tmp_path)
    assert from_published(tmp_path).num_parameters() == sum(tensor.numel() for tensor in state.values())
