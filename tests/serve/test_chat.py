"""Chat completions over a socket, by the official client: greedy answers are those of `kvweave.compress` alone."""

import asyncio
from typing import Any

import httpx2
import openai
import pytest
import torch
from serving import METHODS, Running, generated, metrics, openai_messages, samples, settled

import kvweave
from kvweave import models
from kvweave.serve.limits import DEFAULT_METHOD

#: What leaves the model in doubt, so that draws differ.
UNSURE = {"extra_body": {"kvweave": {"budget": 0.03}}}


@pytest.fixture
def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="nobody asks", max_retries=0, timeout=60)


def ask(client: openai.OpenAI, sample: Any, **more: Any) -> Any:
    asked = {"model": "lab", "messages": openai_messages(sample), "temperature": 0, "max_tokens": 24}
    return client.chat.completions.create(**asked | more)


@pytest.mark.parametrize("method", METHODS)
def test_greedy_answers_are_those_of_compress_alone(
    running: Running, lab_model: tuple[Any, Any], method: str
) -> None:
    """Eight at once, half of them streamed, of albums of different lengths, past every cut that is deferred."""
    client = openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="-", max_retries=0, timeout=60)
    asked = [s for images in (2, 5) for s in samples(4, images)]

    async def one(number: int, sample: Any) -> tuple[str, int]:
        request: dict[str, Any] = {
            "model": "lab",
            "messages": openai_messages(sample),
            "temperature": 0,
            "max_tokens": 10 + number,
            "extra_body": {"kvweave": {"method": method, "budget": 0.3, "ignore_eos": True}},
        }
        if number % 2:
            told = await client.chat.completions.create(**request)
            return told.choices[0].message.content or "", told.usage.completion_tokens
        text, tokens = "", 0
        options = {"include_usage": True}
        async for chunk in await client.chat.completions.create(**request, stream=True, stream_options=options):
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        return text, tokens

    async def all_of_them() -> list[tuple[str, int]]:
        async with client:
            return await asyncio.gather(*(one(n, sample) for n, sample in enumerate(asked)))

    answers = asyncio.run(all_of_them())
    at = f"{method}{',' if ':' in method else ':'}budget=0.3"
    assert answers == [generated(lab_model, s, at, 10 + n, endless=True) for n, s in enumerate(asked)]


@pytest.mark.parametrize("task", ["text_needle", "image_needle", "lookup", "change"])
def test_a_reply_ends_where_generate_ends_it(client: openai.OpenAI, lab_model: tuple[Any, Any], task: str) -> None:
    (sample,) = samples(1, task=task)
    told = ask(client, sample, extra_body={"kvweave": {"method": "snapkv"}})
    own = generated(lab_model, sample, "snapkv:budget=0.2", 24)
    assert (told.choices[0].message.content, told.usage.completion_tokens) == own
    assert told.choices[0].finish_reason == "stop"


def test_a_streamed_answer_is_the_whole_one(client: openai.OpenAI) -> None:
    (sample,) = samples(1)
    asked = {"temperature": 2, "seed": 7, "n": 4, "logprobs": True, "top_logprobs": 2, "max_tokens": 16, **UNSURE}
    whole = ask(client, sample, **asked)
    texts, finishes, tokens = [""] * 4, [None] * 4, [[], [], [], []]
    for chunk in ask(client, sample, stream=True, **asked):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        finishes[choice.index] = choice.finish_reason or finishes[choice.index]
        tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert finishes == [choice.finish_reason for choice in whole.choices]
    assert [[t.token for t in of] for of in tokens] == [[t.token for t in c.logprobs.content] for c in whole.choices]
    assert len(set(texts)) > 1  # each choice is drawn by itself


def test_seeds_repeat_and_differ(client: openai.OpenAI) -> None:
    (sample,) = samples(1)

    def drawn(seed: int | None) -> str:
        return ask(client, sample, temperature=2, seed=seed, max_tokens=12, **UNSURE).choices[0].message.content

    assert drawn(3) == drawn(3)
    assert len({drawn(seed) for seed in range(4)}) > 1
    assert len({drawn(None) for _ in range(4)}) > 1


def test_a_tiny_top_p_is_greedy(client: openai.OpenAI) -> None:
    (sample,) = samples(1)
    greedy = ask(client, sample).choices[0].message.content
    assert ask(client, sample, temperature=2, top_p=1e-6).choices[0].message.content == greedy


def test_stop_ends_a_reply_and_is_no_part_of_it(client: openai.OpenAI) -> None:
    (sample,) = samples(1, task="text_needle")
    whole = ask(client, sample).choices[0].message.content
    first, second = whole.split()[:2]
    for streamed in (False, True):
        stop = [f"{first} {second}"[2:], "never said"]
        told = ask(client, sample, stop=stop, stream=streamed)
        if streamed:
            parts = [chunk.choices[0] for chunk in told]
            text, finish = "".join(part.delta.content or "" for part in parts), parts[-1].finish_reason
        else:
            text, finish = told.choices[0].message.content, told.choices[0].finish_reason
        assert (text, finish) == (whole[: whole.index(stop[0])], "stop")


def test_logprobs_are_those_of_the_model(client: openai.OpenAI, lab_model: tuple[Any, Any]) -> None:
    (sample,) = samples(1)
    method = "snapkv:budget=0.3"
    told = ask(
        client, sample, logprobs=True, top_logprobs=3, extra_body={"kvweave": {"method": "snapkv", "budget": 0.3}}
    )
    model, processor = lab_model
    inputs = models.encode(processor, sample.messages())
    with torch.inference_mode(), kvweave.compress(model, kvweave.parse_method(method)):
        out = model.generate(
            **inputs, max_new_tokens=24, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    for logits, entry in zip(out.logits, told.choices[0].logprobs.content, strict=False):
        values = logits[0].log_softmax(-1)
        top = values.topk(3)
        assert entry.logprob == pytest.approx(float(top.values[0]), abs=1e-3)
        assert [one.token for one in entry.top_logprobs] == [processor.tokenizer.decode([i]) for i in top.indices]
    said = [entry.token for entry in told.choices[0].logprobs.content]
    assert [token for token in said if token not in processor.tokenizer.all_special_tokens] == (
        told.choices[0].message.content.split()
    )


def test_usage_counts_tokens_and_not_slots(client: openai.OpenAI, lab_model: tuple[Any, Any]) -> None:
    (sample,) = samples(1, images=6)
    length = models.encode(lab_model[1], sample.messages())["input_ids"].shape[1]
    told = ask(client, sample, max_tokens=3)
    assert told.usage.prompt_tokens == length
    assert told.usage.completion_tokens == 3
    assert told.usage.total_tokens == length + 3
    assert told.kvweave["prompt_bytes"] == length * 2048
    assert told.kvweave["kept_bytes"] == int(0.2 * length) * 2048
    assert told.kvweave["decoded"] == "together"
    assert told.choices[0].finish_reason == "length"


def test_methods_say_why_they_decode_alone(client: openai.OpenAI) -> None:
    (sample,) = samples(1)
    for method, why in {
        "flowmm:mass_bias=true": "entries have a bias",
        "adakv": "heads keep different counts",
        "pyramidkv": "layers keep different counts",
        "quantized:method=snapkv": "entries are packed in few bits",
    }.items():
        told = ask(client, sample, extra_body={"kvweave": {"method": method}})
        assert told.kvweave["decoded"] == f"alone: {why}"


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_that_ends_before_its_cut_says_so(client: openai.OpenAI, stream: bool) -> None:
    """The default waits for eight tokens: of a reply of no more the whole prompt was held."""
    (sample,) = samples(1)
    own = {"method": DEFAULT_METHOD, "ignore_eos": True}
    for tokens, decoded in ((8, "alone: the reply ended before its cut"), (9, "together")):
        told = ask(client, sample, max_tokens=tokens, stream=stream, extra_body={"kvweave": own})
        said = [chunk.kvweave for chunk in told if hasattr(chunk, "kvweave")][-1] if stream else told.kvweave
        assert said["decoded"] == decoded
        assert (said["kept_bytes"] == said["prompt_bytes"]) is (decoded != "together")


def test_what_is_kept_can_be_traced(client: openai.OpenAI) -> None:
    (sample,) = samples(1, images=3)
    for method, budget in (("snapkv", 0.25), ("h2o:defer=3", 0.25), ("full", None)):
        own = {"method": method, "trace": True} | ({} if budget is None else {"budget": budget})
        told = ask(client, sample, max_tokens=8, extra_body={"kvweave": own})
        tokens, images = told.kvweave["tokens"], told.kvweave["images"]
        assert len(tokens) == told.usage.prompt_tokens
        kept = sum(token["kept"] for token in tokens)
        assert kept == pytest.approx(len(tokens) if budget is None else int(budget * len(tokens)), abs=0.1)
        assert [(image["rows"], image["columns"]) for image in images] == [(5, 5)] * 3
        assert all(tokens[place]["text"] == "" for image in images for place in image["tokens"])


def test_models_health_and_metrics(client: openai.OpenAI, running: Running) -> None:
    (told,) = client.models.list().data
    assert told.id == "lab"
    assert told.kvweave["methods"] == list(METHODS)
    assert client.models.retrieve("lab").id == "lab"
    assert httpx2.get(f"{running.url}/health").status_code == 200
    (sample,) = samples(1)
    before = metrics(running)
    ask(client, sample)
    after = metrics(running)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown('kvweave_requests_total{path="/v1/chat/completions",status="200"}') == 1
    assert grown("kvweave_prompt_tokens_total") > 50
    assert grown("kvweave_kept_bytes_total") / grown("kvweave_prompt_bytes_total") == pytest.approx(0.2, abs=0.01)
    assert grown("kvweave_tokens_total") >= 2
    assert grown("kvweave_prefill_seconds_count") == grown("kvweave_first_token_seconds_count") == 1
    assert after["kvweave_queue"] == 0


def test_memory_comes_back(client: openai.OpenAI, running: Running) -> None:
    for sample in samples(4):
        ask(client, sample)
    assert settled(running, kvweave_kv_bytes=0, kvweave_requests_open=0, kvweave_rows_together=0)


@pytest.mark.parametrize("more", [{"temperature": 0}, {"seed": 7}, {"seed": 7, "n": 3, "stop": ["9"]}])
@pytest.mark.parametrize("method", ["snapkv", "h2o:defer=3", "weave"])
def test_a_reply_goes_on_from_tokens_that_are_known(client: openai.OpenAI, method: str, more: dict[str, Any]) -> None:
    """Whatever was known of it: text, reason and tokens are those of the whole reply."""
    (sample,) = samples(1, task="lookup")

    def asked(**own: Any) -> Any:
        return client.chat.completions.create(
            model="lab",
            messages=openai_messages(sample),
            max_tokens=12,
            **more,
            extra_body={"kvweave": {"method": method, "return_token_ids": True, "ignore_eos": True, **own}},
        )

    whole = asked().choices
    assert all(choice.token_ids for choice in whole)
    for count in (1, 4, 12):
        known = [choice.token_ids[:count] for choice in whole]
        for told, right in zip(asked(known_token_ids=known).choices, whole, strict=True):
            assert (told.message.content, told.finish_reason, told.token_ids) == (
                right.message.content,
                right.finish_reason,
                right.token_ids,
            )


def test_known_tokens_are_taken_as_they_are(client: openai.OpenAI) -> None:
    (sample,) = samples(1, task="lookup")
    told = client.chat.completions.create(
        model="lab",
        messages=openai_messages(sample),
        max_tokens=4,
        temperature=0,
        stream=True,
        extra_body={"kvweave": {"known_token_ids": [[30, 31, 32]], "return_token_ids": True, "ignore_eos": True}},
    )
    assert [chunk.choices[0].token_ids[0] for chunk in told][:3] == [30, 31, 32]
