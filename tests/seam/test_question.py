"""Many questions on one context: each asked on the cache, which is then as it was."""

import copy

import pytest
import torch
from tiny import (
    VOCABULARY,
    assert_close,
    cut_of,
    decode,
    masked,
    picture_inputs,
    text_inputs,
    text_model,
    vision_model,
    words,
)
from transformers import CompileConfig

import kvweave
from kvweave.seam.names import CACHE

METHODS = {
    "snapkv": kvweave.SnapKV(budget=0.3, window=4),
    "flowmm": kvweave.FlowMM(budget=0.3, proxies=4),
    "adakv": kvweave.get_method("adakv", budget=0.3, window=4),
    "weave": kvweave.Weave(budget=0.4, proxies=4, recent=4),
    "quantized": kvweave.Quantized(kvweave.SnapKV(budget=0.4, window=4), bits=4),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def read(model, method, inputs):
    cache = kvweave.CompressedCache(model.config, method)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    return cache


def state(cache):
    """Everything that a cache knows, copied."""
    return [copy.deepcopy({k: v for k, v in vars(layer).items() if k != "shared"}) for layer in cache.layers], (
        copy.deepcopy(cache.shared.turn)
    )


def assert_same(mine, theirs):
    """To the bit, in whatever both are made of."""
    assert type(mine) is type(theirs)
    if isinstance(mine, torch.Tensor):
        assert torch.equal(mine, theirs)
    elif isinstance(mine, (list, tuple)):
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert_same(mine[name], theirs[name])
    elif hasattr(mine, "__dict__") and type(mine).__module__.startswith("kvweave"):
        assert_same({**mine.__getstate__()}, {**theirs.__getstate__()})
    else:
        assert mine == theirs


@every_method
@pytest.mark.parametrize("lengths", [(30,), (30, 21)], ids=["one", "batch"])
def test_a_question_leaves_the_cache_as_it_was(method, lengths):
    """And is answered as on a copy of the cache that was frozen."""
    model, context = text_model("llava"), text_inputs(lengths)
    with kvweave.attach(model):
        cache = read(model, method, context)
        for seed in (1, 2, 1):
            asked = words(len(lengths), 5, seed=seed)
            frozen = copy.deepcopy(cache)
            frozen.freeze()
            ids = torch.cat([context["input_ids"], asked], 1)
            mask = torch.cat([context["attention_mask"], torch.ones_like(asked)], 1)
            whole = {"input_ids": ids, "attention_mask": mask}
            expected = decode(model, whole | {"past_key_values": frozen})
            cache.cut_waiting()
            before = state(cache)
            with cache.question(asked) as inputs:
                mine = decode(model, inputs)
                assert cache.get_seq_length() == 38
            assert_same(state(cache), before)
            with cache.question() as nothing:
                again = decode(model, whole | {"past_key_values": cache})
            assert nothing == {}
            assert_same(state(cache), before)
            assert all(torch.equal(a, b) for a, b in zip(mine + again, expected + expected, strict=True))


def test_a_conversation_goes_on_behind_its_questions_as_if_they_had_not_been():
    model, context, more = text_model(), words(1, 30), words(1, 9, seed=7)
    with kvweave.attach(model):
        caches = [read(model, METHODS["snapkv"], {"input_ids": context}) for _ in range(2)]
        with caches[0].question(words(1, 5, seed=1)) as inputs:
            model.generate(**inputs, max_new_tokens=4)
            with caches[0].question():  # a question about the question
                model(input_ids=words(1, 40, seed=3), past_key_values=caches[0])
            assert caches[0].get_seq_length() == 38
        with torch.no_grad():
            logits = [model(input_ids=more, past_key_values=cache).logits for cache in caches]
    assert torch.equal(*logits)
    assert caches[0].layers[0].positions.shape[-1] == int(0.3 * 39)  # and is compressed again
    assert_same(state(caches[0]), state(caches[1]))


@pytest.mark.parametrize("kind", ["gemma2", "lfm2", "qwen3_5_text"])
def test_layers_that_keep_no_past_are_rolled_back_too(kind):
    """Windows that slide, and states: a question longer than what they hold."""
    special = {
        "gemma2": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6, "attention": "eager"},
        "lfm2": {"layer_types": ["conv", "full_attention"]},
        "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    }[kind]
    model, context, asked = text_model(kind, **special), words(1, 30), words(1, 12, seed=1)
    ids = torch.cat([context, asked], 1)
    with kvweave.attach(model), torch.no_grad():
        cache = read(model, METHODS["snapkv"], {"input_ids": context})
        before = state(cache)
        for _ in range(2):
            with cache.question(asked) as inputs:
                tokens, logits = decode(model, inputs)
            assert_same(state(cache), before)
        cut = cut_of(cache, 30)
    with masked(model, cut):
        expected, theirs = decode(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert torch.equal(tokens, expected)
    assert_close(logits, theirs)


def stumble(model, cache):
    """A question in which much goes wrong."""
    with cache.question(words(1, 5)) as inputs:
        model.generate(**inputs, max_new_tokens=4)
        cache.reset()
        model(input_ids=torch.tensor([[VOCABULARY]]), past_key_values=cache)


def test_an_error_in_the_middle_leaves_the_cache_as_it_was():
    model = text_model()
    with kvweave.attach(model):
        cache = read(model, METHODS["snapkv"], {"input_ids": words(1, 30)})
        before = state(cache)
        with pytest.raises(IndexError):
            stumble(model, cache)
        assert_same(state(cache), before)


def test_compiled_steps_lay_room_out_for_one_question():
    model, asked = text_model(), words(1, 5, seed=1)
    with kvweave.attach(model):
        cache = read(model, METHODS["snapkv"], {"input_ids": words(1, 30)})
        before = state(cache)
        with cache.question(asked) as inputs:
            expected = model.generate(**inputs, max_new_tokens=4)
        config = CompileConfig(backend="eager", dynamic=True)
        with cache.question(asked) as inputs:
            assert torch.equal(model.generate(**inputs, max_new_tokens=4, compile_config=config), expected)
        assert_same(state(cache), before)
        assert cache.shared.room is None


def test_samples_and_beams_of_one_question_begin_with_the_same_cache():
    model, asked = text_model(), words(1, 5, seed=1)
    options = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 3}
    with kvweave.attach(model):
        cache = read(model, METHODS["snapkv"], {"input_ids": words(1, 30)})
        before = state(cache)
        with cache.question(asked) as inputs:
            mine = model.generate(**inputs, **options)
        assert_same(state(cache), before)
        cut, ids = cut_of(cache, 30), inputs["input_ids"]
    with masked(model, cut):
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(mine, expected)


# -------------------------------------------------------------------- pictures


def conversation(model, pictures):
    """A context with two pictures, and a question behind it with as many as are asked for."""
    both = picture_inputs((24,), pictures=2), picture_inputs((20,), pictures=pictures, seed=4)
    whole = {name: torch.cat([both[0][name], both[1][name]], 1) for name in ("input_ids", "mm_token_type_ids")}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    for name in ("pixel_values", "image_grid_thw"):
        whole[name] = torch.cat([part[name] for part in both if name in part])
    return both[0], whole


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_pictures_that_the_cache_has_read_are_not_read_again(pictures):
    """The whole conversation may be given: what is new is found by its tokens, and positions are the whole's."""
    model = vision_model()
    context, whole = conversation(model, pictures)
    expected, theirs = decode(model, whole)
    calls = []
    model.model.visual.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    with kvweave.attach(model):
        cache = kvweave.CompressedCache(model.config, kvweave.SnapKV(budget=1.0))
        model.generate(**context, past_key_values=cache, max_new_tokens=1)
        before, calls[:] = state(cache), []
        other = kvweave.CompressedCache(model.config, kvweave.SnapKV(budget=1.0))
        for _ in range(2):
            model.generate(**picture_inputs((40,), pictures=3, seed=9), past_key_values=other, max_new_tokens=1)
            other.reset()  # another context moves the model's own count of positions
            calls[:] = []
            with cache.question():
                tokens, logits = decode(model, whole | {"past_key_values": cache})
            assert torch.equal(tokens, expected)
            assert_close(logits, theirs)
            assert_same(state(cache), before)
            assert len(calls) == min(pictures, 1)


def test_a_question_of_text_behind_pictures_needs_its_own_tokens_alone():
    model = vision_model()
    context, whole = conversation(model, 0)
    expected, theirs = decode(model, whole)
    with kvweave.attach(model):
        cache = kvweave.CompressedCache(model.config, kvweave.SnapKV(budget=1.0))
        model.generate(**context, past_key_values=cache, max_new_tokens=1)
        model.model.rope_deltas = None  # as in another process
        with cache.question(whole["input_ids"][:, 24:]) as inputs:
            assert inputs.keys() == {"input_ids", "attention_mask", CACHE}
            tokens, logits = decode(model, inputs)
    assert torch.equal(tokens, expected)
    assert_close(logits, theirs)


def test_a_padded_batch_of_pictures_reads_the_new_ones_of_each_row():
    model, lengths = vision_model(), (24, 17)
    first, second = picture_inputs(lengths, pictures=1), picture_inputs((10, 10), pictures=1, seed=4)
    whole = {
        name: torch.cat([first[name], second[name]], 1)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    pixels = [part["pixel_values"].unflatten(0, (2, -1)) for part in (first, second)]  # [rows, patches, values]
    whole["pixel_values"] = torch.stack(pixels, 1).flatten(0, 2)
    whole["image_grid_thw"] = torch.cat([first["image_grid_thw"], second["image_grid_thw"]])
    expected, theirs = decode(model, whole)
    with kvweave.attach(model):
        cache = kvweave.CompressedCache(model.config, kvweave.SnapKV(budget=1.0))
        model.generate(**first, past_key_values=cache, max_new_tokens=1)
        with cache.question():
            tokens, logits = decode(model, whole | {"past_key_values": cache})
    assert torch.equal(tokens, expected)
    assert_close(logits, theirs)


def test_one_tensor_a_picture():
    """As LLaVA takes them: the third of three, found by its tokens, given with the others or alone."""
    torch.manual_seed(0)
    vision = {"image_size": 8, "patch_size": 4, "model_type": "clip_vision_model"}
    model = text_model("llava", vision_config=vision, vision_feature_select_strategy="full")
    ids = words(1, 44, images=((2, 7), (10, 15), (34, 39)))  # 5 tokens each: 4 patches and a class
    pixels = torch.randn(3, 3, 8, 8)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    expected, theirs = decode(model, whole)
    context = {"input_ids": ids[:, :24], "pixel_values": pixels[:2]}
    with kvweave.attach(model):
        cache = read(model, kvweave.SnapKV(budget=1.0), context)
        for given in (pixels, pixels[2:]):
            with cache.question():
                tokens, logits = decode(model, whole | {"pixel_values": given, "past_key_values": cache})
            assert torch.equal(tokens, expected)
            assert_close(logits, theirs)


# -------------------------------------------------------------------- what is refused


def test_a_question_without_a_context_is_refused():
    model = text_model()
    cache = kvweave.CompressedCache(model.config, METHODS["snapkv"])
    with pytest.raises(ValueError, match="holds nothing yet"), cache.question():
        pass
    cache.declare_prompt(40)
    with kvweave.attach(model), torch.no_grad():
        model(input_ids=words(1, 30), past_key_values=cache)
        with pytest.raises(ValueError, match="30 of the 40 tokens"), cache.question():
            pass
        held = kvweave.CompressedCache(model.config, METHODS["snapkv"], hold=True)
        model(input_ids=words(1, 30), past_key_values=held)
        with pytest.raises(ValueError, match=r"after cache\.compress\(\)"), held.question():
            pass
        held.compress()
        with held.question(words(1, 3)) as inputs:
            assert inputs["input_ids"].shape == (1, 33)


@pytest.mark.parametrize("ids", [[1, 2], words(2, 5), words(1, 5)[0], words(1, 5)[:, :0]], ids=str)
def test_ids_that_are_none_are_refused(ids):
    model = text_model()
    with kvweave.attach(model):
        cache = read(model, METHODS["snapkv"], {"input_ids": words(1, 30)})
        with pytest.raises(ValueError, match=r"allowed is a tensor \[1, tokens\]"), cache.question(ids):
            pass


def test_a_question_behind_tokens_that_are_not_known_is_refused():
    model, ids = text_model(), words(1, 30)
    with kvweave.attach(model):
        cache = read(model, METHODS["snapkv"], {"inputs_embeds": model.get_input_embeddings()(ids).detach()})
        with pytest.raises(ValueError, match="came as embeddings"), cache.question(words(1, 5)):
            pass
        cache = kvweave.CompressedCache(model.config, METHODS["snapkv"])
        reply = model.generate(ids, past_key_values=cache, max_new_tokens=4)
        with pytest.raises(ValueError, match="hold a reply"), cache.question(words(1, 5)):
            pass
        with cache.question():
            whole = torch.cat([reply, words(1, 5)], 1)
            assert model.generate(whole, past_key_values=cache, max_new_tokens=4).shape == (1, 43)


def test_a_conversation_that_is_another_is_not_taken_in_silence():
    """Transformers goes by lengths alone, and would read the tail of whatever it is given."""
    model, ids = text_model(), words(1, 30)
    with kvweave.attach(model):
        cache = read(model, METHODS["snapkv"], {"input_ids": ids})
        with pytest.raises(ValueError, match="has read 30 tokens, and input_ids are 7"):
            model.generate(words(1, 7), past_key_values=cache, max_new_tokens=4)
        other = torch.cat([ids, words(1, 5)], 1)
        other[0, 17] += 1
        with pytest.warns(UserWarning, match="from column 17 on: the reply goes by what the cache has read"):
            model.generate(other, past_key_values=cache, max_new_tokens=4)


def test_pictures_that_fit_neither_the_conversation_nor_its_new_part_are_refused():
    model = vision_model()
    context, whole = conversation(model, 2)
    whole["pixel_values"], whole["image_grid_thw"] = whole["pixel_values"][16:], whole["image_grid_thw"][1:]
    with kvweave.attach(model):
        cache = kvweave.CompressedCache(model.config, METHODS["snapkv"])
        model.generate(**context, past_key_values=cache, max_new_tokens=1)
        with pytest.raises(ValueError, match="3 pictures are given, and of 4"), cache.question():
            model.generate(**whole, past_key_values=cache, max_new_tokens=1)
