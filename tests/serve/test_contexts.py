"""Contexts: read once, asked many times, each its owner's alone, over a restart and out of date."""

from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from serving import Running, metrics, openai_messages, samples, start

import kvweave
from kvweave import models
from kvweave.models.chat import written
from kvweave.seam import names
from kvweave.serve.app import Server
from kvweave.serve.contexts import Context, Contexts
from kvweave.serve.engine.reading import Reading, read_prompt
from kvweave.serve.errors import Refusal
from kvweave.serve.keys import Keys
from kvweave.serve.limits import Limits, Offers

ALICE, BOB = "alice-has-this-key", "bob-has-another-key"
METHODS = ("snapkv", "full", "weave", "adakv")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def serving(data: Path | None, **limits: Any) -> Running:
    own = Limits(rows=8, new_tokens=64, **limits)
    return start(limits=own, offers=Offers(METHODS, 0.3), keys=Keys([ALICE, BOB]), data=data)


def client(running: Running, key: str = ALICE) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0, timeout=60)


def album(sample: Any) -> list[dict[str, Any]]:
    """A question's messages without the question."""
    (turn,) = openai_messages(sample)
    return [{**turn, "content": turn["content"][:-1]}]


def post(running: Running, key: str, sample: Any, **more: Any) -> httpx2.Response:
    body = {"model": "lab", "messages": album(sample), **more}
    return httpx2.post(
        f"{running.url}/v1/contexts", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60
    )


def call(running: Running, verb: str, path: str, key: str) -> httpx2.Response:
    return httpx2.request(verb, f"{running.url}/v1/contexts{path}", headers={"Authorization": f"Bearer {key}"})


def ask(running: Running, key: str, id: str, question: str, **more: Any) -> Any:
    return client(running, key).chat.completions.create(
        model="lab",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=12,
        extra_body={"kvweave": {"context": id}},
        **more,
    )


def questions(sample: Any) -> list[str]:
    return [f"what digit is hidden in image #{n} ?" for n in range(1, len(sample.images) + 1)]


def frozen_answers(lab_model: tuple[Any, Any], sample: Any, method: str, probes: str | None = None) -> list[str]:
    """What the same context answers without a server: read, cut and frozen, anew for each question."""
    model, processor = lab_model
    (turn,) = sample.messages()
    with torch.inference_mode(), kvweave.attach(model):
        answers = []
        for question in questions(sample):
            own = [{**turn, "content": [*turn["content"][:-1], {"type": "text", "text": question}]}]
            text, _, asked = written(processor, own).partition(question)
            images = [part["image"] for part in turn["content"] if part["type"] == "image"]
            inputs = processor(text=[text], images=[images], return_tensors="pt")
            cache = kvweave.CompressedCache(model.config, kvweave.parse_method(method), hold=probes is not None)
            model.generate(**inputs, past_key_values=cache, max_new_tokens=1, do_sample=False)
            if probes is not None:
                cache.compress(probes, processor=processor)
            cache.freeze()
            more = processor.tokenizer([question + asked], add_special_tokens=False, return_tensors="pt")
            whole = torch.cat([inputs["input_ids"], more["input_ids"]], 1)
            kinds = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, more["input_ids"].shape[1]))
            out = model.generate(
                input_ids=whole,
                attention_mask=torch.ones_like(whole),
                mm_token_type_ids=kinds,
                image_grid_thw=inputs["image_grid_thw"],
                max_new_tokens=12,
                do_sample=False,
                **{names.CACHE: cache},
            )
            answers.append(processor.tokenizer.decode(out[0, whole.shape[1] :], skip_special_tokens=True))
        return answers


@pytest.mark.parametrize("method", METHODS)
def test_questions_are_answered_from_what_was_kept(shared: Running, lab_model: tuple[Any, Any], method: str) -> None:
    (sample,) = samples(1, images=4, task="image_needle")
    before = metrics(shared, ALICE)["kvweave_prompt_tokens_total"]
    told = post(shared, ALICE, sample, kvweave={"method": method, "budget": 0.5}).json()
    read = told["usage"]["prompt_tokens"]
    answers = [ask(shared, ALICE, told["id"], question) for question in questions(sample)]
    assert [answer.choices[0].message.content for answer in answers] == frozen_answers(
        lab_model, sample, f"{method}:budget=0.5"
    )
    grown = metrics(shared, ALICE)["kvweave_prompt_tokens_total"] - before
    assert grown == read + sum(a.usage.prompt_tokens - read for a in answers)  # pictures were read once
    for answer in answers:
        assert answer.usage.prompt_tokens_details.cached_tokens == read
        assert answer.usage.prompt_tokens > read
    assert told["kvweave"]["prompt_bytes"] == read * 2048
    if method == "snapkv":
        assert told["kvweave"]["kept_bytes"] == read // 2 * 2048


def test_probes_that_the_chat_template_has_no_words_for_are_refused_at_the_start(lab_model: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="probes='template' is empty"):
        Server("lab", *models.load("lab"), context_probes="template")


@pytest.mark.parametrize("probes", ["replay", "default"])
def test_contexts_are_cut_by_what_the_model_is_asked_before(lab_model: tuple[Any, Any], probes: str) -> None:
    (sample,) = samples(1, images=3, task="image_needle")
    limits, offers = Limits(rows=4, choices=4), Offers(["snapkv"], 0.1)
    own = start(limits=limits, offers=offers, keys=Keys([ALICE]), context_probes=probes)
    try:
        told = post(own, ALICE, sample).json()
        answers = [ask(own, ALICE, told["id"], question).choices[0].message.content for question in questions(sample)]
    finally:
        own.stop()
    assert answers == frozen_answers(lab_model, sample, "snapkv:budget=0.1", probes)
    assert answers != frozen_answers(lab_model, sample, "snapkv:budget=0.1")
    assert told["kvweave"]["kept_bytes"] < 0.15 * told["kvweave"]["prompt_bytes"]


@pytest.fixture(scope="module")
def shared() -> Any:
    found = serving(None)
    yield found
    found.stop()


def test_a_context_is_its_owners_alone(shared: Running) -> None:
    (sample,) = samples(1)
    id = post(shared, ALICE, sample).json()["id"]
    assert call(shared, "GET", f"/{id}", ALICE).json()["id"] == id
    never = f"ctx_{'0' * 32}"
    for one in (id, never, "../../etc/passwd", "x"):  # what is another's is told as what there is not
        for verb in ("GET", "DELETE"):
            told = call(shared, verb, f"/{one}", BOB)
            assert told.status_code == 404
            assert told.json()["error"]["message"] in ("there is no such context", f"{verb} /etc/passwd is not here")
        with pytest.raises(openai.NotFoundError, match="no such context"):
            ask(shared, BOB, one, "where ?")
    assert id not in [c["id"] for c in call(shared, "GET", "", BOB).json()["data"]]
    assert id in [c["id"] for c in call(shared, "GET", "", ALICE).json()["data"]]
    assert call(shared, "DELETE", f"/{id}", ALICE).json() == {"id": id, "object": "context.deleted", "deleted": True}
    assert call(shared, "GET", f"/{id}", ALICE).status_code == 404


def test_it_survives_a_restart(data: Path) -> None:
    (sample,) = samples(1, images=3, task="image_needle")
    first = serving(data)
    id = post(first, ALICE, sample).json()["id"]
    before = [ask(first, ALICE, id, question).choices[0].message.content for question in questions(sample)]
    told = call(first, "GET", f"/{id}", ALICE).json()
    first.stop()
    assert sorted(file.name for file in data.iterdir()) == [f"{id}.json", f"{id}.safetensors"]
    assert {oct(file.stat().st_mode & 0o777) for file in data.iterdir()} == {"0o600"}
    second = serving(data)
    try:
        assert call(second, "GET", f"/{id}", ALICE).json() == told
        assert call(second, "GET", f"/{id}", BOB).status_code == 404
        assert [ask(second, ALICE, id, q).choices[0].message.content for q in questions(sample)] == before
        call(second, "DELETE", f"/{id}", ALICE)
        assert list(data.iterdir()) == []
    finally:
        second.stop()


def test_what_a_context_is_not_asked(shared: Running) -> None:
    (sample,) = samples(1)
    id = post(shared, ALICE, sample).json()["id"]
    (turn,) = openai_messages(sample)
    with pytest.raises(openai.BadRequestError, match="images are not allowed behind a context"):
        client(shared).chat.completions.create(model="lab", messages=[turn], extra_body={"kvweave": {"context": id}})
    for own in ({"method": "snapkv"}, {"budget": 0.3}, {"trace": True}):
        with pytest.raises(openai.BadRequestError, match="not allowed beside context"):
            client(shared).chat.completions.create(
                model="lab",
                messages=[{"role": "user", "content": "where ?"}],
                extra_body={"kvweave": {"context": id, **own}},
            )
    assert post(shared, ALICE, sample, kvweave={"context": id}).status_code == 400
    assert post(shared, ALICE, sample, temperature=0).json()["error"]["param"] == "temperature"


def test_a_context_that_is_deleted_while_it_is_asked(shared: Running) -> None:
    """What has begun is answered, from its own context and no other's; what has not finds none."""
    few = samples(2, images=3, task="image_needle")
    ids = [post(shared, ALICE, sample).json()["id"] for sample in few]
    asked = [(id, question) for id, sample in zip(ids, few, strict=True) for question in questions(sample)]
    answers = [ask(shared, ALICE, *one).choices[0].message.content for one in asked]
    streams = [ask(shared, ALICE, *one, stream=True) for one in asked]
    begun = [[next(stream)] for stream in streams]
    for id in ids:
        assert call(shared, "DELETE", f"/{id}", ALICE).status_code == 200
    for answer, first, stream in zip(answers, begun, streams, strict=True):
        assert "".join(chunk.choices[0].delta.content or "" for chunk in [*first, *stream]) == answer
    with pytest.raises(openai.NotFoundError, match="no such context"):
        ask(shared, ALICE, *asked[0])
    assert call(shared, "DELETE", f"/{ids[0]}", ALICE).status_code == 404


def test_n_replies_to_a_question(shared: Running) -> None:
    (sample,) = samples(1, task="image_needle")
    id = post(shared, ALICE, sample).json()["id"]
    one = ask(shared, ALICE, id, "what digit is hidden in image #2 ?").choices[0].message.content
    told = ask(shared, ALICE, id, "what digit is hidden in image #2 ?", n=3)
    assert [choice.message.content for choice in told.choices] == [one] * 3


# -------------------------------------------------------------------- the store alone


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def reading(lab_model: tuple[Any, Any]) -> Reading:
    model, processor = lab_model
    (sample,) = samples(1, images=2)
    with kvweave.attach(model):
        found = read_prompt(model, models.encode(processor, sample.messages()), kvweave.SnapKV(budget=0.5))
        found.cache.freeze()
    return found


def store(lab_model: tuple[Any, Any], data: Path | None, clock: Clock, **limits: Any) -> Contexts:
    return Contexts(Limits(**limits), data, lab_model[0], clock=clock)


def kept(contexts: Contexts, reading: Reading, owner: str, size: int = 100) -> str:
    assert reading.position is not None
    own = Context(owner, "snapkv", reading.length, 4 * size, size, "", [], reading.position.tolist())
    contexts.add(own, reading)
    return own.id


def test_a_context_expires(lab_model: tuple[Any, Any], reading: Reading, data: Path) -> None:
    clock = Clock()
    contexts = store(lab_model, data, clock, context_seconds=60.0)
    asked, forgotten = kept(contexts, reading, "alice"), kept(contexts, reading, "alice")
    clock.now += 50
    contexts.get(asked, "alice")
    contexts.look(forgotten, "alice")  # does not make it live longer
    clock.now += 50
    assert [c.id for c in contexts.all_of("alice")] == [asked]
    assert len(list(data.iterdir())) == 2
    again = store(lab_model, data, clock, context_seconds=60.0)
    assert [c.id for c in again.all_of("alice")] == [asked]
    clock.now += 61
    assert store(lab_model, data, clock, context_seconds=60.0).all_of("alice") == []
    assert list(data.iterdir()) == []


def test_the_one_used_longest_ago_makes_room(lab_model: tuple[Any, Any], reading: Reading) -> None:
    clock = Clock()
    contexts = store(lab_model, None, clock, context_bytes=350)
    first, second, third = (kept(contexts, reading, "alice") for _ in range(3))
    clock.now += 1
    contexts.get(first, "alice")
    fourth = kept(contexts, reading, "alice")
    assert {c.id for c in contexts.all_of("alice")} == {first, third, fourth}
    with pytest.raises(Refusal, match="allowed are at most 350"):
        kept(contexts, reading, "alice", 351)
    assert len(contexts.all_of("alice")) == 3
    assert second not in {c.id for c in contexts.all_of("alice")}


def test_who_holds_most_makes_room_for_others(lab_model: tuple[Any, Any], reading: Reading) -> None:
    contexts = store(lab_model, None, Clock(), context_bytes=400)
    bobs = kept(contexts, reading, "bob")
    for _ in range(5):
        kept(contexts, reading, "alice")
    assert [c.id for c in contexts.all_of("bob")] == [bobs]
    assert len(contexts.all_of("alice")) == 3


def test_contexts_of_one_owner(lab_model: tuple[Any, Any], reading: Reading) -> None:
    contexts = store(lab_model, None, Clock(), contexts=2)
    ids = [kept(contexts, reading, "alice") for _ in range(3)]
    assert [c.id for c in contexts.all_of("alice")] == ids[1:]


def test_what_lies_in_the_folder_is_not_trusted(lab_model: tuple[Any, Any], reading: Reading, data: Path) -> None:
    clock = Clock()
    contexts = store(lab_model, data, clock)
    whole, torn, lost, half = (kept(contexts, reading, "alice") for _ in range(4))
    (data / f"{torn}.safetensors").write_bytes(b"\x00" * 100)
    (data / f"{lost}.safetensors").unlink()
    (data / f"{half}.json").write_text("{")
    (data / "mine.txt").write_text("not ours")
    again = store(lab_model, data, clock)
    assert {c.id for c in again.all_of("alice")} == {whole, torn}
    with pytest.raises(Refusal, match="no such context"):
        again.get(torn, "alice")
    loaded = again.get(whole, "alice")[1]
    assert loaded.position is not None
    assert reading.position is not None
    assert torch.equal(loaded.position, reading.position)
    for mine, theirs in zip(loaded.cache.layers, reading.cache.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
    store(lab_model, data, clock)
    assert sorted(f.name for f in data.iterdir()) == sorted([f"{whole}.json", f"{whole}.safetensors", "mine.txt"])


def test_another_models_contexts_are_not_read(lab_model: tuple[Any, Any], reading: Reading, data: Path) -> None:
    clock = Clock()
    id = kept(store(lab_model, data, clock), reading, "alice")
    other, _ = models.load("lab")
    with torch.no_grad():
        other.lm_head.weight += 1
    with pytest.raises(Refusal, match="no such context"):
        Contexts(Limits(), data, other, clock=clock).get(id, "alice")
