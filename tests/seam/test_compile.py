"""A decode step on a compressed cache compiles to one graph."""

import pytest
import torch
from compiling import TWELVE, Graphs
from tiny import assert_close, picture_inputs, text_inputs, text_model, vision_model, words
from torch._dynamo.testing import CompileCounter
from transformers.cache_utils import DynamicSlidingWindowLayer

import kvweave
from kvweave.seam.window import FixedWindow


@pytest.mark.parametrize(("lengths", "mass_bias"), [((30,), False), ((30, 21), True)], ids=["one", "batch, bias"])
def test_a_decode_step_is_one_graph_whatever_the_number_of_slots(lengths, mass_bias):
    model = text_model(num_hidden_layers=1)
    method = kvweave.FlowMM(budget=0.3, proxies=4, mass_bias=mass_bias)
    inputs, follow = text_inputs(lengths), words(len(lengths), 8, seed=7)
    counter = CompileCounter()
    torch._dynamo.reset()

    def step(ids, cache, mask, positions):
        return model(input_ids=ids, past_key_values=cache, attention_mask=mask, position_ids=positions).logits

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad(), kvweave.compress(model, method) as session:
        runs = []
        for function in (step, compiled):
            positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
            model(**inputs, position_ids=positions)
            mask, logits = inputs["attention_mask"], []
            for n in range(8):
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                position = mask.sum(1, keepdim=True) - 1
                logits.append(function(follow[:, n : n + 1], session.cache, mask, position))
            runs.append(torch.cat(logits, 1))
    assert_close(runs[1], runs[0])
    assert counter.frame_count <= 2  # the first step's cache has no decoded token yet: one more graph, not one a step


CASES = {
    "flowmm": (kvweave.FlowMM(budget=0.3, proxies=4), (30,)),
    "mass bias": (kvweave.FlowMM(budget=0.3, proxies=4, mass_bias=True), (30, 21)),
    "unequal layers": (kvweave.get_method("pyramidkv", budget=0.3, window=4), (30, 21)),
    "unequal heads": (kvweave.get_method("adakv", budget=0.3, window=4), (30, 21)),
    "full": (kvweave.get_method("full"), (30, 21)),
    "deferred": (kvweave.get_method("weave", budget=0.3, proxies=4, recent=4), (30, 21)),
    "deferred by more": (kvweave.get_method("snapkv", budget=0.3, window=4, defer=4), (30,)),
}


@pytest.mark.parametrize(("method", "lengths"), CASES.values(), ids=CASES)
def test_generate_compiles_its_decode_steps_once(method, lengths):
    model, inputs, graphs = text_model(), text_inputs(lengths), Graphs()
    with kvweave.compress(model, method) as session:
        plain = model.generate(**inputs, **TWELVE)
        held = session.cache
        compiled = model.generate(**inputs, **TWELVE, **graphs.compiling())
    assert torch.equal(compiled, plain)
    assert len(graphs) == 1
    for mine, theirs in zip(session.cache.layers, held.layers, strict=True):
        assert_close(mine.keys, theirs.keys)
        assert torch.equal(mine.positions, theirs.positions)
    assert torch.equal(session.cache.prompt.valid, held.prompt.valid)
    assert session.report["totals"] == held.report["totals"]


SLIDING = ["sliding_attention", "full_attention"]
MIXED = {
    "a full window": lambda: text_model("gemma3_text", layer_types=SLIDING, sliding_window=6),
    "a window that fills": lambda: text_model("gemma3_text", layer_types=SLIDING, sliding_window=36),
    "linear": lambda: text_model("qwen3_5_text", layer_types=["linear_attention", "full_attention"]),
}


@pytest.mark.parametrize("defer", [0, 3])
@pytest.mark.parametrize("make", MIXED.values(), ids=MIXED)
def test_layers_that_are_no_full_attention_compile_with_the_others(make, defer):
    """One graph, for a second prompt of another length too; a further turn goes on from what the steps left."""
    model, graphs = make(), Graphs()
    options, method = graphs.compiling(), kvweave.SnapKV(budget=0.3, window=4, defer=defer)
    with kvweave.attach(model):
        for lengths in ((30,), (21,)):
            inputs, answers, held = text_inputs(lengths), [], []
            for how in ({}, options):
                cache = kvweave.CompressedCache(model.config, method)
                first = model.generate(**inputs, **TWELVE, **how, past_key_values=cache)
                held.append([getattr(layer, "keys", None) for layer in cache.layers])
                more = torch.cat([first, words(1, 9, seed=3)], 1)
                answers.append(model.generate(input_ids=more, **TWELVE, past_key_values=cache))
            assert torch.equal(*answers)
            for mine, theirs in zip(*held, strict=True):
                assert (mine is None) == (theirs is None)
                if mine is not None:
                    assert_close(mine, theirs)
    assert len(graphs) == 1


@pytest.mark.parametrize("seen", [2, 5, 6, 7, 20])
def test_a_fixed_window_holds_what_a_growing_one_does(seen):
    generator = torch.Generator().manual_seed(seen)
    tokens = torch.randn(2, 1, 2, seen + 9, 4, generator=generator)
    growing, copy = DynamicSlidingWindowLayer(6), DynamicSlidingWindowLayer(6)
    for layer in (growing, copy):
        layer.update(*tokens[..., :seen, :])
    window = FixedWindow.of(copy)
    addresses = window.keys.data_ptr(), window.values.data_ptr(), window.count.data_ptr()
    for n in range(seen, seen + 9):
        new = tokens[..., n : n + 1, :]
        shown, first = growing.get_mask_sizes(1)
        assert window.get_mask_sizes(1) == (6, first)
        for mine, theirs in zip(window.update(*new), growing.update(*new), strict=True):
            assert torch.equal(mine[:, :, :shown], theirs)
    assert addresses == (window.keys.data_ptr(), window.values.data_ptr(), window.count.data_ptr())
    released = window.released()
    assert released is copy
    assert released.get_seq_length() == growing.get_seq_length()
    assert torch.equal(released.keys, growing.keys)
    assert torch.equal(released.values, growing.values)


def test_beams_are_refused_which_transformers_does_not_compile():
    model, inputs = text_model(), text_inputs((30,))
    with (
        kvweave.compress(model, kvweave.SnapKV(budget=0.3)),
        pytest.raises(ValueError, match=r"num_beams=3.*num_beams=1"),
    ):
        model.generate(**inputs, **TWELVE, num_beams=3, **Graphs().compiling())


def test_prompts_of_many_lengths_compile_twice():
    model, graphs = vision_model(), Graphs()
    options = graphs.compiling()
    with kvweave.compress(model, kvweave.SnapKV(budget=0.3, window=4)):
        for length in (40, 70, 300, 600):
            inputs = picture_inputs((length,), pictures=1)
            plain = model.generate(**inputs, **TWELVE)
            assert torch.equal(model.generate(**inputs, **TWELVE, **options), plain)
    assert len(graphs) <= 2


def test_a_conversation_goes_on_after_compiled_steps():
    model, inputs, graphs = text_model(), text_inputs((30,)), Graphs()
    answers = []
    for options in ({}, graphs.compiling()):
        cache = kvweave.CompressedCache(model.config, kvweave.SnapKV(budget=0.3, window=4))
        handle = kvweave.attach(model)
        first = model.generate(**inputs, **TWELVE, **options, past_key_values=cache)
        more = torch.cat([first, words(1, 9, seed=3)], 1)
        answers.append(model.generate(input_ids=more, **TWELVE, **options, past_key_values=cache))
        handle.detach()
    assert torch.equal(*answers)
    assert graphs


def test_steps_in_reserved_room_change_tensors_alone():
    model, inputs, follow = text_model(), text_inputs((30,)), words(1, 6, seed=7)
    with torch.no_grad(), kvweave.compress(model, kvweave.SnapKV(budget=0.3, window=4)) as session:
        logits = []
        for reserved in (False, True):
            model(**inputs)
            cache = session.cache
            if reserved:
                cache.reserve(6)
                addresses = [block.keys.data_ptr() for layer in cache.layers for block in layer.fixed]
            steps = [
                model(input_ids=follow[:, n : n + 1], past_key_values=cache, position_ids=torch.tensor([[30 + n]]))
                for n in range(6)
            ]
            logits.append(torch.cat([step.logits for step in steps], 1))
        assert [block.keys.data_ptr() for layer in cache.layers for block in layer.fixed] == addresses
    assert_close(logits[1], logits[0])
    assert cache.layers[0].seen == 36
    cache.settle()
    assert not cache.fixed
    assert cache.prompt.length == 36


def test_room_is_refused_where_there_can_be_none():
    model = text_model()
    cache = kvweave.CompressedCache(model.config, kvweave.SnapKV(budget=0.3))
    with pytest.raises(ValueError, match="nothing is cached yet"):
        cache.reserve(4)
    with pytest.raises(ValueError, match="tokens=0 is not allowed"):
        cache.reserve(0)
    with pytest.raises(ValueError, match="packs what it keeps"):
        kvweave.CompressedCache(model.config, kvweave.Quantized(kvweave.SnapKV(budget=0.3))).reserve(4)


def test_decoding_again_is_not_compiled():
    model, inputs = text_model(), text_inputs((30,))
    method = kvweave.get_method("snapkv", budget=0.3, defer=2, redecode=True)
    with kvweave.compress(model, method), pytest.raises(ValueError, match="redecode=True"):
        model.generate(**inputs, **TWELVE, **Graphs().compiling())
