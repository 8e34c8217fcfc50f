"""What vLLM's connector checks before it lets a request go on from a context; vLLM itself is tested in tests/vllm."""

import subprocess
import sys

import pytest
import torch
from test_export import SNAPKV, prefilled
from tiny import text_model

from kvweave.memory import saved
from kvweave.models import decoder
from kvweave.seam import export
from kvweave.serve.engines import handoff
from kvweave.serve.engines.handoff import (
    Context,
    ContextError,
    check_whole,
    context_of,
    described,
    heads_here,
    mark_of,
    request_of,
)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder of contexts, and what the one in it says of itself."""
    folder, model = tmp_path_factory.mktemp("contexts"), text_model("llama")
    cache, token = prefilled(model, SNAPKV)
    return folder, cache.export(folder, model, first_token=token)


def asked(stored, **other):
    folder, said = stored
    request = {
        "parameters": {"context": said["digest"], "slots": said["slots"]},
        "salt": said["digest"],
        "prompt": [7] * said["slots"] + [9, 9],
        "root": str(folder),
        "model": said["model"],
    }
    return request | other


def test_a_request_that_is_in_order_gets_its_context(stored):
    folder, said = stored
    expected = Context(str(folder / f"{said['digest']}.safetensors"), said["slots"])
    assert context_of(**asked(stored)) == expected
    assert described(expected.path) == said
    check_whole(expected.path)


def test_a_request_that_was_made_for_a_context_is_in_order(stored):
    _, said = stored
    request = request_of(said, [said["first_token"]])
    made = {"parameters": request["kv_transfer_params"], "salt": request["cache_salt"], "prompt": request["prompt"]}
    found = context_of(**asked(stored, **made))
    assert found is not None
    assert request["prompt"][found.slots :] == [said["first_token"]]
    with pytest.raises(ValueError, match="allowed is at least one"):
        request_of(said, [])


@pytest.mark.parametrize("parameters", [None, {}, {"do_remote_prefill": True}])
def test_other_requests_are_left_alone(stored, parameters):
    assert context_of(**asked(stored, parameters=parameters, salt=None)) is None


def test_what_is_not_in_order_is_refused(stored):
    _, said = stored
    digest, slots = said["digest"], said["slots"]
    named = {"context": digest, "slots": slots}
    prompt = [7] * slots + [9]
    for other, message in (
        ({"salt": None}, "cache_salt is not the context's digest"),
        ({"salt": "0" * 64}, "cache_salt is not the context's digest"),
        ({"model": "0" * 64}, "the context's model is another"),
        ({"parameters": named | {"slots": slots - 1}}, "the context's slots is another"),
        ({"parameters": {"context": digest}}, "the context's slots is another"),
        ({"parameters": named | {"context": "../" + digest}}, "context is no digest"),
        ({"parameters": named | {"context": digest.upper()}}, "context is no digest"),
        ({"parameters": named | {"context": None}}, "context is no digest"),
        ({"parameters": named | {"context": "0" * 64}, "salt": "0" * 64}, r"cannot be read \(FileNotFoundError\)"),
        ({"root": "/nowhere"}, r"cannot be read \(FileNotFoundError\)"),
        ({"prompt": prompt[:slots]}, "no token behind the context's slots"),
        ({"prompt": None}, "no token behind the context's slots"),
        ({"prompt": [8, *prompt[1:]]}, "the prompt's first tokens differ"),
    ):
        with pytest.raises(ContextError, match=message):
            context_of(**asked(stored, **other))


def test_a_context_under_anothers_name_is_refused(stored, tmp_path):
    folder, said = stored
    (tmp_path / f"{'a' * 64}.safetensors").write_bytes((folder / f"{said['digest']}.safetensors").read_bytes())
    parameters = {"context": "a" * 64, "slots": said["slots"]}
    with pytest.raises(ContextError, match="the context's digest is another"):
        context_of(**asked(stored, root=str(tmp_path), parameters=parameters, salt="a" * 64))


def test_files_that_are_cut_short_altered_or_of_another_kind_are_refused(stored, tmp_path):
    folder, said = stored
    whole = (folder / f"{said['digest']}.safetensors").read_bytes()
    for place in (len(whole) - 1, whole.index(rb"slots\": ") + 9):
        altered = bytearray(whole)
        altered[place] ^= 1
        path = tmp_path / f"{place}.safetensors"
        path.write_bytes(altered)
        with pytest.raises(ContextError, match=r"altered|cannot be read"):
            check_whole(str(path))
    for number, content in enumerate((whole[:-1], whole[:20], b"", b"\xff" * 99)):
        path = tmp_path / f"cut{number}.safetensors"
        path.write_bytes(content)
        with pytest.raises(ContextError, match=r"altered|cannot be read"):
            check_whole(str(path))
    saved.write(tmp_path / "other", {"k0": torch.ones(1)}, {"format": "other", "digest": saved.NO_DIGEST})
    with pytest.raises(ContextError, match="allowed is a file of 'kvweave context 1'"):
        described(str(tmp_path / "other"))


def test_a_file_that_was_written_anew_is_read_anew(stored, tmp_path):
    folder, said = stored
    path = tmp_path / "context.safetensors"
    path.write_bytes((folder / f"{said['digest']}.safetensors").read_bytes())
    check_whole(str(path))
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ContextError, match="altered"):
        check_whole(str(path))


def test_heads_are_shared_out_by_rank():
    assert [heads_here(8, rank, 1) for rank in range(1)] == [slice(0, 8)]
    assert [heads_here(8, rank, 4) for rank in range(4)] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    assert [heads_here(2, rank, 4).start for rank in range(4)] == [0, 0, 1, 1]  # two processes hold each head
    assert all(heads_here(2, rank, 4).stop == heads_here(2, rank, 4).start + 1 for rank in range(4))


def test_a_decoder_says_whose_contexts_it_goes_on_from(tmp_path):
    assert mark_of(str(tmp_path)) is None
    model = text_model("llama")
    decoder.export_decoder(model, tmp_path / "decoder")
    assert mark_of(str(tmp_path / "decoder")) == export.mark(model)


def test_what_is_written_down_twice_is_the_same():
    """The connector imports nothing of kvweave's core, so that it runs where the core does not."""
    assert (handoff.FORMAT, handoff.HEADER, handoff.MARK) == (export.FORMAT, export.HEADER, decoder.MARK)
    assert handoff._NO_DIGEST == saved.NO_DIGEST
    found = "print(*(name for name in sys.modules if name.startswith(('kvweave', 'torch'))))"
    code = f"import sys, kvweave.serve.engines.handoff; {found}"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    here = ["kvweave", "kvweave.serve", "kvweave.serve.engines", "kvweave.serve.engines.handoff"]
    assert sorted(done.stdout.split()) == here
