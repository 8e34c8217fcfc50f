"""MLA: whole tokens go from the latents that all heads share, and decoding is that from the masked full cache."""

import contextlib
import copy
import pickle

import pytest
import torch
from compiling import TWELVE, Graphs
from test_equals_masked_full_cache import check
from tiny import (
    DEFAULT,
    IMAGE,
    assert_close,
    build,
    cut_of,
    decode,
    masked,
    text_inputs,
    text_model,
    tiny_config,
    words,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import kvweave
from kvweave.evals.answer.prefill import Prefill

MLA = {
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "num_key_value_heads": 4,
    "head_dim": DEFAULT,
    "n_group": 1,
    "topk_group": 1,
}
KINDS = ["axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "mistral4", "youtu"]
LENGTHS = (26, 19, 26, 5)
#: What a method keeps where heads share tokens; by attention, by norm, by place, by chance, over layers.
METHODS = {
    "snapkv": kvweave.get_method("snapkv", budget=0.3, window=4),
    "h2o": kvweave.get_method("h2o", budget=0.3),
    "largest of all heads": kvweave.get_method("h2o", budget=0.3, heads_by="max", rows_by="max"),
    "lent": kvweave.get_method("tova", budget=0.3, ahead=1, behind=1),
    "knorm": kvweave.get_method("knorm", budget=0.3),
    "defensive": kvweave.get_method("defensive", budget=0.3, window=4),
    "streaming_llm": kvweave.get_method("streaming_llm", budget=0.3, sinks=2),
    "random": kvweave.get_method("random", budget=0.3, recent=2),
    "pyramidkv": kvweave.get_method("pyramidkv", budget=0.3, window=4),
    "vlcache": kvweave.get_method("vlcache", budget=0.3),
    "flashcache": kvweave.get_method("flashcache", budget=0.3),
    "over all layers": kvweave.get_method("snapkv", budget=0.3, window=4, allocation="global"),
    "kvzip": kvweave.get_method("kvzip", budget=0.3, replay=False),
}


def mla_model(kind="deepseek_v3", **more):
    config = CONFIG_MAPPING[kind]()
    special = {name: value for name, value in MLA.items() if hasattr(config, name) or name == "head_dim"}
    return text_model(kind, **(special | more))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_mla_model_evicts_in_its_latents(kind, attention):
    session = check(mla_model(kind, attention=attention), text_inputs(LENGTHS), METHODS["snapkv"])
    assert [layer["compressed"] for layer in session.report["layers"]] == [True, True]
    layer = session.cache.layers[0]
    assert layer.keys.shape[1] == layer.values.shape[1] == 1
    assert layer.keys.shape[-1] == MLA["kv_lora_rank"]
    assert layer.values.shape[-1] == MLA["qk_rope_head_dim"]
    assert layer.keys.shape[2] == 7 + 5  # 0.3 of 26, and what was decoded


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_that_one_set_of_tokens_serves(method):
    check(mla_model(), text_inputs(LENGTHS), method)


def test_the_set_is_that_of_the_mean_score_of_the_expanded_heads():
    """Against attention computed here, from queries and keys as a plain forward pass has them."""
    model, inputs = mla_model(attention="eager"), text_inputs((26,))
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions
    with torch.no_grad(), kvweave.compress(model, METHODS["h2o"]) as session:
        model(**inputs)
    for layer, attention in zip(session.cache.layers, weights, strict=True):
        score = attention[0].double().sum(1).mean(0)
        budget, recent = 7, 3
        best = sorted(range(26 - recent), key=lambda n: -score[n].item())[: budget - recent]
        assert layer.positions[0, 0].tolist() == sorted([*best, *range(26 - recent, 26)])


def test_memory_is_that_of_the_latents():
    model, inputs = mla_model(), text_inputs((40,))
    with torch.no_grad(), kvweave.compress(model, kvweave.get_method("snapkv", budget=0.25, window=4)) as session:
        model(**inputs)
    totals = session.report["totals"]
    entry = 4 * (MLA["kv_lora_rank"] + MLA["qk_rope_head_dim"])
    assert (totals["bytes_before"], totals["bytes"]) == (2 * 40 * entry, 2 * 10 * entry)
    with torch.no_grad(), kvweave.compress(model, kvweave.SnapKV(budget=f"{2 * 12 * entry}B", window=4)) as session:
        model(**inputs)
    assert session.cache.layers[0].keys.shape[2] == 12


def test_all_of_the_budget_changes_not_a_bit():
    model, inputs = mla_model(), text_inputs(LENGTHS)
    _, plain = decode(model, inputs)
    for method in (kvweave.get_method("full"), kvweave.get_method("snapkv", budget=1.0)):
        with kvweave.compress(model, method):
            assert torch.equal(decode(model, inputs)[1], plain)


def test_a_cut_that_waits_counts_what_decoded_tokens_look_at():
    """From the expanded keys of the prompt and of the three tokens behind it, as a plain model reads them."""
    model, inputs = mla_model(attention="eager"), text_inputs((26,))
    method = kvweave.get_method("h2o", budget=0.3, defer=3, defer_weight=0.5)
    tokens, plain = decode(model, inputs, 8)
    with kvweave.compress(model, method) as session:
        mine = decode(model, inputs, 8)[1]
    assert torch.equal(mine[:, :4], plain[:, :4])  # the prompt's own, and the three behind it
    assert session.report["deferred"] == 3
    with torch.no_grad():
        whole = torch.cat([inputs["input_ids"], tokens[:, :3]], 1)
        weights = model(input_ids=whole, output_attentions=True).attentions
    for layer, attention in zip(session.cache.layers, weights, strict=True):
        by_row = attention[0].double().mean(0)
        score = by_row[:26].sum(0) + 32 * by_row[26:].mean(0)
        best = sorted(range(23), key=lambda n: -score[n].item())[:4]
        assert layer.positions[0, 0, :7].tolist() == sorted([*best, 23, 24, 25])


def test_probes_are_answered_from_the_latents():
    model, inputs = mla_model(), text_inputs((26,))
    with kvweave.compress(model, kvweave.get_method("kvzip", budget=0.3)) as session:
        decode(model, inputs, 3)
    assert session.report["probes"]
    assert session.report["rows"] == "probes"
    kept = [layer["kept"] for layer in session.report["layers"]]
    assert sum(kept) == 14  # 0.3 of 26 in each, over both


def test_turns_follow_each_other_and_are_cut_again():
    model, method = mla_model(), METHODS["snapkv"]
    ids = words(2, 40)
    cache = kvweave.CompressedCache(model.config, method)
    with torch.no_grad(), kvweave.attach(model):
        model(input_ids=ids[:, :24], past_key_values=cache, use_cache=True)
        first = cut_of(cache, 24)
        mine = model(input_ids=ids[:, 24:], past_key_values=cache, use_cache=True).logits
    assert cache.layers[0].keys.shape[2] == 12
    with torch.no_grad(), masked(model, first):
        plain = model(input_ids=ids[:, :24], use_cache=True).past_key_values
        assert_close(mine, model(input_ids=ids[:, 24:], past_key_values=plain, use_cache=True).logits)


def test_beams_crops_and_copies():
    model, inputs = mla_model(), text_inputs((26, 19))
    with kvweave.compress(model, METHODS["snapkv"]) as session:
        beams = model.generate(**inputs, max_new_tokens=5, num_beams=3)
    assert beams.shape == (2, 31)
    assert session.cache.layers[0].keys.shape[:3] == (6, 1, 7 + 4)
    cache = kvweave.CompressedCache(model.config, METHODS["snapkv"])
    step = words(2, 1, seed=9)
    with torch.no_grad(), kvweave.attach(model):
        model(**inputs, past_key_values=cache, use_cache=True)
        twin = copy.deepcopy(cache)
        one = model(input_ids=step, past_key_values=cache, use_cache=True).logits
        cache.crop(26)
        assert torch.equal(model(input_ids=step, past_key_values=cache, use_cache=True).logits, one)
        assert torch.equal(model(input_ids=step, past_key_values=twin, use_cache=True).logits, one)


@pytest.mark.parametrize("defer", [0, 2])
def test_saved_and_sent_caches_are_read_again(tmp_path, defer):
    model, inputs = mla_model(), text_inputs((26, 19))
    cache = kvweave.CompressedCache(model.config, kvweave.get_method("snapkv", budget=0.3, window=4, defer=defer))
    with torch.no_grad(), kvweave.attach(model):
        model(**inputs, past_key_values=cache, use_cache=True)
        cache.save(tmp_path / "cache.safetensors", model)
        loaded = kvweave.CompressedCache.load(tmp_path / "cache.safetensors", model)
        caches = [pickle.loads(pickle.dumps(cache)), loaded, cache]
        for n in range(4):
            step, mask = words(2, 1, seed=n), torch.cat([inputs["attention_mask"], torch.ones(2, n + 1).long()], 1)
            one, *others = [
                model(input_ids=step, attention_mask=mask, past_key_values=c, use_cache=True).logits for c in caches
            ]
            assert all(torch.equal(one, other) for other in others)
    assert cache.layers[0].keys.shape[2] == 7 + 4


def test_a_cut_needs_the_model_that_expands_the_latents():
    model, method = mla_model(), METHODS["snapkv"]
    cache = kvweave.CompressedCache(model.config, method, hold=True)
    with torch.no_grad(), kvweave.attach(model):
        model(**text_inputs((26,)), past_key_values=cache, use_cache=True)
    sent = pickle.loads(pickle.dumps(cache))
    with pytest.raises(RuntimeError, match="the model that filled this cache is not at hand"):
        sent.compress()
    cache.compress()
    assert cache.layers[0].keys.shape[2] == 7


def test_room_for_steps_of_fixed_shape():
    model, inputs = mla_model(), text_inputs((26, 19))
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)
    runs = []
    for reserved in (False, True):
        cache = kvweave.CompressedCache(model.config, METHODS["snapkv"])
        with torch.no_grad(), kvweave.attach(model):
            model(**inputs, past_key_values=cache, use_cache=True)
            if reserved:
                cache.reserve(8)
            steps = [
                model(
                    input_ids=words(2, 1, seed=n),
                    attention_mask=mask[:, : 27 + n],
                    position_ids=torch.tensor([[26 + n], [19 + n]]),
                    past_key_values=cache,
                    use_cache=True,
                ).logits
                for n in range(4)
            ]
        runs.append(torch.stack(steps))
    assert_close(runs[1], runs[0])


def test_compiled_steps():
    model, inputs, graphs = mla_model("minicpm3"), text_inputs((30, 21)), Graphs()
    with kvweave.compress(model, METHODS["snapkv"]):
        plain = model.generate(**inputs, **TWELVE)
        compiled = model.generate(**inputs, **TWELVE, **graphs.compiling())
    assert torch.equal(compiled, plain)
    assert len(graphs) == 1


def test_a_recorded_prefill_is_cut_as_a_fresh_one():
    model, inputs = mla_model(), text_inputs((26, 19))
    prefill = Prefill.recorded(model, lambda **more: model.generate(**inputs, max_new_tokens=2, **more))
    runs = []
    for again in (contextlib.nullcontext(), prefill.replayed(model)):
        with kvweave.compress(model, METHODS["h2o"]) as session, again:
            runs.append(decode(model, inputs)[1])
        assert session.report["totals"]["layers"] == 2
    assert torch.equal(*runs)


def test_the_model_is_left_as_it_was_found():
    model = mla_model()
    attention = model.model.layers[0].self_attn
    with kvweave.compress(model, METHODS["snapkv"]):
        assert "expand_kv" in vars(attention)
    assert "expand_kv" not in vars(attention)


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (kvweave.FlowMM(budget=0.3), "method=flowmm merges each head's entries"),
        (kvweave.Weave(budget=0.3, form="spelled"), "method=weave merges each head's entries"),
        (kvweave.get_method("adakv", budget=0.3), "method=adakv gives each head a count of its own"),
        (
            kvweave.get_method("snapkv", budget=0.3, allocation="layer"),
            "allocation='layer' gives each head a count of its own",
        ),
        (
            kvweave.get_method("tova", budget=0.3, per_head=True),
            "per_head=True gives each head tokens of its own",
        ),
        (kvweave.get_method("leverage", budget=0.3), "method=leverage turns keys"),
        (kvweave.get_method("madakv", budget=0.3), "method=madakv decides for each head by itself"),
        (kvweave.get_method("quantized", budget=0.3), "method=quantized decides for each head by itself"),
    ],
    ids=lambda value: value.name if isinstance(value, kvweave.Method) else "",
)
def test_methods_that_need_more_than_one_set_are_refused_by_name(method, why):
    model = mla_model()
    with pytest.raises(ValueError, match=r"allowed is one of .*snapkv") as error:
        kvweave.compress(model, method).attach()
    assert why in str(error.value)
    assert "DeepseekV3ForCausalLM" in str(error.value)
    cache = kvweave.CompressedCache(model.config, method)
    with kvweave.attach(model), pytest.raises(ValueError, match="MLA"):
        model(**text_inputs((26,)), past_key_values=cache, use_cache=True)


def test_what_the_refusal_allows_is_taken():
    model = mla_model()
    with pytest.raises(ValueError, match="allowed is one of ") as error:
        kvweave.compress(model, kvweave.FlowMM(budget=0.3)).attach()
    allowed = str(error.value).rpartition("allowed is one of ")[2].split(", ")
    assert len(allowed) > 12
    assert "weave" in allowed  # a budget alone
    for name in allowed:
        with kvweave.compress(model, kvweave.get_method(name, budget=0.3)) as session:
            model.generate(**text_inputs((26,)), max_new_tokens=10)  # weave's cut waits for eight
        assert session.report["totals"]["layers"] == 2, name
        assert session.report["totals"]["kept"] == (52 if name == "full" else 14), name


def test_eyes_over_latents():
    """Kimi-K2.5: a vision tower before DeepSeek-V3's decoder."""
    special = {name: value for name, value in MLA.items() if name != "head_dim"}
    config = tiny_config("kimi_k25", text_config=special | {"head_dim": DEFAULT})
    model = build(config)
    inputs = text_inputs((26, 19), images=())
    session = check(model, inputs, METHODS["h2o"])
    assert [layer["compressed"] for layer in session.report["layers"]] == [True, True]
    assert IMAGE not in inputs["input_ids"]
