"""What `kvweave plan` counts, against what torch's allocator was asked for and what caches really hold."""

import pytest
import torch
from published_folders import write_internvl, write_mobilevlm
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import kvweave
from benchmarks.measure import peak_bytes
from kvweave import models
from kvweave.models import ModelError
from kvweave.models.footprint import footprint

LENGTH = 512


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder of a decoder wide enough that its layers, not its odds and ends, are what counts."""
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_prefill_is_what_the_allocator_is_asked_for(llama):
    model = LlamaForCausalLM.from_pretrained(llama).eval()
    embeddings = torch.randn(1, LENGTH, 128)
    with torch.no_grad():
        held = peak_bytes(lambda: model.model(inputs_embeds=embeddings, use_cache=False))
    planned = footprint(str(llama), kvweave.SnapKV(), tokens=LENGTH)
    mine = planned.prefill - embeddings.nbytes
    assert abs(mine - held) < 0.1 * held


def test_the_whole_of_a_generation_is_what_the_allocator_is_asked_for(llama):
    """A first step of `generate`, with a method and without."""
    model = LlamaForCausalLM.from_pretrained(llama).eval()
    ids = torch.randint(3, 256, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    method = kvweave.StreamingLLM(budget=0.1)
    planned = footprint(str(llama), method, tokens=LENGTH, new_tokens=2)

    def run():
        return model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)

    full = peak_bytes(run)
    with kvweave.compress(model, method):
        compressed = peak_bytes(run)
    assert abs(planned.full_peak - planned.weights - full) < 0.15 * full
    assert abs(planned.peak - planned.weights - compressed) < 0.15 * compressed


@pytest.mark.parametrize("budget", [0.2, 100, "64KiB"])
@pytest.mark.parametrize("name", ["snapkv", "flowmm", "quantized"])
def test_the_cache_is_what_it_really_holds(llama, name, budget):
    inner = kvweave.get_method("snapkv" if name == "quantized" else name, budget=budget)
    method = kvweave.Quantized(inner, bits=4) if name == "quantized" else inner
    model = LlamaForCausalLM.from_pretrained(llama).eval()
    ids = torch.randint(3, 256, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with kvweave.compress(model, method) as session:
        model.generate(ids, max_new_tokens=1, do_sample=False, eos_token_id=None, pad_token_id=0)
    planned = footprint(str(llama), method, tokens=LENGTH, batch=2)
    report = session.report
    assert planned.layers == report["totals"]["layers"] == 4
    assert {layer["kept"] for layer in report["layers"]} == {planned.entries}
    held = sum(layer["bytes"] for layer in report["layers"])
    assert planned.kept == held
    assert planned.full == 2 * LENGTH * 4 * 2 * 2 * 16 * 4  # rows, tokens, layers, keys and values, heads, dim, bytes


def test_weights_are_those_of_the_model(llama):
    model = LlamaForCausalLM.from_pretrained(llama)
    method = kvweave.SnapKV()
    half = footprint(str(llama), method, tokens=8, dtype="bfloat16").weights
    assert half == sum(x.numel() for x in model.parameters()) * 2 + sum(x.nbytes for x in model.buffers())
    linear = sum(x.weight.numel() for x in model.model.modules() if isinstance(x, torch.nn.Linear))
    four = footprint(str(llama), method, tokens=8, dtype="bfloat16", weights="4bit").weights
    assert four == half - 2 * linear + linear // 2 + linear // 64 * 4
    assert four < footprint(str(llama), method, tokens=8, dtype="bfloat16", weights="8bit").weights < half


def test_sliding_layers_hold_their_window_and_are_not_cut(tmp_path):
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=32,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    MistralForCausalLM(config)
    found = footprint(str(tmp_path), kvweave.SnapKV(), tokens=200)
    assert found.layers == 0
    assert found.full == found.kept < 200 * 2 * 2 * 32 * 4


def test_a_method_that_waits_holds_the_full_cache_at_its_peak(llama):
    for method in (kvweave.Weave(budget=0.1), kvweave.Meda(budget=0.1)):
        found = footprint(str(llama), method, tokens=LENGTH)
        assert found.waits
        assert found.peak == found.full_peak
    assert footprint(str(llama), kvweave.SnapKV(budget=0.1), tokens=LENGTH).peak < found.peak
    whole = footprint(str(llama), kvweave.Full(budget=0.1), tokens=LENGTH)
    assert (whole.kept, whole.entries) == (whole.full, LENGTH)


def test_a_first_cut_is_what_is_held_till_the_cut(llama):
    even = "weave:form=even,budget=0.2"
    whole, coarse = (
        footprint(str(llama), kvweave.parse_method(spelled), tokens=LENGTH, new_tokens=0)
        for spelled in (even, f"{even},coarse=2")
    )
    assert coarse.waits
    assert coarse.before_cut == 2 * whole.kept == 2 * coarse.kept
    assert whole.before_cut == whole.full
    assert coarse.peak < whole.peak == coarse.full_peak
    unknown = kvweave.parse_method("weave:budget=0.2,coarse=2")  # no profile: the whole prompt is held
    assert footprint(str(llama), unknown, tokens=LENGTH, new_tokens=0) == whole


@pytest.mark.parametrize("kind", ["lab", "internvl", "mobilevlm"])
def test_a_tower_takes_what_the_allocator_is_asked_for(tmp_path, kind):
    """Four images; nothing but `config.json` is there when it is planned."""
    if kind == "lab":
        name, side = "lab", 80
    else:
        (write_internvl if kind == "internvl" else write_mobilevlm)(tmp_path / "model")
        name, side = str(tmp_path / "model"), 56 if kind == "internvl" else 336
    model, _ = models.load(name)
    tower = model.model.visual if kind == "lab" else model.model.vision_tower
    if kind == "lab":
        patches = torch.randn(4 * 100, 3 * 8 * 8)
        inputs = {"hidden_states": patches, "grid_thw": torch.tensor([[1, 10, 10]] * 4)}
    else:
        inputs = {"pixel_values": torch.randn(4, 3, side, side)}
    with torch.no_grad():
        held = peak_bytes(lambda: tower(**inputs)) + sum(x.nbytes for x in inputs.values())
    for file in (tmp_path / "model").glob("*"):
        if file.suffix in (".safetensors", ".bin", ".model"):
            file.unlink()
    planned = footprint(name, kvweave.SnapKV(), tokens=64, images=4, image_size=side)
    assert abs(planned.vision - held) < 0.25 * held
    assert 0 <= sum(x.nbytes for x in (*model.parameters(), *model.buffers())) - planned.weights < 1000  # a copy


def test_what_cannot_be_planned_is_refused(llama, tmp_path):
    with pytest.raises(ModelError, match="has no vision tower that kvweave finds: allowed is images=0"):
        footprint(str(llama), kvweave.SnapKV(), tokens=8, images=1)
    with pytest.raises(ModelError, match="weights='3bit' is not allowed: allowed is one of auto, 8bit, 4bit"):
        footprint(str(llama), kvweave.SnapKV(), tokens=8, weights="3bit")
    with pytest.raises(ModelError, match="dtype='int3' is not allowed"):
        footprint(str(llama), kvweave.SnapKV(), tokens=8, dtype="int3")
    with pytest.raises(ModelError, match=r"without config\.json"):
        footprint(str(tmp_path), kvweave.SnapKV(), tokens=8)
