"""Profiles: what is counted, what goes on where it was, what is written, and whose model they are."""

import json
from pathlib import Path

import pytest
import torch

import kvweave
from kvweave import models
from kvweave.evals.calibration import calibrate as making
from kvweave.evals.calibration.calibrate import calibrate
from kvweave.evals.calibration.prompts import prompts_of
from kvweave.evals.calibration.shares import BUDGETS, shares_of
from kvweave.methods.allocation import SHIPPED, Profile
from kvweave.models import encode
from kvweave.seam.profiles import model_mark


@pytest.fixture(scope="module")
def lab_model():
    return models.load()


@pytest.fixture(scope="module")
def prompts(lab_model):
    return prompts_of("lab", lab_model[1], 3, None)


def test_shares_are_what_kvzip_gives_the_heads(lab_model, prompts):
    model, processor = lab_model
    inputs = encode(processor, prompts[0].messages)
    found = shares_of(model, processor, dict(inputs))
    length = inputs["input_ids"].shape[1]
    for budget, table in zip(BUDGETS, found, strict=True):
        with (
            torch.no_grad(),
            kvweave.compress(
                model, kvweave.get_method("kvzip", budget=budget), probes="replay", processor=processor
            ) as session,
        ):
            model(**inputs)
        kept = [(layer.positions[0] >= 0).sum(-1).tolist() for layer in session.cache.compressed_layers]
        assert [[round(share * length) for share in layer] for layer in table] == kept


def test_an_interrupted_calibration_goes_on_where_it_was(lab_model, prompts, tmp_path: Path, monkeypatch):
    model, processor = lab_model
    whole, _ = calibrate(model, processor, prompts, tmp_path / "whole.json")
    asked, out = [], tmp_path / "p.json"

    def once(*given):
        asked.append(given)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return shares_of(*given)

    monkeypatch.setattr(making, "shares_of", once)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, processor, prompts, out)
    assert not out.exists()
    told = []
    profile, _ = calibrate(model, processor, prompts, out, tell=lambda *said: told.append(said))
    assert len(asked) == 2 + 2
    assert told == [("prompts", n, 3) for n in range(4)]
    assert profile == whole == Profile.read(str(out))
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"whole.json", "p.json"}
    assert json.loads(out.read_text())["prompts"] == [prompt.name for prompt in prompts]
    tables = [shares_of(model, processor, dict(encode(processor, p.messages))) for p in prompts]
    assert torch.allclose(torch.tensor(profile.shares), torch.tensor(tables).mean(0), atol=5e-5)
    for budget, table in zip(BUDGETS, profile.shares, strict=True):
        assert torch.tensor(table).mean().item() == pytest.approx(budget, abs=0.01)


def test_what_another_model_began_is_not_gone_on_with(lab_model, prompts, tmp_path: Path):
    model, processor = lab_model
    begun = tmp_path / ".p.json.begun"
    begun.write_text(json.dumps({"fingerprint": "another", "prompts": {"x": []}, "fitted": {}}))
    assert calibrate(model, processor, prompts[:1], tmp_path / "p.json")[0].fingerprint == model_mark(model)
    begun.write_text("{")
    with pytest.raises(ValueError, match=r"\.p\.json\.begun"):
        calibrate(model, processor, prompts[:1], tmp_path / "p.json")


def test_a_profile_serves_its_model_and_no_other(lab_model, prompts, tmp_path: Path):
    model, processor = lab_model
    path = tmp_path / "p.json"
    own, _ = calibrate(model, processor, prompts[:1], path)
    method = kvweave.parse_method(f"snapkv:budget=0.2,allocation=profile,profile={path},mix=0")
    inputs = encode(processor, prompts[1].messages)
    with kvweave.compress(model, method) as session, torch.no_grad():
        model(**inputs)
    kept = torch.tensor([layer["kept"] for layer in session.report["layers"]])
    assert kept.float().std() > 1
    Profile("0123456789abcdef", own.budgets, own.shares).write(str(path))
    wrapped = kvweave.parse_method(f"fold:method=snapkv,budget=0.2,allocation=profile,profile={path}")
    for other in (method, wrapped):
        with pytest.raises(ValueError, match=r"profile=.*p\.json.*another model"), kvweave.compress(model, other):
            pass
    cache = kvweave.CompressedCache(model.config, method)
    with kvweave.attach(model), torch.no_grad(), pytest.raises(ValueError, match=r"another model"):
        model(**inputs, past_key_values=cache)


def test_a_models_mark_does_not_depend_on_its_dtype(lab_model):
    model = models.load(dtype="float32")[0]
    mark = model_mark(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(torch.bfloat16))
    rounded = model_mark(model)
    assert rounded == mark == model_mark(model.to(torch.bfloat16))
    with torch.no_grad():
        next(model.parameters()).neg_()
    assert model_mark(model) != mark


def test_texts_are_taken_piece_by_piece(lab_model, tmp_path: Path):
    tokenizer = lab_model[1].tokenizer
    one, two, short = (tmp_path / f"{name}.txt" for name in ("one", "two", "short"))
    one.write_text("list image " * 60)
    two.write_text("image list " * 60)
    short.write_text("list")
    found = prompts_of("lab", lab_model[1], 5, 50, [one, two, short])
    assert [p.name for p in found] == [
        "one.txt", "two.txt", "one.txt from token 50", "two.txt from token 50",
    ]  # fmt: skip
    text = found[2].messages[0]["content"][0]["text"]
    assert tokenizer(text)["input_ids"] == tokenizer(one.read_text())["input_ids"][50:100]
    with pytest.raises(ValueError, match="tokens=500"):
        prompts_of("lab", lab_model[1], 5, 500, [short])
    with pytest.raises(ValueError, match=r"none\.txt"):
        prompts_of("lab", lab_model[1], 5, 50, [tmp_path / "none.txt"])


def test_profiles_that_are_shipped_can_be_read():
    names = [file.stem for file in SHIPPED.glob("*.json")]
    assert names
    for name in names:
        profile = Profile.read(name)
        assert profile.budgets == BUDGETS
        for budget, table in zip(profile.budgets, profile.shares, strict=True):
            assert torch.tensor(table).mean().item() == pytest.approx(budget, abs=0.01)


def test_albums_have_no_tokens_to_choose(lab_model):
    with pytest.raises(ValueError, match="tokens=50 is of texts, and lab is asked about albums"):
        prompts_of("lab", lab_model[1], 3, 50)
