"""Faults found in other libraries, each with the promise that it breaks here."""

import pytest
import torch
from methods_for_tests import Heavier
from tiny import (
    ORACLE,
    assert_close,
    build,
    cut_of,
    decode,
    masked,
    picture_inputs,
    storages,
    text_inputs,
    text_model,
    tiny_config,
    vision_model,
    words,
)
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kvweave
from kvweave.methods import register

# -------------------------------------------------------------------- queries as attention used them


def dense_window(queries, keys, scaling, window):
    """Attention of the last rows to each column, mean over a KV head's query heads: [kv_heads, length]."""
    heads, length, _ = queries.shape
    group = heads // keys.shape[0]
    logits = queries.double() @ keys.double().repeat_interleave(group, 0).transpose(-1, -2) * scaling
    row, column = torch.arange(length)[:, None], torch.arange(length)
    weights = logits.masked_fill(column > row, -torch.inf).softmax(-1)
    return weights[:, length - window :].sum(1).unflatten(0, (-1, group)).mean(1)


def captured(model, inputs):
    """Queries and keys of each text layer where transformers hands them to attention: after norm and rotary."""
    seen = []

    def capture(module, query, key, value, attention_mask, scaling=None, **kwargs):
        if query.shape[2] == key.shape[2]:
            seen.append((query[0], key[0], query.shape[-1] ** -0.5 if scaling is None else scaling))
        return before(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    before = ALL_ATTENTION_FUNCTIONS[ORACLE]
    AttentionInterface.register(ORACLE, capture)
    try:
        with masked(model):
            decode(model, inputs, 1)
    finally:
        AttentionInterface.register(ORACLE, before)
    return seen


def loud_norms(model):
    """Query and key norms whose gains differ by channel, so that skipping them shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                weight.copy_(torch.rand(weight.shape, generator=generator) * 3 + 0.1)
    return model


QK_NORM = {
    "qwen3_vl": lambda: vision_model(kind="qwen3_vl"),
    "qwen3": lambda: text_model("qwen3"),
    "gemma3_text": lambda: text_model("gemma3_text", layer_types=["full_attention"] * 2, query_pre_attn_scalar=3),
    "olmo2": lambda: text_model("olmo2"),
}


@pytest.mark.parametrize("kind", QK_NORM)
def test_scores_come_from_queries_after_norm_and_rotary(kind):
    model = loud_norms(QK_NORM[kind]())
    assert any("q_norm" in name for name, _ in model.named_parameters())
    inputs = picture_inputs((40,)) if kind == "qwen3_vl" else text_inputs((40,))
    window, budget = 4, 12
    with kvweave.compress(model, kvweave.SnapKV(budget=budget, window=window, kernel=1)) as session:
        decode(model, inputs, 1)
    for layer, (queries, keys, scaling) in zip(session.cache.layers, captured(model, inputs), strict=True):
        score = dense_window(queries, keys, scaling, window)[:, : 40 - window]
        expected = score.topk(budget - window).indices.sort(-1).values
        assert torch.equal(layer.positions[0, :, : budget - window], expected)
        assert torch.equal(layer.positions[0, :, budget - window :], torch.arange(36, 40).expand(2, -1))


def test_scaling_and_soft_cap_of_the_model_enter_the_scores():
    """Pooled column sums of a capped, differently scaled softmax choose other tokens than the plain one."""
    kept = []
    for cap, scalar in ((2.0, 8), (None, 8), (2.0, 1)):
        model = text_model(
            "gemma2",
            attention="eager",
            layer_types=["full_attention"] * 2,
            attn_logit_softcapping=cap,
            query_pre_attn_scalar=scalar,
        )
        inputs = text_inputs((40,))
        with kvweave.compress(model, kvweave.SnapKV(budget=12, window=4, kernel=1)) as session:
            decode(model, inputs, 1)
        queries, keys, scaling = captured(model, inputs)[0]
        assert scaling == pytest.approx(scalar**-0.5)
        logits = queries.double() @ keys.double().repeat_interleave(2, 0).transpose(-1, -2) * scaling
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
        causal = torch.ones(40, 40, dtype=torch.bool).tril()
        weights = logits.masked_fill(~causal, -torch.inf).softmax(-1)
        score = weights[:, 36:, :36].sum(1).unflatten(0, (2, 2)).mean(1)
        positions = session.cache.layers[0].positions[0, :, :8]
        assert torch.equal(positions, score.topk(8).indices.sort(-1).values)
        kept.append(positions)
    assert not torch.equal(kept[0], kept[1])


def test_attention_sinks_of_the_model_enter_the_scores():
    """gpt-oss lets a row spend attention on nothing: rows with a strong sink have less of a say."""
    model = text_model("gpt_oss", attention="eager", layer_types=["full_attention"] * 2)
    sinks = torch.tensor([-3.0, 14.0, 14.0, -3.0])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.copy_(sinks)
    inputs = text_inputs((40,))
    with kvweave.compress(model, kvweave.SnapKV(budget=12, window=4, kernel=1)) as session:
        decode(model, inputs, 1)
    for layer, (queries, keys, scaling) in zip(session.cache.layers, captured(model, inputs), strict=True):
        logits = queries.double() @ keys.double().repeat_interleave(2, 0).transpose(-1, -2) * scaling
        logits = logits.masked_fill(~torch.ones(40, 40, dtype=torch.bool).tril(), -torch.inf)
        with_sink = torch.cat([logits, sinks.double()[:, None, None].expand(4, 40, 1)], -1).softmax(-1)[..., :40]
        kept = [
            weights[:, 36:, :36].sum(1).unflatten(0, (2, 2)).mean(1).topk(8).indices.sort(-1).values
            for weights in (with_sink, logits.softmax(-1))
        ]
        assert torch.equal(layer.positions[0, :, :8], kept[0])
        assert not torch.equal(kept[0], kept[1])


def test_bidirectional_attention_among_image_tokens_enters_the_scores():
    """gemma3 lets the tokens of an image see one another: column sums count what they receive from before, too."""
    special = {"layer_types": ["full_attention"] * 2}
    model = build(tiny_config("gemma3", text_config=special), attention="eager")
    inputs = text_inputs((40,), images=((4, 20),))
    kinds = (inputs["input_ids"] == 5).long()
    seen = []

    def capture(module, query, key, value, attention_mask, **kwargs):
        if query.shape[2] == key.shape[2] and not seen:
            seen.append((query[0].double(), key[0].double(), kwargs["scaling"], attention_mask[0].double()))
        return before(module, query, key, value, attention_mask, **kwargs)

    before = ALL_ATTENTION_FUNCTIONS[ORACLE]
    AttentionInterface.register(ORACLE, capture)
    try:
        with masked(model), torch.no_grad():
            plain = model(**inputs, token_type_ids=kinds, use_cache=True)
    finally:
        AttentionInterface.register(ORACLE, before)
    with torch.no_grad(), kvweave.compress(model, kvweave.H2O(budget=12)) as session:
        out = model(**inputs, token_type_ids=kinds)
    assert_close(out.logits, plain.logits)
    queries, keys, scaling, mask = seen[0]
    assert mask[0, 5, 10] == 0  # forwards, within the image
    weights = (queries @ keys.repeat_interleave(2, 0).transpose(-1, -2) * scaling + mask).softmax(-1)
    score = weights.sum(1).unflatten(0, (2, 2)).mean(1)[:, :34]
    positions = session.cache.layers[0].positions[0, :, :6]
    assert torch.equal(positions, score.topk(6).indices.sort(-1).values)


# -------------------------------------------------------------------- padding, sinks, honest budgets


@pytest.mark.parametrize("name", kvweave.list_methods())
def test_left_padding_is_never_kept_and_real_tokens_fill_the_budget(name):
    model, lengths = text_model("llava"), (60, 20, 41)
    method = kvweave.get_method(name, budget=0.2)
    with kvweave.compress(model, method) as session:
        decode(model, text_inputs(lengths), 2 + method.defer)
    for row, length in enumerate(lengths):
        kept = [layer.positions[row].flatten() for layer in session.cache.layers]
        kept = torch.cat(kept)
        kept = kept[(kept >= 0) & (kept < 60)]
        assert (kept >= 60 - length).all()
        assert len(kept) == 2 * 2 * (length if name == "full" else length // 5)  # layers, heads


@pytest.mark.parametrize("lengths", [(60,), (60, 33)], ids=["one", "batch"])
def test_sinks_of_streaming_llm_stay_while_decoding_and_over_turns(lengths):
    model = text_model()
    handle = kvweave.attach(model)
    cache = kvweave.CompressedCache(model.config, kvweave.StreamingLLM(budget=10, sinks=4))
    inputs = text_inputs(lengths, images=())
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(3):
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=20)
        for layer in cache.layers:
            for row, length in enumerate(lengths):
                sinks = layer.positions[row][layer.positions[row] >= 0].view(2, -1)[:, :4]
                assert torch.equal(sinks, (60 - length + torch.arange(4)).expand(2, -1))
        ids = torch.cat([out, words(len(lengths), 5)], 1)
        mask = torch.cat([mask, torch.ones(len(lengths), ids.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
    handle.detach()


@pytest.mark.parametrize("name", sorted(set(kvweave.list_methods()) - {"full"}))
@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_a_nominal_share_is_the_stored_share(name, share):
    model = text_model("llava")
    with kvweave.compress(model, kvweave.get_method(name, budget=share, defer=0)) as session:
        decode(model, text_inputs((200,), images=((10, 150),)), 1)
    stored = sum(sum(storages(layer)) for layer in session.cache.layers)
    assert stored == share * session.report["totals"]["bytes_before"]


@pytest.mark.parametrize("sizes", [(3,), (1, 1), (17,), (5, 9, 2)])
def test_images_of_any_number_of_tokens(sizes):
    """No number of tokens an image is built in."""
    model, images, start = text_model("llava"), [], 2
    for size in sizes:
        images.append((start, start + size))
        start += size + 3
    inputs = text_inputs((40,), images=images)
    method = kvweave.FlowMM(budget=0.3, proxies=4)
    with kvweave.compress(model, method) as session:
        _, logits = decode(model, inputs)
    assert session.cache.prompt.visual.sum() == sum(sizes)
    with masked(model, cut_of(session.cache, 40, merged=True)):
        assert_close(logits, decode(model, inputs)[1])


# -------------------------------------------------------------------- budgets that differ by layer


@pytest.mark.parametrize("lengths", [(30,), (30, 21, 6)], ids=["one", "batch"])
@pytest.mark.parametrize("layers", [2, 4])
def test_layers_may_keep_different_counts_over_two_turns(layers, lengths):
    model = text_model(num_hidden_layers=layers)
    inputs = text_inputs(lengths, images=())
    with kvweave.compress(model, Heavier(budget=0.4)) as session:
        tokens, logits = decode(model, inputs, 4)
        cache = session.cache
        one = cut_of(cache, 30)
        counts = [(layer.positions[0, 0] < 30).sum().item() for layer in cache.layers]
        assert len(set(counts)) == 2
        assert sum(counts) == layers * 12
        ids = torch.cat([inputs["input_ids"], tokens, words(len(lengths), 7, seed=3)], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(lengths), 11, dtype=torch.long)], 1)
        again = {"input_ids": ids, "attention_mask": mask}
        _, more = decode(model, again, 4, past_key_values=cache)
    counts = [(layer.positions[0, 0] < 41).sum().item() for layer in cache.layers]
    assert len(set(counts)) == 2
    assert sum(counts) == layers * int(0.4 * 41)
    with masked(model, one):
        assert_close(logits, decode(model, inputs, 4)[1])
    with masked(model, one, cut_of(cache, 41)):
        assert_close(more, decode(model, again, 4)[1])


def test_layer_adaptive_methods_see_every_layer_before_any_is_cut():
    model, seen = text_model(num_hidden_layers=4), []

    class Watching(Heavier):
        def layer_weight(self, view):
            seen.append((view.layer, view.layers, view.length))
            return super().layer_weight(view)

    with kvweave.compress(model, Watching(budget=0.4)) as session:
        decode(model, text_inputs((30,)), 1)
    assert seen == [(n, 4, 30) for n in range(4)]
    assert session.report["totals"]["kept"] == 48


def test_queries_are_released_before_the_cut_of_a_layer_adaptive_method():
    model, queries = text_model(), []

    class Watching(Heavier):
        def allocate(self, weights, budget, length):
            queries.extend(view.queries for view in views)
            return super().allocate(weights, budget, length)

        def layer_weight(self, view):
            views.append(view)
            return super().layer_weight(view)

    views = []
    with kvweave.compress(model, Watching(budget=0.4)):
        decode(model, text_inputs((30,)), 1)
    assert queries == [None, None]


def test_a_method_of_the_users_own_is_registered_by_name():
    from kvweave.methods import registry

    try:
        register("heavier")(Heavier)
        method = kvweave.parse_method("heavier:budget=0.4,window=3")
        assert method == Heavier(budget=0.4, window=3)
        assert kvweave.method_from_dict(method.to_dict()) == method
        assert "heavier" in kvweave.list_methods()
        model = text_model()
        with kvweave.compress(model, method) as session:
            decode(model, text_inputs((30,)), 2)
        assert kvweave.method_from_dict(session.report["method"]) == method
        assert session.report["totals"]["kept"] == 24
    finally:
        registry._REGISTRY.pop("heavier", None)
