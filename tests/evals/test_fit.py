"""Shares fitted to replies: what a lesson reads, what a cut costs, what gradient descent makes of it."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kvweave
from kvweave import models
from kvweave.evals.calibration import calibrate as making
from kvweave.evals.calibration import fit as fitting
from kvweave.evals.calibration.calibrate import Fitting, calibrate
from kvweave.evals.calibration.fit import fit, lessons
from kvweave.evals.calibration.prompts import lessons_of, prompts_of
from kvweave.evals.calibration.shares import BUDGETS
from kvweave.evals.tasks.sources import SOURCES
from kvweave.evals.tasks.text import READMES
from kvweave.methods.allocation import Profile
from kvweave.models import encode
from kvweave.seam.profiles import model_mark


def _quiet(*told: object) -> None:
    pass


@pytest.fixture(scope="module")
def lab_model():
    return models.load()


@pytest.fixture(scope="module")
def prompts(lab_model):
    return lessons_of("lab", lab_model[1], 20, None)


@pytest.fixture(scope="module")
def learned(lab_model, prompts):
    return lessons(*lab_model, prompts, _quiet)


def test_a_lesson_reads_what_the_model_says(lab_model, prompts, learned):
    model, processor = lab_model
    lesson, inputs = learned[0], dict(encode(processor, prompts[0].messages))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], lesson.reply[:, :-1]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, lesson.reply.shape[1] - 1))
    with torch.no_grad():
        logits = model(**inputs).logits[0, lesson.length - 1 :].float()
    assert lesson.reply[0].tolist() == logits.argmax(-1).tolist()
    assert torch.allclose(lesson.said, logits[1:].log_softmax(-1), atol=1e-3)


def test_a_cut_costs_what_it_does_in_a_cache(lab_model, prompts, learned, tmp_path: Path):
    """Whole counts: the KL is that of a reply read from what weave keeps by a profile of just these counts."""
    (model, processor), lesson = lab_model, learned[0]
    heads, budget = [len(rank) for rank in lesson.ranks], round(0.05 * lesson.length)
    counts = torch.full((sum(heads),), float(budget))
    for one, other, more in ((0, -1, 9), (2, 3, 7)):
        counts[one], counts[other] = counts[one] - more, counts[other] + more
    table = tuple(tuple(n / lesson.length for n in part.tolist()) for part in counts.split(heads))
    path = tmp_path / "p.json"
    Profile(model_mark(model), (budget / lesson.length,), (table,)).write(str(path))
    spelled = f"weave:form=lent,allocation=profile,mix=0,profile={path},redecode=true"
    with kvweave.compress(model, kvweave.parse_method(spelled, budget=budget)) as session, torch.no_grad():
        inputs = dict(encode(processor, prompts[0].messages))
        model.generate(**inputs, do_sample=False, min_new_tokens=9, max_new_tokens=9)
        cache = session.cache
        cache.crop(lesson.length - cache.get_seq_length())
        kept = torch.cat([(layer.positions[0] >= 0).sum(-1) for layer in cache.compressed_layers])
        assert kept.tolist() == counts.tolist()
        cache.freeze()
        logits = model(input_ids=lesson.reply[:, :-1], past_key_values=cache).logits[0].float()
    there = lesson.said
    cost = (there.exp() * (there - logits.log_softmax(-1))).sum(-1).mean()
    assert float(cost) > 1e-4
    with torch.no_grad():
        assert float(lesson.cost(model, counts, soft=False)) == pytest.approx(float(cost), rel=2e-2)


def test_what_is_kept_whole_costs_nothing(lab_model, learned):
    model, _ = lab_model
    everything = torch.full((sum(map(len, learned[0].ranks)),), float(learned[0].length))
    with torch.no_grad():
        assert float(learned[0].cost(model, everything, soft=False)) == pytest.approx(0, abs=1e-6)
        assert float(learned[0].cost(model, everything * 0.02)) > 1e-4


def test_a_fit_lowers_what_a_cut_costs_and_keeps_the_budget(lab_model, learned):
    model, _ = lab_model
    asked = [weight.requires_grad for weight in model.parameters()]
    heads = sum(map(len, learned[0].ranks))
    start = [0.01] * (heads - 1) + [0.05 * heads - 0.01 * (heads - 1)]  # nearly all to one head
    told: list[tuple[int, int]] = []
    shares, costs = fit(model, learned, start, 0.05, 30, lambda *said: told.append(said))
    assert costs["fitted"] < costs["start"]
    assert sum(shares) / heads == pytest.approx(0.05, rel=1e-4)
    assert min(shares) > 0
    assert told == [(n, 30) for n in range(31)]
    assert [weight.requires_grad for weight in model.parameters()] == asked
    assert all(weight.grad is None for weight in model.parameters())
    assert fit(model, learned, start, 0.05, 30, _quiet) == (shares, costs)  # the same again


def test_a_fit_that_is_no_better_is_not_taken(lab_model, learned, monkeypatch):
    model, _ = lab_model
    heads = sum(map(len, learned[0].ranks))
    monkeypatch.setattr(fitting, "_RATE", 50.0)  # far too fast
    shares, costs = fit(model, learned, [1.0] * heads, 0.05, 3, _quiet)
    assert costs["fitted"] > costs["start"]
    assert shares == pytest.approx([0.05] * heads)


def test_an_interrupted_fit_goes_on_where_it_was(lab_model, prompts, tmp_path: Path, monkeypatch):
    model, processor = lab_model
    means, given = prompts_of("lab", processor, 1, None), Fitting(prompts, 2)
    whole = calibrate(model, processor, means, tmp_path / "whole.json", given)
    asked: list[float] = []

    def twice(*args, **kwargs):
        asked.append(args[3])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    monkeypatch.setattr(making, "fit", twice)
    out = tmp_path / "p.json"
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, processor, means, out, given)
    assert not out.exists()
    told: list[str] = []
    assert calibrate(model, processor, means, out, given, lambda what, done, total: told.append(what)) == whole
    assert asked == [*BUDGETS[:3], *BUDGETS[2:]]
    assert list(dict.fromkeys(told)) == ["prompts", "replies", "shares at 20%", "shares at 10%", "shares at 5%"]
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    profile = Profile.read(str(out))
    assert profile.budgets == BUDGETS
    for budget, table in zip(BUDGETS, profile.shares, strict=True):
        assert torch.tensor(table).mean().item() == pytest.approx(budget, abs=0.01)


def test_too_few_replies_are_refused(lab_model, prompts):
    with pytest.raises(ValueError, match=r"2 of 2 replies.*10"):
        lessons(*lab_model, prompts[:2], _quiet)


def test_what_a_fit_learns_from(tmp_path: Path):
    """Texts with something to do, questions, and albums where the model sees; nothing that evaluations go on with."""
    processor = models.load("lab")[1]
    assert {prompt.name.split("/")[0] for prompt in lessons_of("lab", processor, 10, None)} == set(
        SOURCES["lab"].tasks
    )
    tokenizer = processor.tokenizer
    found = lessons_of("my-model", tokenizer, 8, 300)
    texts, questions = found[::2], found[1::2]
    assert [prompt.name.split("/")[0] for prompt in questions] == ["needle", "reversed", "records", "several"]
    assert [prompt.name.rsplit(", ", 1)[1] for prompt in texts] == ["100 tokens"] * 3 + ["200 tokens"]
    aside = {name.lower().replace("_", "-") for name in READMES}
    assert not aside & {prompt.name.split(" ")[0].lower().replace("_", "-") for prompt in texts}
    own = tmp_path / "own.txt"
    own.write_text("list image " * 400)
    assert lessons_of("my-model", tokenizer, 2, 300, [own])[0].name == "own.txt, 100 tokens"
