"""Flash attention as the model's own: transformers' real path, with the package's two functions computed on the CPU.

Flash attention knows no mask but padding, aligns causality at the bottom right, and is looked up by the name of the
implementation.
"""

import copy
import gc
import sys
import types
import weakref

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from methods_for_tests import Heavier
from test_latents import mla_model
from tiny import assert_close, cut_of, decode, masked, text_inputs, text_model, words
from transformers import DynamicCache, PreTrainedModel

import kvweave

METHODS = {
    "snapkv": kvweave.SnapKV(budget=0.3, window=4),
    "h2o": kvweave.H2O(budget=0.3),
    "streaming_llm": kvweave.StreamingLLM(budget=0.3),
    "layer-adaptive": Heavier(budget=0.3),
}


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **kwargs):
    """[batch, length, heads, dim], as the package has it."""
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = q @ k.transpose(-1, -2) * softmax_scale
    if causal:
        rows, columns = logits.shape[-2:]
        logits = logits.masked_fill(torch.ones(rows, columns).tril(columns - rows) == 0, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).float()


def flash_attn_varlen_func(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, **kwargs):
    """Sequences one behind another, [tokens, heads, dim]."""
    for unused in ("max_seqlen_q", "max_seqlen_k"):
        kwargs.pop(unused, None)
    ends = zip(cu_seqlens_q.tolist()[:-1], cu_seqlens_q.tolist()[1:], strict=True)
    pieces = []
    for n, (start, stop) in enumerate(ends):
        first, end = cu_seqlens_k[n], cu_seqlens_k[n + 1]
        pieces.append(flash_attn_func(q[None, start:stop], k[None, first:end], v[None, first:end], **kwargs)[0])
    return torch.cat(pieces)


@pytest.fixture
def stand_in(monkeypatch):
    """The package, as transformers finds it."""
    package, padding = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.bert_padding")
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    package.flash_attn_with_kvcache = None
    padding.pad_input, padding.unpad_input = flash_utils._pad_input, flash_utils._unpad_input
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(flash_utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda self, *args, **kwargs: True)


@pytest.fixture
def model(stand_in):
    model = text_model()
    model.set_attn_implementation("flash_attention_2")
    assert model.config._attn_implementation == "flash_attention_2"
    return model


def test_the_stand_in_agrees_with_eager_attention(model):
    inputs = text_inputs((26, 19))
    mine = decode(model, inputs)[1]
    with masked(model):
        assert_close(mine, decode(model, inputs)[1])


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("lengths", [(26,), (26, 19)], ids=["one", "batch"])
def test_decoding_equals_the_oracle(model, method, lengths):
    inputs = text_inputs(lengths)
    plain = decode(model, inputs)[1]
    with kvweave.compress(model, method) as session:
        _, logits = decode(model, inputs)
    assert model.config._attn_implementation == "flash_attention_2"
    assert torch.equal(logits[:, 0], plain[:, 0])
    with masked(model, cut_of(session.cache, 26)):
        assert_close(logits, decode(model, inputs)[1])


@pytest.mark.parametrize("lengths", [(26,), (26, 19)], ids=["one", "batch"])
def test_a_second_turn_equals_the_oracle(model, lengths):
    inputs = text_inputs(lengths)
    with kvweave.compress(model, METHODS["snapkv"]) as session:
        tokens, _ = decode(model, inputs)
        one = cut_of(session.cache, 26)
        ids = torch.cat([inputs["input_ids"], tokens, words(len(lengths), 7, seed=3)], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(lengths), 11, dtype=torch.long)], 1)
        again = {"input_ids": ids, "attention_mask": mask}
        _, logits = decode(model, again, past_key_values=session.cache)
    with masked(model, one, cut_of(session.cache, 37)):
        assert_close(logits, decode(model, again)[1])


@pytest.mark.parametrize("lengths", [(26,), (26, 19)], ids=["one", "batch"])
def test_latents_of_all_heads(stand_in, lengths):
    model, inputs = mla_model(v_head_dim=12), text_inputs(lengths)
    model.set_attn_implementation("flash_attention_2")
    plain = decode(model, inputs)[1]
    with kvweave.compress(model, METHODS["h2o"]) as session:
        _, logits = decode(model, inputs)
    assert torch.equal(logits[:, 0], plain[:, 0])
    assert session.report["totals"]["layers"] == 2
    with masked(model, cut_of(session.cache, 26)):
        assert_close(logits, decode(model, inputs)[1])


def test_budget_one_is_bit_identical(model):
    inputs = text_inputs((26, 19))
    plain = decode(model, inputs)[1]
    with kvweave.compress(model, kvweave.H2O(budget=1.0)):
        assert torch.equal(decode(model, inputs)[1], plain)


def test_a_deleted_model_leaves_memory(model):
    other = copy.deepcopy(model)
    with kvweave.compress(other, METHODS["snapkv"]):
        decode(other, text_inputs((26,)))
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None


def test_a_bias_on_the_logits_is_refused_by_name(model):
    method = kvweave.FlowMM(budget=0.3, mass_bias=True)
    with pytest.raises(ValueError, match="mass_bias"), kvweave.compress(model, method):
        pass
    handle = kvweave.attach(model)
    cache = kvweave.CompressedCache(model.config, method)
    with pytest.raises(ValueError, match="mass_bias"):
        decode(model, text_inputs((26,)), past_key_values=cache)
    handle.detach()


@pytest.mark.parametrize(
    "method", [METHODS["streaming_llm"], METHODS["layer-adaptive"]], ids=["even", "uneven layers"]
)
def test_padding_behind_the_cut_is_hidden(model, method):
    """Questions of unequal length on one context."""
    context, questions = words(1, 30), words(2, 10, seed=5)
    questions[1, :4] = 0
    ids = torch.cat([context.expand(2, -1), questions], 1)
    mask = torch.ones_like(ids)
    mask[1, 30:34] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}

    def read(cache):
        with torch.no_grad():
            model(input_ids=context, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        return cache

    handle = kvweave.attach(model)
    cache = read(kvweave.CompressedCache(model.config, method))
    cache.freeze()
    cut = cut_of(cache, 30)
    logits = decode(model, inputs, past_key_values=cache)[1]
    handle.detach()
    with masked(model, cut):
        expected = decode(model, inputs, past_key_values=read(DynamicCache(config=model.config)))[1]
    assert_close(logits, expected)


def test_heads_that_hold_different_columns_are_each_shown_their_own(model):
    """A later mask hides columns that one head holds and another does not."""
    inputs = text_inputs((26, 26))
    handle = kvweave.attach(model)
    cache = kvweave.CompressedCache(model.config, METHODS["snapkv"])
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    cache.freeze()
    cut = cut_of(cache, 26)
    ids = torch.cat([inputs["input_ids"], words(2, 7, seed=3)], 1)
    mask = torch.ones_like(ids)
    mask[:, :26:2] = 0
    hidden = (cache.layers[0].positions % 2 == 0) & (cache.layers[0].positions >= 0)
    assert not torch.equal(hidden[:, 0], hidden[:, 1])
    logits = decode(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)[1]
    handle.detach()
    with masked(model, cut):
        plain = DynamicCache(config=model.config)
        with torch.no_grad():
            model(**inputs, past_key_values=plain)
        again = {"input_ids": ids, "attention_mask": mask}
        assert_close(logits, decode(model, again, past_key_values=plain)[1])
