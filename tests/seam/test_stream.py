"""Caches that stay within their budget over endless input (`every=n`), on models (METHODS_NEW.md 18)."""

import copy
import warnings

import pytest
import torch
from methods_for_tests import Heavier
from tiny import assert_close, cut_of, decode, masked, picture_inputs, text_inputs, text_model, vision_model, words

import kvweave
from kvweave.memory import tables
from kvweave.methods.weave import FORMS

BUDGET, EVERY = 16, 6
EVICTION = {
    "streaming_llm": kvweave.StreamingLLM(budget=BUDGET),
    "snapkv": kvweave.SnapKV(budget=BUDGET, window=4),
    "h2o": kvweave.H2O(budget=BUDGET),
    "tova": kvweave.Tova(budget=BUDGET),
    "adakv": kvweave.get_method("adakv", budget=BUDGET, window=4),
    "kvzip": kvweave.KVzip(budget=BUDGET),
    "layer-adaptive": Heavier(budget=BUDGET),
    "infinipot": kvweave.InfiniPot(budget=BUDGET),
}
MERGING = {
    "weave": kvweave.Weave(budget=BUDGET, proxies=4, recent=4),
    "flowmm": kvweave.FlowMM(budget=BUDGET, proxies=4, rope_aware=True, mass_bias=True),
    "d2o": kvweave.get_method("d2o", budget=BUDGET, mass_bias=True),
}


def stream(method, *, attention="sdpa", **bounds):
    model = text_model(attention=attention)
    return model, kvweave.CompressedCache(model.config, method, **({"every": EVERY} | bounds))


def passes(sizes, lengths=(60,), seed=0):
    """Inputs in passes of these sizes, left-padded rows: ids, mask of all so far, position ids."""
    inputs = text_inputs(lengths, seed=seed)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    start = 0
    for size in sizes:
        stop = start + size
        yield {
            "input_ids": ids[:, start:stop],
            "attention_mask": mask[:, :stop],
            "position_ids": places[:, start:stop],
        }
        start = stop


@torch.no_grad()
def read(model, cache, given, *, cuts=None, **cut):
    """Logits of all passes; after each, `cuts` gets what is left."""
    logits = []
    for step in given:
        logits.append(model(**step, past_key_values=cache).logits)
        if cuts is not None:
            cuts.append(cut_of(cache, step["attention_mask"].shape[1], **cut))
    return torch.cat(logits, 1)


def check_masked(model, cache, given, **cut):
    given, cuts = list(given), []
    with kvweave.attach(model):
        mine = read(model, cache, given, cuts=cuts, **cut)
    with masked(model, *cuts):
        expected = read(model, None if cache is None else transformers_cache(model), given)
    real = given[-1]["attention_mask"][:, -mine.shape[1] :].bool()
    assert_close(mine[real], expected[real])
    return mine


def transformers_cache(model):
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


SIZES = [20, 7, 7, 6, *[1] * 14, 6]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [(60,), (60, 43, 25)], ids=["one", "batch"])
@pytest.mark.parametrize("method", EVICTION.values(), ids=EVICTION)
def test_a_stream_is_the_full_cache_with_all_but_the_held_columns_masked(method, lengths, attention):
    """Positions and phases are those of the whole input, in passes of many tokens and of one."""
    model, cache = stream(method, attention=attention)
    check_masked(model, cache, passes(SIZES, lengths))
    assert cache.report["cuts"] >= 5
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("lengths", [(60,), (60, 43)], ids=["one", "batch"])
@pytest.mark.parametrize("method", MERGING.values(), ids=MERGING)
def test_a_stream_that_merges_is_that_with_the_merged_contents(method, lengths):
    model, cache = stream(method)
    check_masked(model, cache, passes(SIZES, lengths), merged=True, mass_bias=True)
    assert cache.layers[0].mass.max() > 3


@pytest.mark.parametrize("sizes", [[60], [9] * 4, [1] * 40])
def test_what_fits_is_untouched_to_the_bit(sizes):
    model, cache = stream(kvweave.SnapKV(budget=100, window=4))
    given = list(passes(sizes))
    with kvweave.attach(model):
        mine = read(model, cache, given)
    assert torch.equal(mine, read(model, transformers_cache(model), given))
    assert cache.report["cuts"] == 0


# -------------------------------------------------------------------- all methods


def every_method():
    """Each with small windows, where it has some."""
    small = {"window": 4, "proxies": 4, "recent": 3, "rows": 4}
    for name in kvweave.list_methods():
        known = [option for option, _ in type(kvweave.get_method(name)).options()]
        yield name, kvweave.get_method(name, budget=BUDGET, **{k: v for k, v in small.items() if k in known})
    for spelled in (
        "critical:method=h2o",
        "fold:method=snapkv,window=4",
        "residual:method=h2o,rows=4",
        "regress:method=flowmm,proxies=4,rows=4",
        "quantized:method=h2o,bits=8,group=4,residual=4",
    ):
        yield spelled, kvweave.parse_method(f"{spelled},budget={BUDGET}")


METHODS = dict(every_method())
bounding = pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])


@bounding
def test_every_method_stays_within_its_budget_and_keeps_account_of_all_it_saw(name):
    model, cache = stream(METHODS[name])
    given = list(passes([20, *[5] * 4, *[1] * 18], (60,)))
    with kvweave.attach(model), torch.no_grad():
        for step in given:
            model(**step, past_key_values=cache)
            report = cache.report
            for layer in report["layers"]:
                assert layer["length"] == layer["seen"] == cache.get_seq_length()
                assert layer["kept"] + layer["merged"] + layer["evicted"] == layer["seen"]
            seen = cache.get_seq_length()
            assert report["totals"]["kept"] <= 2 * min(BUDGET + EVERY - 1, seen)
            assert all((head[:4] == torch.arange(4)).all() for layer in cache.layers for head in first(layer))
    assert report["peak_entries"] <= BUDGET + 20
    assert report["cuts"] >= 4


def first(layer):
    """Positions of each head's first slots that hold something."""
    return [head[head >= 0][:4] for row in layer.positions for head in row]


@bounding
def test_a_first_cut_at_the_prompts_end_is_a_prompts_cut(name):
    """Without sinks of the stream's own; kvzip asks no replay, and nothing is deferred."""
    method = METHODS[name]
    plain = {"replay": False} if name == "kvzip" else {}
    plain |= {"defer": 0} if method.defer else {}
    model, given = text_model("llava"), text_inputs((40, 27))
    with torch.no_grad():
        with kvweave.compress(model, method, every=100, stream_sinks=0) as bounded:
            model(**given)
        with kvweave.compress(model, kvweave.method_from_dict(method.to_dict() | plain)) as once:
            model(**given)
    for mine, theirs in zip(bounded.cache.layers, once.cache.layers, strict=True):
        for what in ("positions", "keys", "values", "mass", "bias"):
            ours, other = getattr(mine, what), getattr(theirs, what)
            assert (ours is None and other is None) or torch.equal(ours, other), what


def test_full_keeps_everything_and_is_the_fold_over_chunks():
    """KV-Fold (2605.12471): a left fold over chunks, one forward pass each, in a cache that keeps everything."""
    model, cache = stream(kvweave.Full())
    given = list(passes([20] * 3))
    with kvweave.attach(model):
        mine = read(model, cache, given)
    assert torch.equal(mine, read(model, transformers_cache(model), given))
    assert cache.report["held"] == 60


# -------------------------------------------------------------------- invariants of section 18


def test_streaming_llm_holds_after_a_cut_what_does_not_depend_on_every():
    left = []
    for every in (1, 2, 3, 6):
        model, cache = stream(kvweave.StreamingLLM(budget=10), every=every)
        with kvweave.attach(model):
            read(model, cache, passes([1] * 36))
        left.append(cache.layers[1].positions)
    assert all(torch.equal(other, left[0]) for other in left)
    assert left[0][0, 0].tolist() == [0, 1, 2, 3, *range(30, 36)]


def test_knorm_gives_the_set_of_one_cut_whatever_the_passes():
    model, once = stream(kvweave.Knorm(budget=10), every=100, stream_sinks=0)
    other, often = stream(kvweave.Knorm(budget=10), every=3, stream_sinks=0)
    with kvweave.attach(model):
        read(model, once, passes([60]))
    with kvweave.attach(other):  # the first layer's keys do not depend on what was cut
        read(other, often, passes([1] * 60))
    assert torch.equal(once.layers[0].positions, often.layers[0].positions)


@pytest.mark.parametrize("chunk", [3, 6, 10, 25])
def test_a_prefill_in_chunks_never_holds_the_whole_prompt(chunk, monkeypatch):
    """Slots of a layer when attention has read them, which is when it holds most."""
    model, inputs, slots = text_model(), text_inputs((200,)), []
    after = kvweave.CompressedLayer.after_attention

    def counting(layer, *args):
        slots.append(layer.positions.shape[-1])
        return after(layer, *args)

    monkeypatch.setattr(kvweave.CompressedLayer, "after_attention", counting)
    with kvweave.compress(model, EVICTION["snapkv"], every=EVERY) as session:
        decode(model, inputs, 20, prefill_chunk_size=chunk)
    assert max(slots) <= BUDGET + EVERY - 1 + chunk
    assert session.report["peak_entries"] == max(slots)
    assert (
        session.report["totals"]["peak_bytes"] == 2 * max(slots) * 2 * 2 * 8 * 4
    )  # layers, keys and values, heads, dim


def test_a_row_of_a_batch_gives_what_it_gives_alone():
    model = text_model()
    batch = text_inputs((40, 27))
    alone = {name: x[1:, 13:] for name, x in batch.items()}
    with kvweave.compress(model, EVICTION["snapkv"], every=EVERY) as together:
        mine, logits = decode(model, batch, 30)
    with kvweave.compress(model, EVICTION["snapkv"], every=EVERY) as single:
        own, expected = decode(model, alone, 30)
    assert torch.equal(mine[1:], own)
    assert_close(logits[1:], expected)
    for layer, other in zip(together.cache.layers, single.cache.layers, strict=True):
        assert torch.equal(layer.positions[1:] - 13, other.positions)


def test_pictures_and_positions_of_many_axes():
    model, inputs = vision_model(), picture_inputs((40, 31), pictures=3)
    for method in (EVICTION["infinipot"], EVICTION["snapkv"], MERGING["flowmm"]):
        with kvweave.compress(model, method, every=EVERY) as session:
            decode(model, inputs, 30)
        report = session.report
        assert report["cuts"] >= 5
        assert report["held"] <= BUDGET + EVERY - 1


def test_beams_are_rows_like_others():
    model = text_model()
    with kvweave.compress(model, EVICTION["snapkv"], every=EVERY) as session:
        out = model.generate(**text_inputs((40, 27)), max_new_tokens=30, num_beams=3)
    assert out.shape == (2, 70)
    assert session.report["held"] <= BUDGET + EVERY - 1


def test_a_share_is_of_the_total_that_the_cache_is_told():
    model, cache = stream(kvweave.SnapKV(budget=0.25, window=4), total=64)
    with kvweave.attach(model):
        read(model, cache, passes(SIZES))
    assert cache.shared.stream.budget == 16
    assert cache.report["held"] <= 16 + EVERY


def test_bytes_are_bytes_of_the_whole_batch_and_do_not_change():
    entry = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dim, float32
    model, cache = stream(kvweave.SnapKV(budget=f"{16 * 2 * entry}B", window=4))
    with kvweave.attach(model):
        read(model, cache, passes(SIZES, (60, 43)))
    assert cache.shared.stream.budget == 16


# -------------------------------------------------------------------- rotary tables


@pytest.mark.parametrize("name", ["expected_attention", "leverage", "flowmm"])
def test_rotary_tables_are_those_of_what_is_held(name, monkeypatch):
    """Pruned at every cut, they give what tables of all columns give."""
    method = MERGING["flowmm"] if name == "flowmm" else kvweave.get_method(name, budget=BUDGET)
    left = []
    for few in (10**6, 0):
        monkeypatch.setattr(tables, "_FEW", few)
        model, cache = stream(method)
        with kvweave.attach(model):
            left.append(read(model, cache, passes([20, *[5] * 4, *[1] * 20], (60, 43))))
    assert torch.equal(*left)
    held = sum(map(len, cache.shared.stream.tables.columns))
    assert held <= 2 * 2 * 2 * (BUDGET + EVERY)  # layers, heads, rows: each may hold others
    assert held < 60


# -------------------------------------------------------------------- probes


class Template:
    """A tokenizer whose template ends a turn with three tokens."""

    chat_template = "yes"

    def apply_chat_template(self, turn, **options):
        return f"<{turn[0]['content']}>abc"

    def __call__(self, text, **options):
        return {"input_ids": [20 + ord(letter) % 50 for letter in text]}


def test_streammem_asks_the_template_before_each_cut_and_forgets_it():
    method = kvweave.parse_method("fold:method=snapkv,window=4,budget=16")
    model, given = text_model(), list(passes(SIZES, (60, 43)))
    with kvweave.compress(model, method, every=EVERY, probes="template", processor=Template()) as session:
        cache = kvweave.CompressedCache(model.config, method, every=EVERY)
        asked = read(model, cache, given)
    assert cache.get_seq_length() == cache.prompt.length == 60
    assert cache.report["held"] <= BUDGET + EVERY - 1
    with kvweave.compress(model, method, every=EVERY):
        other = kvweave.CompressedCache(model.config, method, every=EVERY)
        unasked = read(model, other, given)
    assert torch.equal(asked[:, :20], unasked[:, :20])  # until the first cut
    assert not torch.equal(cache.layers[0].positions, other.layers[0].positions)
    assert session.cache is cache


def test_a_template_at_the_prompts_end_is_that_of_a_prompts_cut():
    method = kvweave.parse_method("fold:method=snapkv,window=4,budget=16")
    model, given, done = text_model(), text_inputs((40, 27)), []
    for bounds in ({"every": 100, "stream_sinks": 0}, {}):
        with (
            torch.no_grad(),
            kvweave.compress(model, method, probes="template", processor=Template(), **bounds) as one,
        ):
            model(**given)
        done.append(one.cache.layers)
    for mine, theirs in zip(*done, strict=True):
        assert torch.equal(mine.positions, theirs.positions)
        torch.testing.assert_close(mine.values, theirs.values)
        torch.testing.assert_close(mine.bias, theirs.bias)


# -------------------------------------------------------------------- columns, files, copies


def halves(sizes=SIZES, lengths=(60, 43), at=12):
    given = list(passes(sizes, lengths))
    return given[:at], given[at:]


@pytest.mark.parametrize("way", ["deepcopy", "file"])
@pytest.mark.parametrize("name", ["snapkv", "kvzip", "flowmm"])
def test_a_stream_that_comes_back_goes_on_as_it_would_have(name, way, tmp_path):
    method = (EVICTION | MERGING)[name]
    (model, cache), (before, after) = stream(method), halves()
    with kvweave.attach(model):
        read(model, cache, before)
    if way == "file":
        cache.save(tmp_path / "stream.safetensors", model)
        back = kvweave.CompressedCache.load(tmp_path / "stream.safetensors", model)
        assert back.shared.stream.every == EVERY
    else:
        back = copy.deepcopy(cache)
    with kvweave.attach(model):
        assert torch.equal(read(model, cache, after), read(model, back, after))
    assert back.report == cache.report


def test_a_tail_is_cropped_and_comes_again():
    """What came after the last cut can be taken back; a stream then goes on as if it had not come."""
    method = kvweave.H2O(budget=BUDGET)
    model, cache = stream(method)
    other = kvweave.CompressedCache(model.config, method, every=EVERY)
    given = list(passes([20, *[1] * 25]))
    with kvweave.attach(model):
        read(model, cache, given[:4])  # three tokens since the cut
        cache.crop(-2)
        mine = read(model, cache, given[2:])
        expected = read(model, other, given)[:, 21:]
    assert_close(mine[:, 1:], expected[:, 1:])
    assert cache.report["cuts"] == other.report["cuts"]


def test_a_stream_is_cropped_into_its_memory_reset_and_frozen():
    model, cache = stream(EVICTION["snapkv"])
    given = list(passes(SIZES))
    with kvweave.attach(model):
        read(model, cache, given[:5])
        cache.crop(-9)
        assert cache.layers[0].positions.max() < cache.get_seq_length() == 32
        read(model, cache, list(passes([32, *[1] * 20]))[1:])
        assert cache.report["held"] <= BUDGET + EVERY - 1
        cache.reset()
        again = read(model, cache, given)
        fresh = kvweave.CompressedCache(model.config, EVICTION["snapkv"], every=EVERY)
        assert torch.equal(again, read(model, fresh, given))
        held = cache.report["held"]
        cache.freeze()
        read(model, cache, [{"input_ids": words(1, 30), "attention_mask": torch.ones(1, 90), "position_ids": None}])
    assert cache.report["held"] == held + 30


def test_a_question_is_asked_behind_a_stream_and_forgotten():
    """Nothing is cut for it. Its own tokens are not enough for `question(ids)`: a stream keeps no list of all ids."""
    (model, cache), (before, after) = stream(MERGING["flowmm"]), halves()
    other = kvweave.CompressedCache(model.config, MERGING["flowmm"], every=EVERY)
    with kvweave.attach(model):
        for one in (cache, other):
            read(model, one, before)
        with cache.question():
            mask = torch.cat([before[-1]["attention_mask"], torch.ones(2, 20, dtype=torch.long)], 1)
            read(model, cache, [{"input_ids": words(2, 20), "attention_mask": mask, "position_ids": None}])
            assert cache.get_seq_length() == other.get_seq_length() + 20
        with pytest.raises(ValueError, match="tokens before the question are not known"), cache.question(words(2, 3)):
            pass
        assert torch.equal(read(model, cache, after), read(model, other, after))
    assert cache.report == other.report


def test_a_stream_is_not_exported(tmp_path):
    model, cache = stream(EVICTION["snapkv"])
    with kvweave.attach(model):
        read(model, cache, passes(SIZES))
    with pytest.raises(ValueError, match="export is not allowed with every=6"):
        cache.export(tmp_path / "stream", model)


def test_positions_past_what_the_model_was_trained_on_are_warned_of_once():
    model = text_model(max_position_embeddings=30)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with kvweave.compress(model, EVICTION["snapkv"], every=EVERY):
            decode(model, text_inputs((24,)), 20)
    assert len([w for w in said if "max_position_embeddings=30" in str(w.message)]) == 1


# -------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("method", "bounds", "said"),
    [
        (kvweave.SnapKV(budget=16), {"every": 0}, "every=0 is not allowed: allowed is an int >= 1"),
        (kvweave.SnapKV(budget=16), {"every": True}, "every=True is not allowed"),
        (kvweave.SnapKV(budget=16), {"every": 2.0}, "every=2.0 is not allowed"),
        (kvweave.SnapKV(budget=16), {"every": "8"}, "every='8' is not allowed"),
        (kvweave.SnapKV(budget=0.2), {"every": 8}, "budget=0.2 is not allowed with every=8: a share of an endless"),
        (kvweave.SnapKV(budget=0.2), {"every": 8, "total": 0}, "total=0 is not allowed"),
        (kvweave.SnapKV(budget=16), {"total": 100}, "total=100 is not allowed without every"),
        (kvweave.SnapKV(budget=16), {"stream_sinks": 2}, "stream_sinks=2 is not allowed without every"),
        (kvweave.SnapKV(budget=16), {"every": 8, "stream_sinks": -1}, "stream_sinks=-1 is not allowed"),
        (kvweave.SnapKV(budget=16), {"every": 8, "stream_sinks": None}, "stream_sinks=None is not allowed"),
        (kvweave.SnapKV(budget=16, defer=2), {"every": 8}, "defer=2 is not allowed with every=8"),
        (kvweave.Weave(budget=16, defer=4), {"every": 8}, "defer=4 is not allowed with every=8"),
        (kvweave.Weave(budget=16, redecode=True), {"every": 8}, "redecode=True is not allowed with every=8"),
        (
            kvweave.KVMerger(budget=16, variant="threshold"),
            {"every": 8},
            "variant='threshold' is not allowed with every",
        ),
        (kvweave.Regress(kvweave.KVMerger(budget=16, variant="threshold")), {"every": 8}, "variant='threshold'"),
        (
            kvweave.LookM(budget=16, text_prior="union"),
            {"every": 8},
            "text_prior='union' is not allowed with every=8",
        ),
        (kvweave.SnapKV(budget=16), {"every": 8, "trace": True}, "trace=True is not allowed with every=8"),
    ],
)
def test_settings_that_bound_nothing_are_refused_by_name(method, bounds, said):
    model = text_model()
    for make in (kvweave.CompressedCache, kvweave.compress):
        with pytest.raises(ValueError, match=said.replace("(", r"\(")):
            make(model.config if make is kvweave.CompressedCache else model, method, **bounds)


def test_a_default_defer_is_none():
    """What a model makes of `weave` lives on decoded tokens: in a stream it is that of the specification."""
    model = text_model()
    lent = kvweave.CompressedCache(model.config, kvweave.Weave(budget=16, form="lent"), every=8).method
    assert (lent.defer, lent.temperature, lent.ahead) == (0, None, FORMS["lent"]["ahead"])
    with kvweave.compress(model, kvweave.Weave(budget=16), every=8) as session:
        decode(model, text_inputs((30,)), 4)
    assert session.cache.shared.method == kvweave.Weave(budget=16, defer=0)
    assert kvweave.CompressedCache(model.config, kvweave.Weave(budget=16), every=8).method.defer == 0
    wrapped = kvweave.Quantized(kvweave.Weave(budget=16))
    assert kvweave.CompressedCache(model.config, wrapped, every=8).method.defer == 0


@pytest.mark.parametrize("probes", ["default", "replay", ["Which one?"], [[4, 5]]])
def test_probes_but_the_template_are_refused(probes):
    with pytest.raises(ValueError, match=r"probes=.* is not allowed with every=8: allowed is 'template'"):
        kvweave.compress(text_model(), EVICTION["snapkv"], every=8, probes=probes)


@pytest.mark.parametrize(
    "options", [{"prompt_lookup_num_tokens": 3}, {"compile_config": object()}, {"assistant_model": object()}]
)
def test_drafts_and_compiled_steps_are_refused(options):
    model, (name,) = text_model(), options
    said = f"{name} is not allowed with every=8"
    with kvweave.compress(model, EVICTION["snapkv"], every=8), pytest.raises(ValueError, match=said):
        model.generate(**text_inputs(), **options)
    cache = kvweave.CompressedCache(model.config, EVICTION["snapkv"], every=8)
    with kvweave.attach(model), pytest.raises(ValueError, match=said):
        model.generate(**text_inputs(), past_key_values=cache, **options)


def test_room_and_a_hold_are_refused():
    model, cache = stream(EVICTION["snapkv"])
    with pytest.raises(ValueError, match="reserve is not allowed with every=6"):
        cache.reserve(5)
    with pytest.raises(ValueError, match="hold=True is not allowed with every=6"):
        kvweave.CompressedCache(model.config, EVICTION["snapkv"], every=6, hold=True)
