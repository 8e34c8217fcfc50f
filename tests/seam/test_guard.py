"""What compresses nothing though it could says so: it raises, or where there is nothing to compress, it warns."""

import gc
import warnings

import pytest
import torch
from tiny import decode, text_inputs, text_model, vision_model, words
from transformers import AttentionInterface, DynamicCache, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import kvweave
from kvweave.seam import names

SNAP = kvweave.SnapKV(budget=0.25, window=4)
INPUTS = text_inputs((24,))


class Renamed(LlamaForCausalLM):
    """Takes its cache under a name that nobody has heard of."""

    def forward(self, input_ids=None, attention_mask=None, kv_store=None, use_cache=None, **kwargs):
        kept = {names.CACHE: kv_store, "use_cache": use_cache}
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kept)


class Stubborn(LlamaForCausalLM):
    """Makes a cache of its own."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        kept = {names.CACHE: DynamicCache(), "use_cache": True}
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kept)


@pytest.mark.parametrize("kind", [Renamed, Stubborn])
def test_a_model_that_does_not_read_the_cache_raises(kind):
    model = kind(text_model().config).eval()
    with (
        kvweave.compress(model, SNAP),
        pytest.raises(RuntimeError, match=f"{kind.__name__} ran and filled none") as e,
    ):
        model(**INPUTS, use_cache=True)
    assert "attention_mask, " in str(e.value)  # what it saw
    assert "DynamicCache of 24 tokens" in str(e.value)
    with kvweave.attach(model), pytest.raises(RuntimeError, match="filled none"):
        model(**INPUTS, past_key_values=kvweave.CompressedCache(model.config, SNAP))
    model(**INPUTS, use_cache=True)  # and is left as it was found


def loop(model, ids, cache):
    """The decoder's layers one after the other, by hand."""
    inner = model.model
    hidden, place = inner.embed_tokens(ids), torch.arange(ids.shape[1])[None]
    tables = inner.rotary_emb(hidden, place)
    for layer in inner.layers:
        hidden = layer(hidden, position_embeddings=tables, position_ids=place, **{names.CACHE: cache})
    return hidden


def test_a_loop_over_the_layers_is_not_compressed_and_says_so_once():
    model, ids = text_model(), INPUTS["input_ids"]
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), kvweave.compress(model, SNAP) as session:
        with pytest.warns(UserWarning, match="outside of its forward pass, as by a loop over its layers"):
            loop(model, ids, cache)
        loop(model, ids, DynamicCache(config=model.config))  # an error if it were said again
        with pytest.raises(RuntimeError, match="a model that kvweave is not attached to"):
            loop(model, ids, kvweave.CompressedCache(model.config, SNAP))
        model(input_ids=ids)
    assert session.report["totals"]["kept"] == 12
    assert cache.get_seq_length() == 24
    loop(model, ids, DynamicCache(config=model.config))  # nobody listens any more


def test_another_model_of_the_same_configuration_may_loop():
    model = text_model()
    other = type(model)(model.config).eval()
    with torch.no_grad(), kvweave.compress(model, SNAP), warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(other, INPUTS["input_ids"], DynamicCache(config=model.config))
        model(**INPUTS)


@pytest.mark.parametrize("of", ["model", "language_model"])
def test_a_model_inside_the_model_is_compressed_too(of):
    """`model.model(context, past_key_values=cache)`, as kvpress has it."""
    model = text_model() if of == "model" else vision_model()
    inner = model.model if of == "model" else model.model.language_model
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), kvweave.compress(model, SNAP) as session:
        inner(input_ids=INPUTS["input_ids"], past_key_values=cache)
    assert session.cache is cache
    assert session.report["totals"]["kept"] == 12


def test_a_layer_that_is_called_by_itself_cannot_fill_a_cache_in_silence():
    model = text_model()
    cache = kvweave.CompressedCache(model.config, SNAP)
    hidden = model.get_input_embeddings()(INPUTS["input_ids"])
    tables = model.model.rotary_emb(hidden, torch.arange(24)[None])
    with torch.no_grad(), kvweave.compress(model, SNAP), pytest.raises(RuntimeError, match="attach"):
        model.model.layers[0](hidden, position_embeddings=tables, **{names.CACHE: cache})


@pytest.mark.parametrize("how", ["chosen anew", "replaced", "registered anew"])
def test_keys_that_attention_never_reads_raise(how, monkeypatch):
    model = text_model()

    def attend(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            f(hidden_states).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        cache = kwargs[names.CACHE]
        key, value = cache.update(key, value, self.layer_idx)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None

    with kvweave.compress(model, SNAP), monkeypatch.context() as patch:
        if how == "chosen anew":
            model.set_attn_implementation("eager")
        elif how == "replaced":
            patch.setattr(type(model.model.layers[0].self_attn), "forward", attend)
        else:
            patch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa_attention_forward)
        with pytest.raises(RuntimeError, match="nobody read the keys of layer 0"):
            model(**INPUTS)


def test_keys_that_attention_stops_reading_in_a_conversation_raise():
    model = text_model()
    with torch.no_grad(), kvweave.compress(model, kvweave.Full()) as session:
        model(**INPUTS)
        model.set_attn_implementation("eager")
        with pytest.raises(RuntimeError, match="nobody read the keys"):
            model(input_ids=words(1, 1), past_key_values=session.cache)


def test_a_prompt_within_its_budget_is_fine():
    model = text_model()
    with warnings.catch_warnings(), kvweave.compress(model, kvweave.SnapKV(budget=100)) as session:
        warnings.simplefilter("error")
        decode(model, INPUTS)
    assert session.report["totals"]["kept"] == 48


def test_no_cache_warns_once():
    model = text_model()
    with kvweave.compress(model, SNAP) as session:
        with pytest.warns(UserWarning, match="use_cache=False: kvweave compresses nothing"):
            decode(model, INPUTS, use_cache=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            decode(model, INPUTS, use_cache=False)
    assert session.report == {}


def test_a_model_in_training_that_keeps_no_cache_warns():
    model = text_model()
    model.gradient_checkpointing_enable()
    model.train()
    with kvweave.compress(model, SNAP), pytest.warns(UserWarning, match="no cache is kept"):
        model(**INPUTS)


def test_a_session_that_was_never_entered_warns_when_it_is_asked_or_forgotten():
    model = text_model()
    session = kvweave.compress(model, SNAP)
    with pytest.warns(UserWarning, match="never entered"):
        assert session.report == {}
    with pytest.warns(UserWarning, match="never entered"):
        del session
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with kvweave.compress(model, SNAP) as session:
            assert session.report == {}
        del session
        gc.collect()


def test_a_session_says_what_it_saved():
    model = text_model()
    with kvweave.compress(model, SNAP) as session:
        assert "snapkv:budget=0.25" in repr(session)
        assert "nothing compressed" in repr(session)
        decode(model, INPUTS)
        assert "attached to LlamaForCausalLM: 24 tokens in 6 entries a layer, 6.0 KiB in 1.5 KiB, 25 %" in repr(
            session
        )
    assert "not attached to" in repr(session)


def test_what_is_attached_can_be_detached_by_its_model():
    model = text_model()
    session = kvweave.attach(model)
    with pytest.raises(RuntimeError, match=r"kvweave\.detach\(model\)"):
        kvweave.attach(model)
    with pytest.raises(RuntimeError, match="already attached"):
        kvweave.attach(model.model)  # a part of it
    kvweave.detach(model)
    assert not session.attached
    kvweave.detach(model)  # nothing is left to do
    with kvweave.compress(model, SNAP) as session:
        decode(model, INPUTS)
    assert session.report["totals"]["kept"] == 12


def test_attach_is_a_context_manager():
    model = text_model()
    with kvweave.attach(model) as session:
        assert session.attached
        cache = kvweave.CompressedCache(model.config, SNAP)
        decode(model, INPUTS, past_key_values=cache)
        with pytest.raises(RuntimeError, match="do not nest"), session:
            pass
    assert not session.attached
    assert "generate" not in vars(model)
    assert cache.report["totals"]["kept"] == 12


@pytest.mark.parametrize(
    ("words_of_it", "method"),
    [
        (("snapkv:budget=0.25,window=4",), SNAP),
        (("snapkv",), kvweave.SnapKV()),
    ],
)
def test_a_method_may_be_spelled(words_of_it, method):
    model = text_model()
    with kvweave.compress(model, *words_of_it) as session:
        decode(model, INPUTS)
    assert session.method == method
    assert session.cache.method == method


def test_a_budget_alone_means_weave():
    model = text_model()
    with kvweave.compress(model, budget=0.25) as session:
        decode(model, INPUTS)
    assert session.method == kvweave.Weave(budget=0.25)
    with pytest.raises(ValueError, match=r"budget=0\.25 is not allowed beside method"):
        kvweave.compress(model, "snapkv", budget=0.25)
    with pytest.raises(ValueError, match="snappkv"):
        kvweave.compress(model, "snappkv")


class Adapted(torch.nn.Module):
    """As PEFT wraps a model: `generate` and forward passes go on to the model inside."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def get_base_model(self):
        return self.base_model

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)

    def generate(self, *args, **kwargs):
        return self.base_model.generate(*args, **kwargs)


def test_a_wrapped_model_is_compressed_inside():
    model = text_model()
    wrapped = Adapted(model)
    with kvweave.compress(model, SNAP):
        expected = decode(model, INPUTS)[1]
    with kvweave.compress(wrapped, SNAP) as session:
        assert torch.equal(decode(wrapped, INPUTS)[1], expected)
        with pytest.raises(RuntimeError, match="already attached"):
            kvweave.attach(model)
    assert session.report["totals"]["kept"] == 12
    assert "Adapted" in repr(session)
    assert "generate" not in vars(model)


def test_continuous_batching_is_refused_and_comes_back():
    """Its requests would fail one by one, in a thread of its own, and the answers be empty."""
    model = text_model()
    before = model.init_continuous_batching
    with kvweave.compress(model, "snapkv:budget=0.3"):
        for begin in (lambda: model.generate_batch([[11, 12]]), model.init_continuous_batching):
            with pytest.raises(ValueError, match="continuous batching keeps keys and values in pages"):
                begin()
        for kind in ("paged", "quantized"):
            with pytest.raises(ValueError, match=f"cache_implementation='{kind}' cannot be compressed"):
                model.generate(words(1, 20), max_new_tokens=2, cache_implementation=kind)
    assert model.init_continuous_batching == before
