"""A first cut straight after each layer's attention, before the one that waits for decoded tokens."""

import json
import math
from dataclasses import replace

import pytest
import torch
from test_deferred import kept, late_cut
from test_latents import mla_model
from tiny import assert_close, cut_of, decode, masked, picture_inputs, text_inputs, text_model, vision_model, words

import kvweave
from benchmarks.measure import peak_bytes
from kvweave.methods.allocation import Quota, profile_counts
from kvweave.seam.profiles import model_mark

LENT = kvweave.Weave(
    0.25, form="lent", allocation="head", defer=3, ahead=2, recent=3, sinks=0, proxies=4, temperature=1.0, coarse=1.6
)
METHODS = {
    "lent, even": LENT,
    "lent, by layer": replace(LENT, allocation="layer"),
    "mixed with the prompt's rows": replace(LENT, temperature=None),
    "merging": kvweave.Weave(0.25, form="spelled", defer=3, recent=3, proxies=4, coarse=1.6),
    "merging, heads apart": kvweave.Weave(0.25, form="spelled", allocation="layer", recent=3, proxies=4, coarse=1.6),
    "snapkv": kvweave.SnapKV(budget=0.25, window=4, defer=2, coarse=1.6),
    "adakv": kvweave.get_method("adakv", budget=0.25, window=4, defer=2, coarse=1.6),
    "pyramidkv": kvweave.get_method("pyramidkv", budget=0.25, window=4, defer=2, coarse=1.6),
    "h2o": kvweave.H2O(budget=0.25, defer=2, coarse=1.6),
    "h2o, maxima": kvweave.H2O(budget=0.25, defer=2, rows_by="max", heads_by="max", coarse=1.6),
    "peak": kvweave.get_method("peak", budget=0.25, recent=3, defer=2, coarse=1.6),
    "tova": kvweave.get_method("tova", budget=0.25, defer=2, coarse=1.6),
    "quantized": kvweave.Quantized(
        kvweave.SnapKV(budget=0.25, window=4, defer=2, coarse=1.6), bits=8, group=8, residual=64
    ),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
SHARES = [[[0.5, 0.1], [0.15, 0.25]]]  # of two layers of two heads


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """A profile of `text_model()` by which heads are far from alike."""
    path = tmp_path_factory.mktemp("profile") / "heads.json"
    data = {"fingerprint": model_mark(text_model()), "budgets": [0.25], "shares": SHARES}
    path.write_text(json.dumps(data))
    return str(path)


def by_profile(profile, allocation, **options):
    return replace(LENT, allocation=allocation, profile=profile, **options)


def first_cut(model, method, inputs, end):
    """What is held of a prompt before its cut, and columns of each head."""
    with kvweave.compress(model, method) as session:
        decode(model, inputs, 1)
    assert session.cache.waits
    return cut_of(session.cache, end), kept(session.cache, end)


def assert_reads_both(model, method, inputs, end, steps=7):
    """Decoding reads what the first cut left, and then what the second one did, as the full cache does where the rest
    is masked; returns the session."""
    coarse, held = first_cut(model, method, inputs, end)
    with kvweave.compress(model, method) as session:
        mine, logits = decode(model, inputs, steps)
    fine = late_cut(session.cache, end, end + method.defer)
    with masked(model, coarse, fine):
        same, expected = decode(model, inputs, steps)
    assert_close(logits, expected, 1e-5)
    assert torch.equal(mine, same)
    left = kept(session.cache, end)
    for layer, before in zip(left, held, strict=True):
        for row, row_before in zip(layer, before, strict=True):
            assert all(set(head) <= set(more) for head, more in zip(row, row_before, strict=True))
            assert sum(map(len, row)) < sum(map(len, row_before))
    return session


@every_method
@pytest.mark.parametrize(("lengths", "attention"), [((40,), "sdpa"), ((40, 29, 9), "eager")])
def test_decoding_reads_what_the_first_cut_left_and_then_what_the_second_did(method, lengths, attention):
    model, inputs = text_model(attention=attention), text_inputs(lengths)
    plain = decode(model, inputs, 7)[1]
    session = assert_reads_both(model, method, inputs, 40)
    with kvweave.compress(model, method):
        logits = decode(model, inputs, 2)[1]
    assert torch.equal(logits[:, 0], plain[:, 0])
    assert (logits - plain[:, :2])[:, 1].abs().max() > 1e-3
    totals = session.report["totals"]
    assert session.report["deferred"] == method.defer
    for row, length in enumerate(lengths):
        assert sum(len(head) for layer in kept(session.cache, 40) for head in layer[row]) == 4 * int(0.25 * length)
    assert totals["kept"] + totals["merged"] + totals["evicted"] == totals["length"]


@pytest.mark.parametrize("mix", [0.0, 0.5])
@pytest.mark.parametrize("lengths", [(40,), (40, 29)])
def test_heads_hold_twice_their_share_of_a_profile(profile, mix, lengths):
    model, inputs = text_model(), text_inputs(lengths)
    method = by_profile(profile, "profile", mix=mix, coarse=2.0)
    session = assert_reads_both(model, method, inputs, 40)
    _, held = first_cut(model, method, inputs, 40)
    for row, length in enumerate(lengths):
        counts = [[len(head) for head in layer[row]] for layer in held]
        shares = profile_counts(profile, 2, Quota(int(0.25 * length), recent=3), length)
        assert counts == [[min(length, 2 * share) for share in layer] for layer in shares]
        left = sum(len(head) for layer in kept(session.cache, 40) for head in layer[row])
        assert left == 4 * int(0.25 * length)


@pytest.mark.parametrize("budget", [0.05, 3, 0.2, 0.25])
def test_of_a_small_budget_heads_hold_what_a_fifth_of_the_prompt_would_leave_them(budget):
    model, inputs = text_model(), text_inputs((40, 29))
    _, held = first_cut(model, replace(LENT, budget=budget, coarse=1.5), inputs, 40)
    for row, length in enumerate((40, 29)):
        own = int(max(budget, 0.2) * length) if budget != 3 else int(0.2 * length)
        assert {len(head) for layer in held for head in layer[row]} == {math.ceil(1.5 * own)}


@pytest.mark.parametrize("allocation", ["profile", "global"])
def test_heads_that_want_more_than_they_hold_leave_it_to_others(profile, allocation):
    """All entries are given out, though most of what a head would have is gone."""
    method = by_profile(profile, allocation, coarse=1.0, floor=0.0)
    with kvweave.compress(text_model(), method) as session:
        decode(session.model, text_inputs((40,)), 6)
    assert session.report["totals"]["kept"] == 20


def test_heads_that_compete_hold_the_whole_prompt_where_there_is_no_profile():
    with kvweave.compress(text_model(), replace(LENT, allocation="global")) as session:
        decode(session.model, text_inputs((40,)), 6)
    assert session.report["coarse"] == {"whole": "allocation=global, and no profile of the model"}
    assert session.report["totals"]["peak_bytes"] == 2 * 2 * 2 * 43 * 8 * 4


def test_a_shipped_profile_serves_the_first_cut_at_every_budget(profile, monkeypatch):
    monkeypatch.setattr("kvweave.seam.profiles.shipped_for", lambda model: profile)
    for method, allocation in (
        ("weave:coarse=2,budget=0.25", "profile"),
        ("weave:coarse=2,budget=0.1", "profile"),
        ("weave:form=lent,coarse=2,budget=0.1", "global"),
        ("snapkv:defer=2,allocation=global,coarse=2,budget=0.1", "global"),
    ):
        with kvweave.compress(text_model(), method) as session:
            decode(session.model, text_inputs((60,)), 2)
        works = kvweave.parse_method(session.report["works_as"])
        assert (works.allocation, works.profile, works.coarse) == (allocation, profile, 2.0)
        assert session.report["coarse"]["bytes"] < session.report["totals"]["bytes_before"]


@pytest.mark.parametrize("name", ["lent, even", "snapkv", "h2o"])
def test_the_first_cut_is_that_of_the_prompts_own_rows(name):
    method, model, inputs = METHODS[name], text_model(), text_inputs((40,))
    _, held = first_cut(model, method, inputs, 40)
    softened = {"temperature": None, "replay": False} if isinstance(method, kvweave.Weave) else {}
    alone = replace(method, budget=0.4, coarse=0, defer=0, **softened)
    with kvweave.compress(model, alone) as session:
        decode(model, inputs, 1)
    assert held == kept(session.cache, 40)


@every_method
def test_a_first_cut_that_keeps_everything_changes_nothing(method):
    coarse, inside = {"coarse": 1e6}, getattr(method, "method", None)
    all_of_it = replace(method, method=replace(inside, **coarse)) if inside else replace(method, **coarse)
    none = replace(method, method=replace(inside, coarse=0)) if inside else replace(method, coarse=0)
    done = []
    for one in (all_of_it, none):
        with kvweave.compress(text_model(), one) as session:
            done.append((*decode(session.model, text_inputs((40, 29)), 6), kept(session.cache, 40)))
    assert torch.equal(done[0][1], done[1][1])
    assert done[0][2] == done[1][2]


def test_the_peak_is_one_whole_layer_beside_what_is_held():
    with kvweave.compress(text_model(), LENT) as session:
        decode(session.model, text_inputs((200,)), 6)
    entry = 2 * 2 * 8 * 4  # keys and values of two heads
    totals = session.report["totals"]
    assert session.report["coarse"] == {"bytes": 2 * 80 * entry}
    assert totals["bytes_before"] == 2 * 200 * entry
    assert totals["peak_bytes"] == (80 + 200) * entry
    assert totals["bytes"] == 2 * 50 * entry
    with kvweave.compress(text_model(), LENT) as session:
        decode(session.model, text_inputs((200,)), 2)  # no cut comes
    assert session.report["deferred"] is None
    assert session.report["totals"]["kept"] == 2 * 80
    assert session.report["totals"]["peak_bytes"] == (80 + 200) * entry


def test_the_allocator_is_asked_for_as_much_less_as_the_report_says(tmp_path):
    """Over the whole of a generation, heads apart while they decode included."""
    config = {"num_hidden_layers": 12, "head_dim": 64, "num_key_value_heads": 4, "num_attention_heads": 4}
    model, ids = text_model(**config), words(1, 1000)
    path = tmp_path / "heads.json"
    data = {"fingerprint": model_mark(model), "budgets": [0.2], "shares": [[[0.3, 0.1, 0.05, 0.35]] * 12]}
    path.write_text(json.dumps(data))

    def run():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12)

    needed, reported = {}, {}
    for allocation in ("profile", "global"):
        for coarse in (0, 2):
            method = f"weave:form=lent,allocation={allocation},coarse={coarse},budget=0.2"
            shares = f",profile={path}" if coarse or allocation == "profile" else ""
            with kvweave.compress(model, method + shares) as session:
                needed[coarse] = peak_bytes(run)
            reported[coarse] = session.report["totals"]["peak_bytes"]
        assert reported[2] < reported[0] / 2
        assert needed[0] - needed[2] > 0.9 * (reported[0] - reported[2])


@every_method
@pytest.mark.parametrize("chunk", [7, 39])
def test_chunked_prefill_equals_one_piece(method, chunk):
    model, inputs = text_model("llava"), text_inputs((40, 29))
    with kvweave.compress(model, method) as session:
        _, logits = decode(model, inputs, 6)
        whole = kept(session.cache, 40)
        _, mine = decode(model, inputs, 6, prefill_chunk_size=chunk)
    assert kept(session.cache, 40) == whole
    assert_close(mine, logits)


@every_method
def test_a_row_of_a_batch_is_cut_as_it_is_alone(method):
    model = text_model()
    with kvweave.compress(model, method) as session:
        decode(model, text_inputs((40, 29)), 6)
        together = kept(session.cache, 40)
        decode(model, {name: x[:1] for name, x in text_inputs((40, 29)).items()}, 6)
        alone = kept(session.cache, 40)
    assert [layer[0] for layer in together] == [layer[0] for layer in alone]


@every_method
def test_drafts_are_taken_back(method):
    model, inputs = text_model(), text_inputs((40, 29))
    coarse, _ = first_cut(model, method, inputs, 40)
    with kvweave.compress(model, replace(method, redecode=True)) as session:
        mine, logits = decode(model, inputs, 6)
    with masked(model, late_cut(session.cache, 40, 40)):
        same, expected = decode(model, inputs, 6)
    assert_close(logits, expected, 1e-5)
    assert torch.equal(mine, same)
    assert coarse.start == 40


@every_method
def test_rejected_candidates_do_not_count(method):
    model, ids = text_model(), words(1, 13, seed=4).repeat(1, 3)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    method = replace(method, defer=4)
    with kvweave.compress(model, method) as session:
        decode(model, inputs, 6)
        plain = kept(session.cache, 39)
        for number in (2, 5):
            model.generate(**inputs, max_new_tokens=12, prompt_lookup_num_tokens=number)
            assert kept(session.cache, 39) == plain


def test_reordered_rows_are_cut_as_they_would_have_been():
    model, inputs = text_model(), text_inputs((40, 29))
    for method in (METHODS["lent, by layer"], METHODS["h2o"]):
        with kvweave.compress(model, method, trace=True) as session:
            decode(model, inputs, 6)
            straight, fates = kept(session.cache, 40), [layer.fate for layer in session.cache.layers]
            tokens = decode(model, inputs, method.defer)[0]
            cache = session.cache
            assert cache.waits
            cache.reorder_cache(torch.tensor([1, 0]))
            mask = torch.cat([inputs["attention_mask"].flip(0), torch.ones(2, method.defer, dtype=torch.long)], 1)
            with torch.no_grad():
                position = mask.sum(1, keepdim=True) - 1
                step = {"attention_mask": mask, "position_ids": position, "past_key_values": cache}
                model(input_ids=tokens[:, -1:].flip(0), **step)
        assert not cache.waits
        assert kept(cache, 40) == [layer[::-1] for layer in straight]
        for layer, (first, second) in zip(cache.layers, fates, strict=True):
            assert torch.equal(layer.fate[0], second)
            assert torch.equal(layer.fate[1], first)


@every_method
def test_fates_are_of_the_whole_prompt(method):
    with kvweave.compress(text_model(), method, trace=True) as session:
        decode(session.model, text_inputs((40, 29)), 6)
    for layer, columns in zip(session.cache.layers, kept(session.cache, 40), strict=True):
        for row, (fate, length) in enumerate(zip(layer.fate, (40, 29), strict=True)):
            assert fate.shape == (2, length)
            padding = 40 - length
            for head in range(2):
                lives = [slot for slot, goal in enumerate(fate[head].tolist()) if goal == slot]
                assert [slot + padding for slot in lives] == columns[row][head]
                assert set(fate[head].tolist()) <= {-1, *lives}


def test_turns_follow_each_other():
    model = text_model("llava")
    handle = kvweave.attach(model)
    for method in (LENT, METHODS["merging"], METHODS["adakv"]):
        cache = kvweave.CompressedCache(model.config, method)
        with torch.no_grad():
            for n in range(3):
                model(input_ids=words(1, 40, seed=n), past_key_values=cache)
                assert cache.waits
                for step in range(method.defer + 1):
                    model(input_ids=words(1, 1, seed=50 + step), past_key_values=cache)
                assert not cache.waits
                length = 40 * (n + 1) + n * (method.defer + 1)
                assert cache.report["layers"][0]["length"] == length
                assert cache.report["layers"][0]["kept"] == length // 4
            model(input_ids=words(1, 40, seed=9), past_key_values=cache)
            model(input_ids=words(1, 40, seed=10), past_key_values=cache)  # a turn that comes before the cut
            assert cache.waits
    handle.detach()


def test_pictures_and_positions_of_many_axes():
    model, inputs = vision_model(), picture_inputs((40, 33))
    end = inputs["input_ids"].shape[1]
    assert_reads_both(model, replace(LENT, budget=0.4), inputs, end)


def test_latents_that_heads_share():
    model = mla_model()
    with kvweave.compress(model, LENT, trace=True) as session:
        decode(model, text_inputs((40, 29)), 2)
        held = session.report["layers"][0]["kept"]
        decode(model, text_inputs((40, 29)), 6)
    assert (held, session.report["layers"][0]["kept"]) == (14, 8)
    assert [fate.shape for fate in session.cache.layers[0].fate] == [(1, 40), (1, 29)]


@pytest.mark.parametrize("method", [METHODS["lent, by layer"], METHODS["merging"]], ids=["lent", "merging"])
def test_a_saved_cache_goes_on(method, tmp_path):
    model, done = text_model("llava"), []
    handle = kvweave.attach(model)
    for again in (False, True):
        cache = kvweave.CompressedCache(model.config, method, trace=True)
        with torch.no_grad():
            model(input_ids=words(1, 40), past_key_values=cache)
            model(input_ids=words(1, 1, seed=1), past_key_values=cache)
            assert cache.waits
            if again:
                cache.save(tmp_path / "cache", model)
                cache = kvweave.CompressedCache.load(tmp_path / "cache", model)
            logits = [model(input_ids=words(1, 1, seed=n), past_key_values=cache).logits for n in range(2, 7)]
        done.append((torch.cat(logits, 1), cache.report, cache.layers[0].fate[0]))
    handle.detach()
    assert torch.equal(done[0][0], done[1][0])
    assert done[0][1] == done[1][1]
    assert torch.equal(done[0][2], done[1][2])


def test_the_cut_that_was_not_made_is_made_on_request(tmp_path):
    model = text_model("llava")
    with torch.no_grad(), kvweave.compress(model, LENT) as session:
        model(input_ids=words(1, 40))
        with pytest.raises(ValueError, match="waits"):
            session.cache.export(tmp_path / "file")
        session.cache.freeze()
        assert session.report["totals"]["kept"] == 20
        assert session.cache.export(tmp_path / "file")["slots"] == 10


def test_probes_are_answered_from_the_whole_prompt():
    with kvweave.compress(text_model("llava"), LENT, probes=[[7, 8, 9]], probe_tokens=2) as session:
        session.model.generate(words(1, 40), max_new_tokens=3)
    assert session.report["coarse"] == {"whole": "the cut waits for probes, or is asked for"}
    assert session.report["totals"]["kept"] == 20


def test_a_budget_that_is_found_is_found_from_the_whole_prompt():
    with kvweave.compress(text_model("llava"), "weave:coarse=2,budget=auto:kl=0.5") as session:
        session.model.generate(words(1, 40), max_new_tokens=10)
    assert session.report["coarse"] == {"whole": "the budget is found by what it costs"}
    assert session.report["auto"]["rows"]


def test_a_first_cut_leaves_the_form_of_weave_to_the_model():
    for spelled in ("budget=0.2", "form=lent", "form=even", "proxies=4"):
        assert kvweave.parse_method(f"weave:{spelled}").coarse == 0
    for spelled in ("budget=0.2", "coarse=0", "coarse=3", "form=lent,coarse=2", "form=even,coarse=2"):
        method = kvweave.parse_method(f"weave:{spelled}")
        again = kvweave.parse_method(method.spelling())
        assert (again, again.form, again.coarse) == (method, method.form, method.coarse)
    assert kvweave.Weave(0.2, coarse=2).form == kvweave.Weave(0.2).form == "auto"


def test_what_went_is_not_read_again():
    """Frozen before any reply, weave reads the prompt again, but not where a part of it is gone."""
    model = text_model("llava")
    with torch.no_grad(), kvweave.compress(model, LENT) as session:
        model(input_ids=words(1, 40))
        session.cache.freeze()
    assert "probes" not in session.report
    assert session.report["totals"]["kept"] == 20


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: kvweave.SnapKV(budget=0.2, coarse=2), "coarse=2 is not allowed with defer=0"),
        (lambda: kvweave.SnapKV(budget=0.2, defer=2, coarse=0.5), "coarse=0.5 is not allowed at all: allowed is 0"),
        (lambda: kvweave.get_method("keydiff", defer=2, coarse=2), "coarse=2 is not allowed for keydiff"),
        (lambda: kvweave.get_method("kvzip", defer=2, coarse=2), "coarse=2 is not allowed for kvzip"),
        (
            lambda: kvweave.parse_method("regress:method=snapkv,defer=2,coarse=2"),
            "coarse is not allowed inside regress",
        ),
        (
            lambda: kvweave.compress_tensors(LENT, [], [], [], visual=torch.zeros(1, 1)),
            "allowed without a model is coarse=0",
        ),
        (lambda: kvweave.CompressedCache(text_model().config, LENT, every=8), "not allowed with every=8"),
        (lambda: replace(LENT, profile="smol"), "is not allowed with allocation='head'"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(build, why):
    with pytest.raises(ValueError, match=why):
        build()
