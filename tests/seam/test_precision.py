"""Where tensors come from: autocast, inference mode, another device."""

import pytest
import torch
from tiny import assert_close, decode, text_inputs, text_model, words

import kvweave
from kvweave.cut.rows import group_rows
from kvweave.memory import heads
from kvweave.memory.slots import Slots
from kvweave.ops import spread, statistics
from kvweave.ops.statistics import AttentionRule
from kvweave.prompt import Prompt

METHODS = {
    "snapkv": kvweave.SnapKV(budget=0.3, window=4),
    "weave": kvweave.Weave(budget=0.4, proxies=4, recent=4),
    "adakv": kvweave.get_method("adakv", budget=0.3, window=4),
    "full": kvweave.Full(),
}


def tensors(seed, length=600):
    generator = torch.Generator().manual_seed(seed)
    queries, keys, values = (torch.randn(1, heads, length, 16, generator=generator) for heads in (4, 2, 2))
    visual = torch.zeros(1, length, dtype=torch.bool)
    visual[:, 20 : length - 100] = True
    return queries, keys, values, visual


RULE = AttentionRule(0.25)
STATISTICS = {
    "column_sums": lambda q, k, visual: statistics.column_sums(q, k, RULE, torch.stack([~visual, visual], 1)),
    "window_attention": lambda q, k, visual: statistics.window_attention(q, k, RULE, 32),
    "column_peaks": lambda q, k, visual: statistics.column_peaks(q, k, RULE),
    "cross_entropy": lambda q, k, visual: spread.cross_entropy(
        q, k, RULE, visual[:, None].expand(1, 2, -1), visual, causal=True
    ),
    "row_density": lambda q, k, visual: spread.row_density(q[:, :, -100:], k, RULE, 0.01),
}


@pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)
def test_statistics_are_what_they_are_without_autocast(statistic):
    queries, keys, _, visual = tensors(0)
    expected = statistic(queries, keys, visual)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(statistic(queries, keys, visual), expected)


@pytest.mark.parametrize("name", kvweave.list_methods())
def test_every_method_keeps_and_merges_the_same_under_autocast(name):
    queries, keys, values, visual = tensors(1)
    method = kvweave.get_method(name, budget=0.2, defer=0)
    angle = torch.arange(600.0)[None, :, None] * 10.0 ** -torch.arange(8).repeat(2)
    options = {"visual": visual, "rotary": (angle.cos(), angle.sin())}
    (expected,) = kvweave.compress_tensors(method, [queries], [keys], [values], **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (mine,) = kvweave.compress_tensors(method, [queries], [keys], [values], **options)
    assert torch.equal(mine.positions, expected.positions)
    assert torch.equal(mine.keys, expected.keys)
    assert torch.equal(mine.values, expected.values)


def test_probes_and_decoded_tokens_count_the_same_under_autocast():
    queries, keys, values, visual = tensors(2)
    decoded = [queries[:, :, :2]], [keys[:, :, :2]]
    method = kvweave.Weave(budget=0.2)
    (expected,) = kvweave.compress_tensors(method, [queries], [keys], [values], visual=visual, decoded=decoded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (mine,) = kvweave.compress_tensors(method, [queries], [keys], [values], visual=visual, decoded=decoded)
    assert torch.equal(mine.positions, expected.positions)


# -------------------------------------------------------------------- inference mode


@pytest.mark.parametrize("first", ["forward", "generate", "reserved"])
@pytest.mark.parametrize("second", ["forward", "generate"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_cache_filled_in_inference_mode_is_used_outside(first, second, method):
    model, answers = text_model(), []
    handle = kvweave.attach(model)
    for inference in (False, True):
        cache, ids = kvweave.CompressedCache(model.config, method), words(2, 30)
        with torch.inference_mode(inference), torch.no_grad():
            if first == "generate":
                ids = model.generate(ids, past_key_values=cache, max_new_tokens=4)
            else:
                model(input_ids=ids, past_key_values=cache)
            if first == "reserved":
                cache.reserve(8)
            cache.reorder_cache(torch.tensor([1, 0]))
            ids = ids.flip(0)
        if second == "generate":
            cache.settle()
            ids = torch.cat([ids, words(2, 6)], 1)
            answers.append(model.generate(ids, past_key_values=cache, max_new_tokens=6))
        else:
            with torch.no_grad():
                steps = [model(input_ids=words(2, 1, seed=n), past_key_values=cache).logits for n in range(5)]
            answers.append(torch.cat(steps, 1))
    handle.detach()
    assert torch.equal(*answers)


# -------------------------------------------------------------------- another device


class Elsewhere(torch.Tensor):
    """A tensor of another device: nothing but `to` takes it together with others."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.to:
            return args[0].as_subclass(torch.Tensor)
        raise RuntimeError("Expected all tensors to be on the same device")


def test_rotary_tables_are_brought_to_each_layers_device():
    """They are noted at the first layer, and others may live on another device."""
    _, keys, values, visual = tensors(3, length=130)
    prompt = Prompt(visual, torch.ones_like(visual))
    tables = tuple(torch.randn(1, 130, 16) for _ in range(2))
    groups = [
        group_rows(Slots(keys, values).as_slots(prompt.valid), None, prompt, RULE, rotary=rotary)
        for rotary in (tables, tuple(table.as_subclass(Elsewhere) for table in tables))
    ]
    for mine, here in zip(groups[1][0].view.rotary, groups[0][0].view.rotary, strict=True):
        assert torch.equal(mine, here)


# -------------------------------------------------------------------- attention weights


def test_heads_of_unequal_counts_return_their_attention_weights(monkeypatch):
    monkeypatch.setattr(heads, "_CALL", 0)  # they lie apart, however short they are
    model, inputs = text_model(attention="eager"), text_inputs((26,))
    with torch.no_grad(), kvweave.compress(model, METHODS["adakv"]) as session:
        model(**inputs)
        cache = session.cache
        out = model(input_ids=words(1, 1), past_key_values=cache, output_attentions=True)
    assert any(len(layer.block.parts) > 1 for layer in cache.layers)
    for layer, weights in zip(cache.layers, out.attentions, strict=True):
        assert weights.shape == (1, 4, 1, layer.keys.shape[2])
        assert_close(weights.sum(-1), torch.ones(1, 4, 1))
        empty = (layer.positions < 0).repeat_interleave(2, 1)
        assert empty.any() == (len(layer.block.parts) > 1)
        assert not weights[:, :, 0][empty].any()


def test_attention_weights_come_with_generate_too():
    model, inputs = text_model(attention="eager"), text_inputs((26, 19))
    with kvweave.compress(model, METHODS["adakv"]):
        out = model.generate(**inputs, max_new_tokens=4, output_attentions=True, return_dict_in_generate=True)
        _, logits = decode(model, inputs, 4)
    assert logits.isfinite().all()
    assert all(weights is not None for step in out.attentions for weights in step)
