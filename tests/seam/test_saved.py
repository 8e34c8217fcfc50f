"""A cache goes to a file or to another process and comes back the same."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import save_file
from tiny import text_inputs, text_model, words
from torch import multiprocessing

import kvweave

METHODS = {
    "snapkv": kvweave.SnapKV(budget=0.3, window=4),
    "flowmm, turned keys": kvweave.FlowMM(budget=0.3, proxies=4, rope_aware=True, mass_bias=True),
    "uneven heads": kvweave.get_method("adakv", budget=0.3, window=4),
    "memory": kvweave.get_method("d2o", budget=0.3),
    "deferred": kvweave.Weave(budget=0.4, proxies=4, recent=4),
    "deferred, heads compete": kvweave.Weave(0.4, form="lent", proxies=4, recent=4),
    "packed": kvweave.Quantized(kvweave.SnapKV(budget=0.6, window=4), bits=4, group=4, residual=4),
    "full": kvweave.Full(),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def filled(model, method, steps=1, lengths=(30, 21)):
    """A cache that holds a prompt and some decoded tokens, and whose deferred cut has not come after one."""
    handle = kvweave.attach(model)
    cache = kvweave.CompressedCache(model.config, method)
    with torch.no_grad():
        inputs = text_inputs(lengths)
        model(**inputs, past_key_values=cache)
        mask = inputs["attention_mask"]
        for n in range(steps):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            model(input_ids=words(len(lengths), 1, seed=n), attention_mask=mask, past_key_values=cache)
    handle.detach()
    return cache


def go_on(model, cache):
    """Logits of four more tokens and of a turn of six after them, and what the report then says."""
    handle, logits = kvweave.attach(model), []
    with torch.no_grad():
        for n, new in enumerate((1, 1, 1, 1, 6)):
            seen = cache.prompt.valid.long()
            mask = torch.cat([seen, seen.new_ones(len(seen), new)], 1)
            ids = words(len(seen), new, seed=20 + n)
            logits.append(model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits)
    handle.detach()
    return torch.cat(logits, 1), cache.report


def by_pickle(cache):
    return pickle.loads(pickle.dumps(cache))


def by_torch(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_method
@pytest.mark.parametrize("way", [by_pickle, by_torch, copy.deepcopy], ids=["pickle", "torch.save", "deepcopy"])
def test_what_comes_back_goes_on_as_the_cache_would_have(method, way):
    model = text_model("llava")
    cache = filled(model, method)
    back = way(cache)
    logits, report = go_on(model, cache)
    again, said = go_on(model, back)
    assert torch.equal(again, logits)
    assert said == report


def test_a_file_holds_what_the_cache_holds_and_no_room():
    model = text_model("llava")
    cache = filled(model, METHODS["snapkv"], steps=9, lengths=(900,))
    assert (
        len(pickle.dumps(cache)) < 1.2 * cache.report["totals"]["bytes"] + 30_000
    )  # 16 bytes a token are its id and its position


def _child(caches, answers):
    torch.set_num_threads(1)
    logits, report = go_on(text_model("llava"), caches.get())
    answers.put((logits.numpy(), report))


@pytest.mark.parametrize("method", [METHODS["deferred"], METHODS["snapkv"]], ids=["deferred", "snapkv"])
def test_a_cache_is_sent_to_another_process(method):
    """Both go on with it, each for itself, though they may share its memory."""
    context = multiprocessing.get_context("spawn")
    cache, caches, answers = filled(text_model("llava"), method), context.Queue(), context.Queue()
    child = context.Process(target=_child, args=(caches, answers))
    child.start()
    caches.put(cache)
    logits, report = answers.get(timeout=120)
    child.join()
    expected, said = go_on(text_model("llava"), cache)
    assert torch.equal(torch.from_numpy(logits), expected)
    assert report == said


# -------------------------------------------------------------------- cache.save and CompressedCache.load


@every_method
def test_a_saved_cache_goes_on_as_it_would_have(method, tmp_path):
    model, other = text_model("llava"), text_model("llava")
    cache = filled(model, method)
    cache.save(tmp_path / "context.safetensors", model)
    back = kvweave.CompressedCache.load(tmp_path / "context.safetensors", other)
    assert back.report == cache.report
    assert torch.equal(back.prompt.valid, cache.prompt.valid)
    assert torch.equal(back.prompt.visual, cache.prompt.visual)
    for mine, theirs in zip(back.layers, cache.layers, strict=True):
        for name in ("keys", "values", "positions", "mass"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name))
    written = (tmp_path / "context.safetensors").read_bytes()
    logits, report = go_on(model, cache)
    again, said = go_on(other, back)
    assert torch.equal(again, logits)
    assert said == report
    assert (tmp_path / "context.safetensors").read_bytes() == written  # what is mapped is not written to
    assert [file.name for file in tmp_path.iterdir()] == ["context.safetensors"]


def test_a_saved_cache_is_read_by_another_process(tmp_path):
    model, path = text_model("llava"), tmp_path / "context.safetensors"
    cache = filled(model, METHODS["deferred"])
    cache.save(path, model)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    child = context.Process(target=_reader, args=(path, answers))
    child.start()
    logits, report = answers.get(timeout=120)
    child.join()
    expected, said = go_on(model, cache)
    assert torch.equal(torch.from_numpy(logits), expected)
    assert report == said


def _reader(path, answers):
    torch.set_num_threads(1)
    model = text_model("llava")
    logits, report = go_on(model, kvweave.CompressedCache.load(path, model))
    answers.put((logits.numpy(), report))


def test_layers_that_slide_are_saved_too(tmp_path):
    kinds = ["sliding_attention", "full_attention"]
    model = text_model("gemma2", attention="eager", layer_types=kinds, sliding_window=6)
    cache = filled(model, METHODS["snapkv"])
    cache.save(tmp_path / "c", model)
    back = kvweave.CompressedCache.load(tmp_path / "c", model)
    assert torch.equal(go_on(model, back)[0], go_on(model, cache)[0])


def test_a_held_or_frozen_cache_stays_so(tmp_path):
    model = text_model("llava")
    handle = kvweave.attach(model)
    held = kvweave.CompressedCache(model.config, METHODS["snapkv"], hold=True, trace=True)
    with torch.no_grad():
        model(input_ids=words(1, 30), past_key_values=held)
        held.save(tmp_path / "c")
        held = kvweave.CompressedCache.load(tmp_path / "c", model)
        held.compress()
        assert held.layers[0].positions.shape[-1] == 9
        held.freeze()
        held.save(tmp_path / "c", model)
        frozen = kvweave.CompressedCache.load(tmp_path / "c", model)
        model(input_ids=words(1, 20), past_key_values=frozen)
    handle.detach()
    assert frozen.layers[0].positions.shape[-1] == 9 + 20
    assert torch.equal(frozen.layers[0].fate[0], held.layers[0].fate[0])


def other_weights(path):
    return text_model("llava", seed=1), "weights differ"


def another_model(path):
    return text_model("llama"), "class.*differ"


def other_phases(path):
    model = text_model("llava")
    model.config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    return model, "configuration differ"


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])
    return text_model("llava"), "no cache that can be read"


def one_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return text_model("llava"), "altered"


def a_word(path):
    content = path.read_bytes()
    at = content.index(b"snapkv")
    path.write_bytes(content[:at] + b"snapkw" + content[at + 6 :])
    return text_model("llava"), "altered"


def no_file_of_ours(path):
    path.write_bytes(b"nothing")
    return text_model("llava"), "no cache that can be read"


def other_tensors(path):
    save_file({"x": torch.zeros(3)}, path)
    return text_model("llava"), "format is None"


@pytest.mark.parametrize(
    "change",
    [other_weights, another_model, other_phases, cut_short, one_bit, a_word, no_file_of_ours, other_tensors],
)
def test_what_does_not_fit_is_refused(change, tmp_path):
    path = tmp_path / "context.safetensors"
    model = text_model("llava")
    filled(model, METHODS["snapkv"]).save(path, model)
    model, why = change(path)
    with pytest.raises(ValueError, match=why):
        kvweave.CompressedCache.load(path, model)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path, model = tmp_path / "context.safetensors", text_model("llava")
    cache = filled(model, METHODS["snapkv"])
    cache.save(path, model)
    before = path.read_bytes()
    cache.layers[1].memory = object()
    with pytest.raises(TypeError, match="a object cannot be saved"):
        cache.save(path, model)

    def full(*args):
        raise OSError("No space left on device")

    cache.layers[1].memory = None
    monkeypatch.setattr("kvweave.memory.saved.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        cache.save(path, model)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_cache_without_a_model_asks_for_one(tmp_path):
    cache = kvweave.CompressedCache(text_model("llava").config, METHODS["snapkv"])
    with pytest.raises(ValueError, match="no model is attached"):
        cache.save(tmp_path / "c")
    with pytest.raises(FileNotFoundError):
        kvweave.CompressedCache.load(tmp_path / "c", text_model("llava"))


def test_a_folder_and_no_model_are_refused_by_name(tmp_path):
    model = text_model("llava")
    cache = filled(model, METHODS["snapkv"])
    with pytest.raises(ValueError, match="is a folder: allowed is a file"):
        cache.save(tmp_path, model)
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}*"))
    cache.save(tmp_path / "c", model)
    with pytest.raises(TypeError, match="model=str is not a transformers model"):
        kvweave.CompressedCache.load(tmp_path / "c", "lab")
