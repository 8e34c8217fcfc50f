"""Replies that engines decode from what kvweave has read and cut: tokens, files, engines that break."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from engine_double import EngineDouble
from serving import Running, generated, metrics, openai_messages, samples, settled, until

import kvweave
from kvweave import models
from kvweave.serve.app import Server
from kvweave.serve.engine.proof import text_reading
from kvweave.serve.limits import DEFAULT_METHOD, Limits, Offers
from kvweave.serve.remote.engine import Remote
from kvweave.serve.remote.files import Handoffs
from kvweave.serve.remote.vllm import command

METHODS = ("snapkv", "full", DEFAULT_METHOD, "streaming_llm", "h2o:defer=3")


@dataclass
class Chain:
    """A server, its engines and their folder."""

    running: Running
    engines: list[EngineDouble]
    root: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.running.url}/v1", api_key="-", max_retries=0, timeout=60)

    @property
    def files(self) -> list[Path]:
        return list(self.root.glob("*/*.safetensors"))

    def ask(self, sample: Any, **more: Any) -> Any:
        own = {"ignore_eos": True, **more.pop("kvweave", {})}
        asked = {"model": "lab", "messages": openai_messages(sample), "temperature": 0, "max_tokens": 12} | more
        return self.client.chat.completions.create(**asked, extra_body={"kvweave": own})

    def question(self, id: str, question: str) -> str | None:
        told = self.client.chat.completions.create(
            model="lab",
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=8,
            extra_body={"kvweave": {"context": id}},
        )
        return told.choices[0].message.content


@pytest.fixture(scope="module")
def decoder(lab_model: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "decoder"
    models.export_decoder(lab_model[0], folder)
    return folder


@pytest.fixture(scope="module")
def chain(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    root = tmp_path_factory.mktemp("handoff")
    engines = [EngineDouble(decoder, root) for _ in range(2)]
    runs = [Running(engine) for engine in engines]
    server = Server(
        "lab",
        *models.load("lab"),
        limits=Limits(rows=8, new_tokens=64, choices=4),
        offers=Offers(METHODS),
        remote=Remote([run.url for run in runs], root),
    )
    found = Chain(Running(server), engines, root)
    until(lambda: httpx2.get(f"{found.running.url}/health").status_code == 200)
    yield found
    found.running.stop()
    assert list(root.iterdir()) == []
    for run in runs:
        run.stop()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stream", [False, True])
def test_greedy_answers_are_those_of_compress_alone(
    chain: Chain, lab_model: tuple[Any, Any], method: str, stream: bool
) -> None:
    for sample in samples(4, images=3):
        right, _ = generated(
            lab_model, sample, f"{method}{',' if ':' in method else ':'}budget=0.3", 12, endless=True
        )
        told = chain.ask(sample, stream=stream, kvweave={"method": method, "budget": 0.3})
        text = "".join(c.choices[0].delta.content or "" for c in told) if stream else told.choices[0].message.content
        assert text == right
    assert settled(chain.running, kvweave_rows_together=0, kvweave_kv_bytes=0)
    assert chain.files == []


def test_a_reply_ends_where_the_model_or_a_stop_ends_it(chain: Chain, lab_model: tuple[Any, Any]) -> None:
    (sample,) = samples(1, task="text_needle")
    right, _ = generated(lab_model, sample, "snapkv:budget=0.2", 12)
    told = chain.ask(sample, kvweave={"ignore_eos": False}).choices[0]
    assert (told.message.content, told.finish_reason) == (right, "stop")
    whole = chain.ask(sample).choices[0].message.content
    told = chain.ask(sample, stop=[whole[3:5]]).choices[0]
    assert (told.message.content, told.finish_reason) == (whole[: whole.find(whole[3:5])], "stop")
    one = chain.ask(sample, max_tokens=1).choices[0]
    assert (whole.startswith(one.message.content), one.finish_reason) == (True, "length")
    assert settled(chain.running, kvweave_kv_bytes=0)


def test_choices_and_log_probabilities(chain: Chain, running: Running) -> None:
    (sample,) = samples(1, task="lookup")
    own = {"kvweave": {"method": "snapkv"}, "logprobs": True, "top_logprobs": 2, "n": 2, "max_tokens": 6}
    told = chain.ask(sample, **own)
    here = Chain(running, [], Path()).ask(sample, **own)
    for mine, theirs in zip(told.choices, here.choices, strict=True):
        assert mine.message.content == theirs.message.content
        for a, b in zip(mine.logprobs.content, theirs.logprobs.content, strict=True):
            assert a.token == b.token
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
            assert [x.token for x in a.top_logprobs] == [x.token for x in b.top_logprobs]
    drawn = chain.ask(sample, n=3, seed=3, temperature=2, max_tokens=20)
    assert len({choice.message.content for choice in drawn.choices}) > 1


@pytest.mark.parametrize("method", ["snapkv", DEFAULT_METHOD])
@pytest.mark.parametrize("after", [0, 2])
def test_an_engine_that_breaks_costs_nothing(
    chain: Chain, lab_model: tuple[Any, Any], after: int, method: str
) -> None:
    again = metrics(chain.running)["kvweave_decoders_again_total"]
    for sample in samples(4, images=2):
        own = {"method": method, "budget": 0.2}
        right, _ = generated(lab_model, sample, Offers([method], 0.2).methods[method].spelling(), 12, endless=True)
        for engine in chain.engines:
            engine.breaks = after
        assert (
            chain.ask(sample, kvweave=own).choices[0].message.content == right
        )  # whichever was first, and the other one then
    for engine in chain.engines:
        engine.breaks = None
    assert metrics(chain.running)["kvweave_decoders_again_total"] >= again + 4


@pytest.mark.parametrize("method", ["snapkv", DEFAULT_METHOD])
def test_a_reply_goes_on_from_tokens_that_are_known(chain: Chain, method: str) -> None:
    (sample,) = samples(1, task="lookup")
    own = {"return_token_ids": True, "method": method}
    whole = chain.ask(sample, kvweave=own).choices[0]
    for count in (1, 5, 9, 10, 12):
        asked = sum(len(engine.asked) for engine in chain.engines)
        known = own | {"known_token_ids": [whole.token_ids[:count]]}
        told = chain.ask(sample, kvweave=known).choices[0]
        assert (told.message.content, told.token_ids) == (whole.message.content, whole.token_ids)
        assert sum(len(engine.asked) for engine in chain.engines) == asked + (count < 12)


def test_a_deferred_cut_goes_by_what_is_decoded_here(chain: Chain, running: Running) -> None:
    (sample,) = samples(1, task="lookup")
    own, here = {"kvweave": {"method": DEFAULT_METHOD}}, Chain(running, [], Path())
    asked = sum(len(engine.asked) for engine in chain.engines)
    short, right = (place.ask(sample, **own, max_tokens=8) for place in (chain, here))
    assert short.choices[0].message.content == right.choices[0].message.content
    assert short.kvweave == right.kvweave  # it ended before its cut
    assert sum(len(engine.asked) for engine in chain.engines) == asked
    told, right = (place.ask(sample, **own, n=3) for place in (chain, here))
    assert [one.message.content for one in told.choices] == [one.message.content for one in right.choices]
    assert told.kvweave["kept_bytes"] == right.kvweave["kept_bytes"] < told.kvweave["prompt_bytes"] / 2
    assert sum(len(engine.asked) for engine in chain.engines) == asked + 3
    drawn = chain.ask(sample, **own, n=3, seed=3, temperature=2, max_tokens=20)  # each cut by its own tokens
    assert len({choice.message.content for choice in drawn.choices}) > 1
    assert settled(chain.running, kvweave_kv_bytes=0)
    assert chain.files == []


def test_questions_to_a_context_go_to_one_engine_and_share_a_file(chain: Chain, running: Running) -> None:
    few = samples(3, images=3, task="image_needle")
    asked = [f"what digit is hidden in image #{n} ?" for n in (1, 2, 3)]
    ids = []
    for sample in few:
        (turn,) = openai_messages(sample)
        body = {"model": "lab", "messages": [{**turn, "content": turn["content"][:-1]}]}
        body["kvweave"] = {"method": "snapkv", "budget": 0.5}
        ids.append(httpx2.post(f"{chain.running.url}/v1/contexts", json=body, timeout=60).json()["id"])
        there = Chain(running, [], Path())
        other = httpx2.post(f"{running.url}/v1/contexts", json=body, timeout=60).json()["id"]
        for engine in chain.engines:
            engine.asked.clear()
        read = metrics(chain.running)["kvweave_prompt_tokens_total"]
        assert [chain.question(ids[-1], q) for q in asked] == [there.question(other, q) for q in asked]
        assert metrics(chain.running)["kvweave_prompt_tokens_total"] == read  # nothing is read twice, nor here
        assert sorted(len(engine.asked) for engine in chain.engines) == [0, 3]
        httpx2.delete(f"{running.url}/v1/contexts/{other}")
    assert len(chain.files) == 3
    for id in ids:
        httpx2.delete(f"{chain.running.url}/v1/contexts/{id}")
    chain.ask(few[0])
    assert settled(chain.running, kvweave_kv_bytes=0)
    assert chain.files == []


def test_a_client_that_leaves_leaves_no_file(chain: Chain) -> None:
    (sample,) = samples(1)
    told = chain.ask(sample, stream=True, max_tokens=64)
    next(iter(told))
    told.close()
    assert settled(chain.running, kvweave_rows_together=0, kvweave_kv_bytes=0)
    assert chain.files == []


def test_what_an_engine_refuses_fails_alone(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    (sample,) = samples(1)
    for engine in chain.engines:
        monkeypatch.setattr(engine, "_mark", "0" * 64)
    with pytest.raises(openai.InternalServerError, match="KV load failure"):
        chain.ask(sample)
    monkeypatch.undo()
    assert chain.ask(sample).choices[0].message.content
    assert settled(chain.running, kvweave_kv_bytes=0)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("adakv", "heads of layer 0 keep"),
        ("pyramidkv", "layers keep"),
        ("flowmm:mass_bias=true", "add a bias"),
        ("adakv:defer=4", "heads of layer 0 keep"),
    ],
)
def test_methods_that_no_engine_goes_on_from_are_refused_at_the_start(
    tmp_path: Path, method: str, words: str
) -> None:
    with pytest.raises(ValueError, match=f"{method}.*is not allowed.*{words}"):
        Server("lab", *models.load("lab"), offers=Offers([method]), remote=Remote(["http://127.0.0.1:9"], tmp_path))
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------- files


def test_a_file_is_there_as_long_as_it_is_needed(lab_model: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = lab_model
    with kvweave.attach(model):
        files = Handoffs(tmp_path, model)
        other = Handoffs(tmp_path, model)  # of another process: it does not take this one's folder away
        cache = text_reading(model, processor.tokenizer, 40, kvweave.SnapKV(budget=0.5)).cache
        again = text_reading(model, processor.tokenizer, 40, kvweave.SnapKV(budget=0.5)).cache
    one, two = files.take(cache), files.take(again)  # the same prompt twice
    assert one is two
    path = files.folder / f"{one.digest}.safetensors"
    assert files.nbytes == path.stat().st_size
    files.drop(one)
    assert path.exists()
    files.drop(two)
    assert not path.exists()
    kept = files.take(cache, keep=True)
    files.drop(kept)
    assert files.take(cache, keep=True) is kept
    files.drop(kept)
    del cache
    files.drop(files.take(again, keep=True))
    assert path.exists()  # the context that is left
    del again
    assert files.nbytes == 0
    assert not path.exists()
    files.close()
    assert list(tmp_path.iterdir()) == [other.folder]
    other.close()


def test_what_a_process_that_was_killed_left_is_removed(lab_model: tuple[Any, Any], tmp_path: Path) -> None:
    left = tmp_path / "kvweave-abcdef"
    left.mkdir()
    (left / ".lock").touch()
    (left / "x.safetensors").touch()
    (tmp_path / "mine").mkdir()
    files = Handoffs(tmp_path, lab_model[0])
    assert not left.exists()
    assert (tmp_path / "mine").exists()
    files.close()


def test_vllm_is_started_on_the_decoder(decoder: Path, tmp_path: Path) -> None:
    words = command(["python", "-m", "vllm", "--max-num-seqs", "4"], decoder, tmp_path, 8123)
    given = dict(pairwise(words))
    assert given["--model"] == str(decoder)
    assert given["--dtype"] == "float32"
    assert given["--port"] == "8123"
    assert json.loads(given["--kv-transfer-config"])["kv_connector_extra_config"] == {"root": str(tmp_path)}
