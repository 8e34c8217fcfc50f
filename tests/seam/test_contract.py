"""What `compress`, `attach` and the report promise: budgets, memory, the model left as found, refusals by name."""

import copy
import gc
import json
import pickle
import threading

import pytest
import torch
from methods_for_tests import Heavier
from tiny import (
    IMAGE,
    assert_close,
    build,
    decode,
    gemma4,
    picture_inputs,
    storages,
    text_inputs,
    text_model,
    tiny_config,
    vision_model,
)
from transformers import DynamicCache, StaticCache, TextStreamer
from transformers.cache_utils import Cache

import kvweave
from kvweave.seam.names import CACHE

SNAP = kvweave.SnapKV(budget=0.25, window=4)
FLOW = kvweave.FlowMM(budget=0.25, proxies=4)


METHODS = [*kvweave.list_methods(), "heavier"]


def method_named(name, budget):
    return Heavier(budget=budget) if name == "heavier" else kvweave.get_method(name, budget=budget)


def kept_counts(layer, start):
    """Prompt entries of each row and KV head."""
    return ((layer.positions >= 0) & (layer.positions < start)).sum(-1)


# -------------------------------------------------------------------- the report


@pytest.mark.parametrize("name", kvweave.list_methods())
@pytest.mark.parametrize("lengths", [(40,), (40, 23, 9)], ids=["one", "batch"])
def test_report_counts_add_up_and_agree_with_the_cache(name, lengths):
    model, method = text_model("llava"), method_named(name, 0.25)
    with kvweave.compress(model, method) as session:
        decode(model, text_inputs(lengths, images=((2, 7),)), 3)
    report = json.loads(json.dumps(session.report))
    assert kvweave.method_from_dict(report["method"]) == method
    length = round(sum(lengths) / len(lengths))
    for number, described in enumerate(report["layers"]):
        layer = session.cache.layers[number]
        assert described["layer"] == number
        assert described["kept"] + described["merged"] + described["evicted"] == described["length"] == length
        assert min(described["kept"], described["merged"], described["evicted"]) >= 0
        kept = kept_counts(layer, max(lengths)).double().mean()
        assert described["kept"] == round(float(kept))
        for row, counts in enumerate(described.get("rows", [])):
            assert counts["kept"] + counts["merged"] + counts["evicted"] == counts["length"] == lengths[row]
            assert counts["kept"] == round(float(kept_counts(layer, max(lengths))[row].double().mean()))
        assert ("rows" in described) == (len(lengths) > 1)
        longest = (layer.positions >= 0).sum(-1).amax(0) - 2  # two of three decoded tokens came back in
        batch, _, _, dim = layer.keys.shape
        assert described["bytes"] == 2 * batch * int(longest.sum()) * dim * 4
    totals = report["totals"]
    assert totals["layers"] == len(report["layers"]) == 2
    for field in ("length", "kept", "merged", "evicted", "bytes"):
        assert totals[field] == sum(layer[field] for layer in report["layers"])


def test_report_tells_flow_and_scope_of_a_method_that_computes_them():
    model, inputs = vision_model(), picture_inputs((30, 24))
    with kvweave.compress(model, FLOW) as session:
        decode(model, inputs, 2)
    rows = [[row["flow"] for row in layer["rows"]] for layer in session.report["layers"]]
    assert min(min(flows) for flows in rows) > 0
    assert max(max(flows) for flows in rows) < 1
    for theta in (0.0, sum(rows[0]) / 2, sum(rows[1]) / 2, 1.0):  # in between a layer's two rows as well
        with kvweave.compress(model, kvweave.FlowMM(budget=0.25, proxies=4, theta=theta)) as session:
            decode(model, inputs, 2)
        for number, (described, flows) in enumerate(zip(session.report["layers"], rows, strict=True)):
            assert described["flow"] == pytest.approx(sum(flows) / 2)
            assert described["flow"] == pytest.approx(session.cache.layers[number].flow)
            scopes = ["cross" if flow > theta else "intra" for flow in flows]
            assert [row["scope"] for row in described["rows"]] == scopes
            assert described["scope"] == (scopes[0] if len(set(scopes)) == 1 else "mixed")


def test_the_flow_of_a_prompt_is_what_compress_tensors_computes_of_its_queries_and_keys():
    model, inputs = vision_model(), picture_inputs((30,))
    with kvweave.compress(model, FLOW) as session:
        decode(model, inputs, 1)
    queries, keys, values, scaling = captured(model, inputs)
    alone = kvweave.compress_tensors(
        FLOW, queries, keys, values, visual=inputs["input_ids"] == IMAGE, scaling=scaling
    )
    for layer, tensors in zip(session.cache.layers, alone, strict=True):
        assert layer.flow == pytest.approx(tensors.flow, abs=1e-6)
        assert torch.equal(layer.positions, tensors.positions)
        assert torch.equal(layer.mass, tensors.mass)
        assert_close(layer.keys, tensors.keys)
        assert_close(layer.values, tensors.values)


def captured(model, inputs):
    """Each text layer's queries, keys and values as plain transformers' attention takes them."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    seen = []

    def capture(module, query, key, value, attention_mask, scaling=None, **kwargs):
        seen.append((query, key, value, scaling))
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    AttentionInterface.register("seam_capture", capture)
    AttentionMaskInterface.register("seam_capture", sdpa_mask)
    text = model.config.get_text_config(decoder=True)
    before, text._attn_implementation_internal = text._attn_implementation_internal, "seam_capture"
    try:
        decode(model, inputs, 1)
    finally:
        text._attn_implementation_internal = before
    queries, keys, values, scalings = zip(*seen, strict=True)
    return list(queries), list(keys), list(values), scalings[0]


def test_the_report_is_empty_before_anything_ran():
    with kvweave.compress(text_model(), SNAP) as session:
        assert session.report == {}


# -------------------------------------------------------------------- budgets


@pytest.mark.parametrize("name", kvweave.list_methods())
def test_budget_one_is_bit_identical_in_tokens_and_logits(name):
    method = method_named(name, 1.0)
    for model, inputs in ((text_model(), text_inputs((24, 17))), (vision_model(), picture_inputs((24,)))):
        tokens, logits = decode(model, inputs)
        with kvweave.compress(model, method) as session:
            mine, mine_logits = decode(model, inputs)
        assert torch.equal(mine, tokens)
        assert torch.equal(mine_logits, logits)
        for layer in session.report["layers"]:
            assert layer["kept"] == layer["length"]


@pytest.mark.parametrize("share", [0.05, 0.1, 0.29, 0.5, 0.999])
@pytest.mark.parametrize("lengths", [(100,), (100, 57, 3)], ids=["one", "batch"])
def test_a_share_is_floored_on_each_rows_own_length_and_keeps_at_least_one(share, lengths):
    model = text_model()
    with kvweave.compress(model, kvweave.H2O(budget=share)) as session:
        decode(model, text_inputs(lengths, images=()), 1)
    for layer in session.cache.layers:
        for row, length in enumerate(lengths):
            expected = max(1, int(share * length + 1e-9))
            assert kept_counts(layer, 100)[row].tolist() == [expected] * 2


@pytest.mark.parametrize("tokens", [1, 7, 24, 500])
def test_a_budget_in_tokens(tokens):
    model, lengths = text_model(), (24, 15)
    with kvweave.compress(model, kvweave.SnapKV(budget=tokens, window=4)) as session:
        decode(model, text_inputs(lengths), 1)
    for layer in session.cache.layers:
        for row, length in enumerate(lengths):
            assert kept_counts(layer, 24)[row].tolist() == [min(tokens, length)] * 2


@pytest.mark.parametrize("budget", ["3KiB", "5000B", "9999 B"])
@pytest.mark.parametrize("lengths", [(60,), (60, 44)], ids=["one", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_budget_in_bytes_bounds_keys_and_values_over_layers_and_batch(budget, lengths, dtype):
    model = text_model(dtype=dtype)
    with kvweave.compress(model, kvweave.SnapKV(budget=budget, window=4)) as session:
        decode(model, text_inputs(lengths), 1)
    allowed = {"3KiB": 3072, "5000B": 5000, "9999 B": 9999}[budget]
    entry = 2 * 2 * len(lengths) * 2 * 8 * dtype.itemsize  # layers, keys and values, rows, heads, channels
    for layer in session.cache.layers:
        for row, length in enumerate(lengths):
            assert kept_counts(layer, 60)[row].tolist() == [min(allowed // entry, length)] * 2
    stored = sum(sum(storages(layer)) for layer in session.cache.layers)
    assert stored == min(allowed // entry, 60) * entry <= allowed
    assert session.report["totals"]["bytes"] == stored


def test_a_budget_in_bytes_holds_where_layers_have_heads_of_different_size():
    """gemma4: full layers of another head size; sliding layers do not count."""
    model = gemma4()
    with kvweave.compress(model, kvweave.SnapKV(budget="3KiB", window=4)) as session:
        decode(model, text_inputs((60,)), 1)
    assert [layer["compressed"] for layer in session.report["layers"]] == [False, True] * 2
    assert 2048 < session.report["totals"]["bytes"] <= 3072


def test_decoded_tokens_come_on_top_of_the_budget():
    model = text_model()
    with kvweave.compress(model, SNAP) as session:
        decode(model, text_inputs((24,)), 9)
    for layer in session.cache.layers:
        assert layer.positions.shape[-1] == 6 + 8
        assert layer.positions[..., -8:].eq(torch.arange(24, 32)).all()
        assert layer.mass[..., -8:].eq(1).all()
        assert layer.keys.shape[2] == layer.values.shape[2] == 14


def test_full_takes_a_budget_and_ignores_it():
    model, inputs = text_model(), text_inputs((24,))
    plain = decode(model, inputs)[1]
    with kvweave.compress(model, kvweave.Full(budget=0.1)) as session:
        assert torch.equal(decode(model, inputs)[1], plain)
    assert session.report["totals"]["kept"] == session.report["totals"]["length"] == 48


# -------------------------------------------------------------------- what the cache holds


@pytest.mark.parametrize("name", kvweave.list_methods())
def test_positions_ascend_and_empty_slots_come_first(name):
    model, lengths = text_model("llava"), (30, 22, 6)
    with kvweave.compress(model, method_named(name, 0.4)) as session:
        decode(model, text_inputs(lengths, images=((1, 4),)), 3)
    for layer in session.cache.layers:
        assert layer.positions.dtype == torch.int64
        assert layer.mass.dtype == torch.float32
        assert layer.keys.shape[:3] == layer.values.shape[:3] == layer.positions.shape == layer.mass.shape
        for row, length in enumerate(lengths):
            for head in range(2):
                positions = layer.positions[row, head]
                real = positions[positions >= 0]
                assert (positions[: len(positions) - len(real)] == -1).all()
                assert (real.diff() > 0).all()
                assert real.min() >= 30 - length  # padding is never kept
                assert layer.mass[row, head][positions < 0].eq(0).all()
                assert layer.mass[row, head][positions >= 0].ge(1).all()
                assert layer.mass[row, head].sum() <= length + 2 + 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_a_row_of_a_padded_batch_gives_what_it_gives_alone(name):
    model, lengths = text_model("llava"), (31, 22, 31, 9)
    inputs = text_inputs(lengths, images=((1, 5),))
    method = method_named(name, 0.4)
    with kvweave.compress(model, method) as session:
        tokens, logits = decode(model, inputs)
    for row, length in enumerate(lengths):
        pad = 31 - length
        alone = {"input_ids": inputs["input_ids"][row : row + 1, pad:]}
        with kvweave.compress(model, method) as single:
            same, expected = decode(model, alone)
        assert torch.equal(tokens[row], same[0])
        assert_close(logits[row], expected[0], 2e-5)
        for mine, theirs in zip(session.cache.layers, single.cache.layers, strict=True):
            for head in range(2):
                held, kept = mine.positions[row, head] >= 0, theirs.positions[0, head] >= 0
                assert torch.equal(mine.positions[row, head, held] - pad, theirs.positions[0, head, kept])
                assert_close(mine.mass[row, head, held], theirs.mass[0, head, kept])
                assert_close(mine.keys[row, head, held], theirs.keys[0, head, kept])
                assert_close(mine.values[row, head, held], theirs.values[0, head, kept])


def test_a_row_with_pictures_gives_what_it_gives_alone():
    model, lengths = vision_model(), (31, 22)
    inputs = picture_inputs(lengths)
    with kvweave.compress(model, FLOW) as session:
        tokens, logits = decode(model, inputs)
    for row, length in enumerate(lengths):
        alone = {
            "input_ids": inputs["input_ids"][row : row + 1, 31 - length :],
            "mm_token_type_ids": inputs["mm_token_type_ids"][row : row + 1, 31 - length :],
            "pixel_values": inputs["pixel_values"][row * 32 : row * 32 + 32],
            "image_grid_thw": inputs["image_grid_thw"][row * 2 : row * 2 + 2],
        }
        with kvweave.compress(model, FLOW) as single:
            same, expected = decode(model, alone)
        assert torch.equal(tokens[row], same[0])
        assert_close(logits[row], expected[0], 2e-5)
        for mine, theirs in zip(session.cache.layers, single.cache.layers, strict=True):
            held = mine.positions[row, 0] >= 0
            assert torch.equal(mine.positions[row][:, held] - (31 - length), theirs.positions[0])


def test_the_cache_knows_which_tokens_are_visual_and_which_are_padding():
    model, inputs = vision_model(), picture_inputs((31, 22))
    with kvweave.compress(model, SNAP) as session:
        decode(model, inputs, 3)
    prompt = session.cache.prompt
    assert torch.equal(prompt.valid[:, :31], inputs["attention_mask"].bool())
    assert torch.equal(prompt.visual[:, :31], inputs["input_ids"] == IMAGE)
    assert prompt.valid[:, 31:].all()
    assert not prompt.visual[:, 31:].any()
    assert prompt.valid.shape == (2, 33)


# -------------------------------------------------------------------- memory


@pytest.mark.parametrize("name", METHODS)
def test_compressed_storage_is_really_freed(name):
    """Layers and heads may share unevenly; together they hold a quarter, and nothing of the whole is alive."""
    if name == "full":
        return  # keeps everything, and means to
    model = text_model("llava")
    method = method_named(name, budget=0.25)
    with kvweave.compress(model, method) as session:
        decode(model, text_inputs((200,)), 1 + method.defer)
    held = sum(sum(storages(layer)) for layer in session.cache.layers)
    held -= 2 * 2 * 2 * method.defer * 8 * 4  # decoded before the cut
    assert held == session.report["totals"]["bytes"] == 2 * 2 * 2 * 50 * 8 * 4
    gc.collect()
    whole = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.shape in ((1, 2, 200, 8), (1, 4, 200, 8))]
    assert not whole, f"{len(whole)} tensors of the whole prompt are still alive"


@pytest.mark.parametrize("method", [SNAP, kvweave.H2O(budget=0.25), FLOW, kvweave.StreamingLLM(budget=0.25)])
def test_at_most_one_layer_is_whole_during_the_prefill(method):
    model = text_model(num_hidden_layers=4)
    seen = []

    def look(module, args, kwargs):
        cache = kwargs[CACHE]
        seen.append([sum(storages(layer)) for layer in cache.layers if layer.is_initialized])

    hooks = [layer.self_attn.register_forward_pre_hook(look, with_kwargs=True) for layer in model.model.layers]
    with kvweave.compress(model, method):
        decode(model, text_inputs((200,)), 1)
    for hook in hooks:
        hook.remove()
    quarter = 2 * 2 * 50 * 8 * 4  # keys and values of two heads
    assert seen[:4] == [[], [quarter], [quarter] * 2, [quarter] * 3]


def test_decoding_does_not_hold_the_uncompressed_prompt():
    """Nothing of the prompt's size is alive between decoded tokens: no view, no queries, no closure."""
    model, alive = text_model(), []

    def of_its_size():
        gc.collect()
        return [x for x in gc.get_objects() if type(x) is torch.Tensor and x.dim() == 4 and x.shape[2] >= 200]

    others = of_its_size()  # other tests' of this process

    def look(module, args, kwargs):
        if kwargs[CACHE].get_seq_length() > 200:
            alive.extend(tuple(x.shape) for x in of_its_size() if not any(x is other for other in others))

    hook = model.model.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    with kvweave.compress(model, kvweave.H2O(budget=0.25)):
        decode(model, text_inputs((200,)), 4)
    hook.remove()
    assert alive == []


# -------------------------------------------------------------------- the model is left as found


def state(model):
    """All that attaching could leave behind."""

    def implementations(config):
        parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
        return {
            "own": config._attn_implementation,
            **{name: implementations(part) for name, part in parts.items() if part is not None},
        }

    hooks = [
        (name, len(part._forward_hooks), len(part._forward_pre_hooks), len(part._forward_hooks_with_kwargs))
        for name, part in model.named_modules()
    ]
    own = [(name, sorted(vars(part))) for name, part in model.named_modules()]
    always = [len(part._forward_hooks_always_called) for part in model.modules()]
    settings = model.generation_config.to_dict()
    return implementations(model.config), model.config.to_dict(), hooks, own, always, settings


class StumbleError(Exception):
    pass


MODELS = {
    "text": text_model,
    "vision": vision_model,
    "eager": lambda: text_model(attention="eager"),
    "nested": lambda: build(
        tiny_config("blip-2", num_query_tokens=8, text_config={"ffn_dim": 32, "word_embed_proj_dim": 32})
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_model_is_left_as_it_was_found(kind):
    model = MODELS[kind]()
    inputs = picture_inputs((24,)) if kind == "vision" else text_inputs((24,))
    if kind == "nested":
        inputs = text_inputs((24,), images=((4, 12),)) | {"pixel_values": torch.randn(1, 3, 8, 8)}
    plain = decode(model, inputs)[1]
    before = state(model)
    with kvweave.compress(model, SNAP):
        assert state(model) != before
        decode(model, inputs)
    assert state(model) == before
    assert "generate" not in vars(model)
    assert torch.equal(decode(model, inputs)[1], plain)


@pytest.mark.parametrize("kind", ["phi4_multimodal", "janus"])
def test_each_part_of_a_model_gets_its_own_attention_back(kind):
    """Towers that were loaded with another implementation than the text keep it, inside and afterwards."""
    codebook = {"base_channels": 32, "num_embeddings": 8, "channel_multiplier": [1]}
    special = {"vq_config": codebook} if kind == "janus" else {}
    model = build(tiny_config(kind, **special))
    tower = "vision_config"
    getattr(model.config, tower)._attn_implementation_internal = "eager"
    before = state(model)
    with kvweave.compress(model, SNAP):
        assert getattr(model.config, tower)._attn_implementation == "eager"
    assert state(model) == before


@pytest.mark.parametrize("error", [StumbleError, KeyboardInterrupt])
@pytest.mark.parametrize("at_call", [1, 2, 3])
def test_the_model_is_left_as_it_was_found_after_an_exception_in_the_middle(error, at_call):
    model, inputs = text_model(), text_inputs((24,))
    plain = decode(model, inputs)[1]
    before, calls = None, []

    def stumble(module, args, kwargs):
        calls.append(1)
        if len(calls) == at_call:
            raise error

    hook = model.model.layers[1].register_forward_pre_hook(stumble, with_kwargs=True)
    before = state(model)
    with pytest.raises(error), kvweave.compress(model, SNAP):
        decode(model, inputs)
    assert state(model) == before
    hook.remove()
    assert torch.equal(decode(model, inputs)[1], plain)


@pytest.mark.parametrize("error", [StumbleError, KeyboardInterrupt])
@pytest.mark.parametrize("at_call", [1, 2])
def test_a_session_works_on_after_an_exception_in_the_middle(error, at_call):
    """A user stops a long generation by hand, in a notebook, and asks again."""
    model, inputs = text_model(), text_inputs((24,))
    calls = []

    def stumble(module, args, kwargs):
        calls.append(1)
        if len(calls) == at_call:
            raise error

    with kvweave.compress(model, SNAP) as session:
        expected = decode(model, inputs)[1]
        hook = model.model.layers[1].register_forward_pre_hook(stumble, with_kwargs=True)
        with pytest.raises(error):
            decode(model, inputs)
        hook.remove()
        other = text_inputs((40,), seed=5)
        decode(model, other, 2)
        assert session.cache.layers[0].positions.shape[-1] == 10 + 1
        assert [layer["kept"] for layer in session.report["layers"]] == [10, 10]
        assert torch.equal(decode(model, inputs)[1], expected)
        cache = model(input_ids=inputs["input_ids"]).past_key_values
        assert cache.layers[0].positions.shape == (1, 2, 6)


def test_a_users_own_hook_that_raises_before_ours_does_not_count_as_a_forward():
    model, inputs = text_model(), text_inputs((24,))

    def stumble(module, args, kwargs):
        raise StumbleError

    hook = model.register_forward_pre_hook(stumble, with_kwargs=True)
    with kvweave.compress(model, Heavier(budget=0.25)) as session:
        with pytest.raises(StumbleError):
            decode(model, inputs)
        hook.remove()
        decode(model, inputs)
        assert session.report["totals"]["kept"] == 12
        hook = model.register_forward_pre_hook(stumble, with_kwargs=True, prepend=True)
        with pytest.raises(StumbleError):
            decode(model, inputs)
        hook.remove()
        decode(model, text_inputs((40,)))
        assert session.report["totals"]["kept"] == 20


def test_a_users_own_generate_on_the_instance_comes_back():
    model, calls = text_model(), []
    inner = model.generate

    def mine(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    model.generate = mine
    with kvweave.compress(model, SNAP) as session:
        decode(model, text_inputs((24,)))
    assert model.generate is mine
    assert calls == [1]
    assert session.report["totals"]["kept"] == 12


def test_sessions_do_not_nest():
    model = text_model()
    with kvweave.compress(model, SNAP) as session:
        with pytest.raises(RuntimeError, match="nest"), kvweave.compress(model, FLOW):
            pass
        with pytest.raises(RuntimeError, match="nest"):
            kvweave.attach(model)
        decode(model, text_inputs((24,)))  # and the outer one still works
        assert session.report["totals"]["kept"] == 12
    with kvweave.compress(model, SNAP), kvweave.compress(text_model(), SNAP):
        pass  # two models are no nest


def test_a_session_can_be_entered_again_after_it_was_left():
    model = text_model()
    session = kvweave.compress(model, SNAP)
    before = state(model)
    for _ in range(2):
        with session:
            decode(model, text_inputs((24,)))
        assert session.report["totals"]["kept"] == 12
        assert state(model) == before


def test_detaching_twice_does_no_harm():
    model = text_model()
    before = state(model)
    handle = kvweave.attach(model)
    handle.detach()
    handle.detach()
    assert state(model) == before


def test_attach_compresses_only_the_caches_that_bring_a_method():
    model, inputs = text_model(), text_inputs((24,))
    plain = decode(model, inputs)[1]
    with kvweave.compress(model, SNAP):
        compressed = decode(model, inputs)[1]
    before = state(model)
    handle = kvweave.attach(model)
    assert torch.equal(decode(model, inputs)[1], plain)
    cache = kvweave.CompressedCache(model.config, SNAP)
    out = model.generate(**inputs, max_new_tokens=4, past_key_values=cache, return_dict_in_generate=True)
    assert out.past_key_values is cache
    other = kvweave.CompressedCache(model.config, kvweave.H2O(budget=0.5))
    model.generate(**inputs, max_new_tokens=4, past_key_values=other)
    handle.detach()
    assert state(model) == before
    assert cache.layers[0].positions.shape[-1] == 6 + 3
    assert other.layers[0].positions.shape[-1] == 12 + 3
    assert out.sequences[0, -4:].tolist() == compressed.argmax(-1)[0].tolist()
    static = model.generate(**inputs, max_new_tokens=4, cache_implementation="static")  # detached: as ever
    assert static[0, -4:].tolist() == plain.argmax(-1)[0].tolist()


def assert_threads_agree_with_one(run):
    """`run(0)` and `run(1)`, logits and report, are the same eight times over when two threads run them at once."""
    expected = [run(n) for n in range(2)]
    got, barrier = [[], []], threading.Barrier(2)

    def work(n):
        barrier.wait()
        for _ in range(8):
            got[n].append(run(n))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(2):
        assert len(got[n]) == 8
        for logits, report in got[n]:
            assert torch.equal(logits, expected[n][0])
            assert report == expected[n][1]


def test_two_threads_with_two_models_do_not_disturb_each_other():
    models = [text_model(seed=n) for n in range(2)]
    batches = [text_inputs((24,), seed=n) for n in range(2)]
    methods = [SNAP, kvweave.H2O(budget=0.5)]

    def run(n):
        with kvweave.compress(models[n], methods[n]) as session:
            return decode(models[n], batches[n], 5)[1], session.report

    assert_threads_agree_with_one(run)


@pytest.mark.parametrize(
    "method", [SNAP, kvweave.FlowMM(budget=0.25, rope_aware=True)], ids=["snapkv", "turned keys"]
)
def test_two_threads_on_one_attached_model_keep_their_caches_apart(method):
    model = text_model()
    batches = [text_inputs((24,), seed=1), text_inputs((40,), seed=2)]

    def run(n):
        cache = kvweave.CompressedCache(model.config, method)
        logits = decode(model, batches[n], 5, past_key_values=cache)[1]
        return logits, cache.report

    handle = kvweave.attach(model)
    assert_threads_agree_with_one(run)
    handle.detach()


# -------------------------------------------------------------------- refusals


def test_a_compressed_cache_without_attach_raises():
    model = text_model()
    cache = kvweave.CompressedCache(model.config, SNAP)
    with pytest.raises(RuntimeError, match="attach"):
        decode(model, text_inputs((24,)), past_key_values=cache)


def test_a_compressed_cache_after_detach_raises():
    model = text_model()
    cache = kvweave.CompressedCache(model.config, SNAP)
    handle = kvweave.attach(model)
    out = model.generate(**text_inputs((24,)), max_new_tokens=3, past_key_values=cache)
    handle.detach()
    with pytest.raises(RuntimeError, match="attach"):
        model.generate(out, max_new_tokens=3, past_key_values=cache)


def test_a_static_cache_is_refused_by_name():
    model = text_model()
    with kvweave.compress(model, SNAP):
        with pytest.raises(ValueError, match="StaticCache"):
            decode(model, text_inputs((24,)), cache_implementation="static")
        with pytest.raises(ValueError, match="StaticCache"):
            model(**text_inputs((24,)), past_key_values=StaticCache(model.config, max_cache_len=64))


def test_an_offloaded_cache_is_refused_by_name():
    model = text_model()
    cache = DynamicCache(config=model.config)
    cache.offloading = True  # what `offloading=True` sets, which asks for an accelerator
    with kvweave.compress(model, SNAP), pytest.raises(ValueError, match="offloaded"):
        model(**text_inputs((24,)), past_key_values=cache)


def test_a_quantised_cache_is_refused_by_name():
    class QuantizedCache(Cache):  # transformers' own asks for a quantisation package
        pass

    model = text_model()
    cache = QuantizedCache(layers=DynamicCache(config=model.config).layers)
    with kvweave.compress(model, SNAP), pytest.raises(ValueError, match="QuantizedCache"):
        model(**text_inputs((24,)), past_key_values=cache)


def test_a_dynamic_cache_that_holds_tokens_is_refused():
    model, inputs = text_model(), text_inputs((24,))
    filled = model(**inputs, use_cache=True).past_key_values
    with kvweave.compress(model, SNAP), pytest.raises(ValueError, match="24 tokens"):
        model(input_ids=inputs["input_ids"][:, :1], past_key_values=filled)


def test_an_empty_dynamic_cache_is_filled_in_place_and_what_comes_back_is_compressed():
    model, cache = text_model(), DynamicCache()
    with kvweave.compress(model, SNAP):
        out = model(**text_inputs((24,)), past_key_values=cache)
    assert out.past_key_values is cache
    assert isinstance(out.past_key_values, kvweave.CompressedCache)


def test_use_cache_false_runs_as_it_is():
    model, inputs = text_model(), text_inputs((24,))
    plain = model(**inputs, use_cache=False)
    with kvweave.compress(model, SNAP) as session:
        with pytest.warns(UserWarning, match="use_cache=False"):
            out = model(**inputs, use_cache=False)
        decode(model, inputs, 2, use_cache=False)
    assert torch.equal(out.logits, plain.logits)
    assert out.past_key_values is None
    assert session.report == {}


@pytest.mark.parametrize("what", ["snapkv", None, kvweave.SnapKV, 0.2])
def test_what_is_no_method_is_refused(what):
    model = text_model()
    if what != "snapkv":  # a spelling
        with pytest.raises(TypeError, match="method"):
            kvweave.compress(model, what)
    with pytest.raises(TypeError, match="method"):
        kvweave.CompressedCache(model.config, what)


@pytest.mark.parametrize("visual", [torch.zeros(1, 24), torch.zeros(24, dtype=torch.bool)])
def test_a_visual_mask_that_is_none_is_refused(visual):
    with pytest.raises(ValueError, match="visual"):
        kvweave.compress(text_model(), FLOW, visual=visual)


@pytest.mark.parametrize("columns", [1, 20])
def test_a_visual_mask_shorter_than_the_prompt_is_refused(columns):
    """Which columns it speaks of would be a guess."""
    model, inputs = text_model("llava"), text_inputs((24,))
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    visual = torch.ones(1, columns, dtype=torch.bool)
    with kvweave.compress(model, FLOW, visual=visual), pytest.raises(ValueError, match="visual"):
        model.generate(inputs_embeds=embeds, max_new_tokens=3)


# -------------------------------------------------------------------- what may be passed


def test_a_streamer_gets_the_same_tokens():
    got = []

    class Streamer(TextStreamer):
        def __init__(self):
            pass

        def put(self, value):
            got.extend(value.flatten().tolist())

        def end(self):
            got.append("end")

    model, inputs = text_model(), text_inputs((24,))
    with kvweave.compress(model, SNAP):
        tokens = decode(model, inputs, 5)[0]
        decode(model, inputs, 5, streamer=Streamer())
    assert got == [*inputs["input_ids"][0].tolist(), *tokens[0].tolist(), "end"]


def test_ids_passed_positionally():
    model, inputs = text_model(), text_inputs((24,))
    with kvweave.compress(model, SNAP) as session:
        expected = model.generate(input_ids=inputs["input_ids"], max_new_tokens=4)
        assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=4), expected)
        assert torch.equal(model.generate(inputs=inputs["input_ids"], max_new_tokens=4), expected)
        assert model(inputs["input_ids"]).past_key_values.layers[0].positions.shape[-1] == 6
    assert session.report["totals"]["kept"] == 12


def test_a_padding_mask_passed_positionally_is_heard_too():
    model, inputs = text_model(), text_inputs((24, 9))
    with torch.no_grad(), kvweave.compress(model, SNAP):
        cache = model(inputs["input_ids"], inputs["attention_mask"]).past_key_values
    assert torch.equal(cache.prompt.valid, inputs["attention_mask"].bool())
    assert cache.layers[0].positions[1].max() == 23
    assert (cache.layers[0].positions[1] >= 0).sum(-1).tolist() == [2, 2]


def test_a_cache_passed_positionally_is_found():
    model, inputs = text_model(), text_inputs((24,))
    handle = kvweave.attach(model)
    cache = kvweave.CompressedCache(model.config, SNAP)
    with torch.no_grad():
        model(inputs["input_ids"], None, None, cache)
    handle.detach()
    assert cache.layers[0].positions.shape[-1] == 6


def test_a_boolean_padding_mask():
    model, inputs = text_model(), text_inputs((24, 9))
    with kvweave.compress(model, SNAP) as session:
        expected = decode(model, inputs)[1]
        kept = session.cache.layers[0].positions
        assert torch.equal(decode(model, inputs | {"attention_mask": inputs["attention_mask"].bool()})[1], expected)
        assert torch.equal(session.cache.layers[0].positions, kept)


def test_right_padding_is_never_kept_either():
    model = text_model()
    ids = text_inputs((24, 24))["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    with torch.no_grad(), kvweave.compress(model, SNAP):
        cache = model(input_ids=ids, attention_mask=mask).past_key_values
        alone = model(input_ids=ids[1:, :15]).past_key_values
    for mine, single in zip(cache.layers, alone.layers, strict=True):
        held = mine.positions[1, 0] >= 0
        assert torch.equal(mine.positions[1][:, held], single.positions[0])
        assert_close(mine.keys[1][:, held], single.keys[0])


@pytest.mark.parametrize("method", [SNAP, FLOW], ids=["snapkv", "flowmm"])
def test_embeddings_with_a_visual_mask_give_what_ids_give(method):
    model, inputs = vision_model(), picture_inputs((30, 21), pictures=0)
    inputs["input_ids"][:, 14:20] = IMAGE  # placeholders without pictures: their embeddings are those of the ids
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with kvweave.compress(model, method) as session:
        expected, expected_logits = decode(model, inputs)
    with kvweave.compress(model, method, visual=inputs["input_ids"] == IMAGE) as other:
        out = model.generate(
            inputs_embeds=embeds,
            attention_mask=inputs["attention_mask"],
            max_new_tokens=4,
            return_dict_in_generate=True,
            output_logits=True,
        )
    assert torch.equal(out.sequences, expected)
    assert_close(torch.stack(out.logits, 1), expected_logits)
    for mine, theirs in zip(other.cache.layers, session.cache.layers, strict=True):
        assert torch.equal(mine.positions, theirs.positions)
        assert mine.flow == pytest.approx(theirs.flow) if theirs.flow is not None else mine.flow is None
    assert torch.equal(other.cache.prompt.visual, session.cache.prompt.visual)


def test_embeddings_alone_warn_a_method_that_goes_by_modality_and_no_other():
    model = vision_model()
    embeds = model.get_input_embeddings()(text_inputs((24,))["input_ids"]).detach()
    with kvweave.compress(model, FLOW), pytest.warns(UserWarning, match="visual"):
        model.generate(inputs_embeds=embeds, max_new_tokens=2)
    with kvweave.compress(model, SNAP) as session:
        model.generate(inputs_embeds=embeds, max_new_tokens=2)
    assert session.report["totals"]["kept"] == 12


def test_embeddings_alone_warn_with_an_attached_cache_too():
    model = vision_model()
    embeds = model.get_input_embeddings()(text_inputs((24,))["input_ids"]).detach()
    handle = kvweave.attach(model)
    cache = kvweave.CompressedCache(model.config, FLOW)
    with pytest.warns(UserWarning, match="visual"):
        model.generate(inputs_embeds=embeds, max_new_tokens=2, past_key_values=cache)
    handle.detach()


def test_a_text_model_is_not_warned_about_modalities():
    model = text_model()
    embeds = model.get_input_embeddings()(text_inputs((24,))["input_ids"]).detach()
    with kvweave.compress(model, FLOW) as session:
        model.generate(inputs_embeds=embeds, max_new_tokens=2)
    assert session.report["totals"]["kept"] == 12


# -------------------------------------------------------------------- odd prompts


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_short_prompts(name, length):
    """Shorter than every window; a prompt of one token stays whole."""
    model = text_model()
    inputs = text_inputs((length,), images=())
    method = method_named(name, 0.5)
    plain = decode(model, inputs, 4 + method.defer)[1]
    with kvweave.compress(model, method) as session:
        logits = decode(model, inputs, 4 + method.defer)[1]
    assert torch.equal(logits[:, 0], plain[:, 0])
    if name == "full" or length == 1:
        assert torch.equal(logits, plain)
        return
    kept = sum(int(kept_counts(layer, length).sum()) for layer in session.cache.layers)
    assert kept == 2 * 2 * max(1, length // 2)  # layers, heads


@pytest.mark.parametrize("name", kvweave.list_methods())
@pytest.mark.parametrize("images", [(), ((0, 24),), ((0, 1),), ((23, 24),)], ids=["none", "only", "first", "last"])
def test_prompts_of_any_modality(name, images):
    model = vision_model()
    inputs = text_inputs((24,), images=images)
    method = method_named(name, 0.25)
    with kvweave.compress(model, method) as session:
        decode(model, inputs, 4 + method.defer)
    kept = sum(int(kept_counts(layer, 24).sum()) for layer in session.cache.layers)
    assert kept == 2 * 2 * (24 if name == "full" else 6)  # layers, heads
    for layer in session.cache.layers:
        assert layer.flow is None or 0 <= layer.flow <= 1
        if name == "flowmm" and images in ((), ((0, 24),)):
            assert layer.flow == 0


def test_batches_of_short_and_long_rows():
    model, lengths = text_model(), (60, 1, 2, 33)
    for method in (SNAP, kvweave.H2O(budget=3), FLOW, kvweave.Random(budget=0.01), Heavier(budget=0.25)):
        with kvweave.compress(model, method) as session:
            logits = decode(model, text_inputs(lengths, images=()))[1]
        assert logits.isfinite().all()
        for layer in session.cache.layers:
            assert (kept_counts(layer, 60) >= 1).all()


@pytest.mark.parametrize("name", METHODS)
def test_a_row_of_nothing_but_padding_keeps_nothing_and_disturbs_no_other(name):
    """A filler, as servers put into a batch."""
    model, inputs = text_model("llava"), text_inputs((24, 24))
    inputs["attention_mask"][1] = 0
    method = method_named(name, budget=0.25)
    with torch.no_grad(), kvweave.compress(model, method):
        cache = model(**inputs).past_key_values
        alone = model(input_ids=inputs["input_ids"][:1]).past_key_values
    for mine, single in zip(cache.layers, alone.layers, strict=True):
        assert (mine.positions[1] == -1).all()
        assert torch.equal(mine.positions[0], single.positions[0])
        assert_close(mine.keys[0], single.keys[0])


@pytest.mark.parametrize("way", [copy.deepcopy, pickle.dumps], ids=["copied", "pickled"])
def test_a_model_is_copied_before_or_after(way):
    model = text_model()
    with (
        kvweave.compress(model, SNAP),
        pytest.raises(TypeError, match=r"is attached to this Llama.*: allowed is to copy"),
    ):
        way(model)
    way(model)
