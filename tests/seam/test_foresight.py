"""A budget found by what it costs: the smallest whose first tokens stay close enough to the full cache's."""

import dataclasses

import pytest
import torch
from tiny import text_inputs, text_model, words

import kvweave
from kvweave.seam import foresight

TARGET = 1.0
EVEN = kvweave.get_method("weave", form="even", defer=3, recent=2, budget=f"auto:kl={TARGET}")
STEPS = 8


def reply(model, method, inputs, **options):
    with kvweave.compress(model, method) as session:
        out = model.generate(
            **inputs, max_new_tokens=STEPS, output_logits=True, return_dict_in_generate=True, **options
        )
    return session, out.sequences, torch.stack(out.logits, 1).log_softmax(-1)


def cost(model, inputs, budget, tokens, expected, defer=3):
    """Ten times the mean KL of the first tokens, decoded again from a cache that was cut to so many entries."""
    method = dataclasses.replace(EVEN, budget=budget)
    cache = kvweave.CompressedCache(model.config, method)
    length = inputs["input_ids"].shape[1]
    with kvweave.attach(model), torch.no_grad():
        model(**inputs, past_key_values=cache)
        fed = [tokens[:, length + n : length + n + 1] for n in range(defer)]
        for token in fed:
            model(input_ids=token, past_key_values=cache)
        cache.freeze()
        cache.crop(-defer)
        mine = torch.cat([model(input_ids=token, past_key_values=cache).logits for token in fed], 1).log_softmax(-1)
    theirs = expected[:, 1 : 1 + defer]
    return 10 * (theirs.exp() * (theirs - mine)).sum(-1).mean(1)


def test_the_smallest_budget_under_the_target_is_taken_and_reported():
    model, inputs = text_model(), text_inputs((60,), images=())
    _, tokens, expected = reply(model, kvweave.Full(), inputs)
    session, mine, _ = reply(model, EVEN, inputs)
    assert torch.equal(mine[:, :63], tokens[:, :63])  # the cut comes behind three decoded tokens
    found = session.report["auto"]
    (row,) = found["rows"]
    assert found["target"] == TARGET
    assert row["kl"] <= TARGET
    assert row["share"] == row["entries"] / 60
    assert row["kl"] == pytest.approx(
        float(cost(model, inputs, row["entries"], tokens, expected)), rel=1e-3, abs=1e-5
    )
    assert (session.cache.layers[0].positions < 60).sum(-1).eq(row["entries"]).all()
    tried = sorted({max(1, int(share * 60)) for share in foresight.SHARES if share < 1})
    smaller = tried[tried.index(row["entries"]) - 1]
    assert 1 < row["entries"] < 60
    assert float(cost(model, inputs, smaller, tokens, expected)) > TARGET


def test_it_is_the_cut_to_that_budget_and_no_other():
    """Whatever was tried before has left nothing behind."""
    model, inputs = text_model(), text_inputs((60,), images=())
    session, tokens, logits = reply(model, EVEN, inputs)
    entries = session.report["auto"]["rows"][0]["entries"]
    other, same, expected = reply(model, dataclasses.replace(EVEN, budget=entries), inputs)
    assert torch.equal(tokens, same)
    assert torch.equal(logits, expected)
    for one, two in zip(session.cache.layers, other.cache.layers, strict=True):
        assert torch.equal(one.positions, two.positions)
        assert torch.equal(one.keys, two.keys)


def test_a_stricter_target_keeps_no_less():
    model, inputs = text_model(), text_inputs((60,), images=())
    kept = []
    for target in (1e-6, 0.03, 0.3, 3.0, 30.0):
        method = dataclasses.replace(EVEN, budget=f"auto:kl={target}")
        kept.append(reply(model, method, inputs)[0].report["auto"]["rows"][0]["entries"])
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1]


def test_each_row_of_a_batch_gets_the_budget_that_it_gets_alone():
    model, inputs = text_model(), text_inputs((60, 41), images=())
    rows = reply(model, EVEN, inputs)[0].report["auto"]["rows"]
    for n in range(2):
        alone = {name: x[n : n + 1, 19 * n :] for name, x in inputs.items()}
        (row,) = reply(model, EVEN, alone)[0].report["auto"]["rows"]
        assert row["entries"] == rows[n]["entries"]
        assert row["kl"] == pytest.approx(rows[n]["kl"], rel=1e-3, abs=1e-5)


def test_weave_as_it_comes_shares_what_was_found_over_all_heads():
    model, inputs = text_model(), text_inputs((60,), images=())
    with kvweave.compress(model, budget=f"auto:kl={TARGET}") as session:
        model.generate(**inputs, max_new_tokens=12)
    (row,) = session.report["auto"]["rows"]
    assert session.report["totals"]["kept"] == row["entries"] * len(session.cache.layers)
    assert row["kl"] <= TARGET


def test_a_reply_shorter_than_the_wait_is_never_cut():
    model, inputs = text_model(), text_inputs((60,), images=())
    with kvweave.compress(model, EVEN) as session:
        model.generate(**inputs, max_new_tokens=3)
    assert "auto" not in session.report
    assert session.report["totals"]["kept"] == session.report["totals"]["length"]


@pytest.mark.parametrize("name", [name for name in kvweave.list_methods() if name != "weave"])
def test_methods_without_an_estimate_are_refused(name):
    with pytest.raises(ValueError, match="has no estimate of what it costs"):
        kvweave.get_method(name, budget="auto:kl=0.05")


@pytest.mark.parametrize(
    "spelling", ["weave:merge=true,defer=2", "weave:form=even,defer=0", "quantized:method=weave"]
)
def test_forms_that_were_not_measured_are_refused(spelling):
    with pytest.raises(ValueError, match="has no estimate of what it costs"):
        kvweave.parse_method(f"{spelling},budget=auto:kl=0.05")


@pytest.mark.parametrize("text", ["auto", "auto:kl=0", "auto:kl=-1", "auto:kl=nan", "auto:kl=1e999", "auto:nats=1"])
def test_a_target_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="number of nats above 0"):
        kvweave.Weave(budget=text)


def test_where_no_reply_has_begun_nothing_is_cut_in_its_place():
    model, inputs = text_model(), words(1, 60)
    with pytest.raises(ValueError, match="hold=True or every"):
        kvweave.CompressedCache(model.config, EVEN, hold=True)
    with pytest.raises(ValueError, match="not allowed with probes"):
        kvweave.compress(model, EVEN, probes="default")
    keys = torch.randn(1, 2, 60, 8)
    with pytest.raises(ValueError, match="allowed without a model is a number"):
        kvweave.compress_tensors(EVEN, [keys], [keys], [keys], visual=torch.zeros(1, 60, dtype=torch.bool))
    cache = kvweave.CompressedCache(model.config, EVEN)
    with kvweave.attach(model), torch.no_grad():
        model(input_ids=inputs, past_key_values=cache)
        with pytest.raises(ValueError, match="first 3 tokens of a reply, and 0 have been decoded"):
            cache.freeze()
