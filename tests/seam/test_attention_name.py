"""Attaching changes nothing that a model can see of its attention: the name stays, the function comes back."""

import gc
import threading
import weakref

import pytest
import torch
from tiny import (
    IMAGE,
    assert_close,
    cut_of,
    decode,
    gemma4,
    masked,
    text_inputs,
    text_model,
    vision_model,
)
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import kvweave
from kvweave.seam import lookup

SNAP = kvweave.SnapKV(budget=0.3, window=4)
INPUTS = text_inputs((26,))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_name_stays_and_the_last_to_leave_takes_the_reader_back(attention):
    models = [text_model(attention=attention, seed=n) for n in range(2)]
    plain = [decode(model, INPUTS)[1] for model in models]
    before = dict(AttentionInterface._global_mapping)
    with kvweave.compress(models[0], SNAP) as first:
        for model in models:
            assert lookup.implementation(model.config) == attention
        assert lookup.registered(attention) is not before.get(attention)
        with kvweave.attach(models[1]):
            pass
        decode(models[0], INPUTS)
        assert first.report["totals"]["kept"] == 14
        assert torch.equal(decode(models[1], INPUTS)[1], plain[1])  # a bystander
    assert before == AttentionInterface._global_mapping
    assert torch.equal(decode(models[0], INPUTS)[1], plain[0])


def test_models_of_two_implementations_at_once():
    models = [text_model(attention=attention) for attention in ("sdpa", "eager")]
    alone = []
    for model in models:
        with kvweave.compress(model, SNAP):
            alone.append(decode(model, INPUTS)[1])
    with kvweave.compress(models[0], SNAP), kvweave.compress(models[1], SNAP):
        for model, expected in zip(models, alone, strict=True):
            assert torch.equal(decode(model, INPUTS)[1], expected)


def test_sessions_that_come_and_go_in_threads_leave_the_functions_as_they_were():
    before = dict(AttentionInterface._global_mapping)
    models = [text_model(seed=n) for n in range(3)]
    expected = [decode(model, INPUTS)[1] for model in models]
    wrong = []

    def work(n):
        for _ in range(6):
            with kvweave.compress(models[n], kvweave.Full()):
                if not torch.equal(decode(models[n], INPUTS)[1], expected[n]):
                    wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert before == AttentionInterface._global_mapping


def own(module, query, key, value, attention_mask, **kwargs):
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


@pytest.mark.parametrize("masks", [False, True], ids=["no mask function", "a mask function"])
def test_an_attention_function_of_the_users_own(masks, monkeypatch):
    """Without a mask function beside it the model makes no mask, and says it is causal."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "own_attention", own)
    if masks:
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, "own_attention", sdpa_mask)
    model = text_model()
    model.set_attn_implementation("own_attention")
    plain = decode(model, INPUTS)[1]
    assert_close(plain, decode(text_model(), INPUTS)[1])
    with kvweave.compress(model, SNAP) as session:
        mine = decode(model, INPUTS)[1]
    with masked(model, cut_of(session.cache, 26)):
        assert_close(mine, decode(model, INPUTS)[1])
    assert lookup.registered("own_attention") is own


def test_a_table_of_the_files_own_is_refused_by_name(monkeypatch):
    import transformers.models.llama.modeling_llama as home

    table = AttentionInterface()
    table["sdpa"] = own
    monkeypatch.setattr(home, "ALL_ATTENTION_FUNCTIONS", table)
    with (
        pytest.raises(ValueError, match=r"attn_implementation='sdpa' is Llama[A-Za-z]+'s own"),
        kvweave.attach(text_model()),
    ):
        pass


def test_each_class_falls_back_on_the_eager_function_of_its_own():
    """llama4 has one for its text and one for its pictures in one file."""
    import transformers.models.llama4.modeling_llama4 as home

    assert lookup.eager_function(home.Llama4TextAttention) is home.eager_attention_forward
    assert lookup.eager_function(home.Llama4VisionAttention) is home.vision_eager_attention_forward

    class Mine(home.Llama4VisionAttention):
        pass

    assert lookup.eager_function(Mine) is home.vision_eager_attention_forward
    assert lookup.eager_function(torch.nn.Linear) is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("how", ["attached", "full"])
def test_gemma4_asks_for_the_name_and_gets_it(attention, how):
    """Its image blocks attend to both sides where the implementation is one that it knows."""
    model = gemma4(attention=attention)
    inputs = text_inputs((26,))
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()

    def run():
        with torch.no_grad():
            kept = model(**inputs, logits_to_keep=5).logits
        return kept, decode(model, inputs, 6)[1], decode(model, inputs, 6, prompt_lookup_num_tokens=3)[1]

    plain = run()
    with kvweave.attach(model) if how == "attached" else kvweave.compress(model, kvweave.Full()):
        mine = run()
    for got, expected in zip(mine, plain, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("make", [text_model, vision_model, lambda: text_model(attention="eager")])
def test_a_deleted_model_leaves_memory(make):
    model = make()
    with kvweave.compress(model, SNAP) as session:
        decode(model, INPUTS)
    gone = weakref.ref(model)
    del model, session
    gc.collect()
    assert gone() is None
