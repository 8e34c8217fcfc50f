"""Stock vLLM goes on from contexts that kvweave compressed, as kvweave's own cache does: the lab's model, on a CPU.

Its own answers, positions and pictures are kvweave's business: vLLM has the decoder alone, and has seen none of them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import kvweave
import kvweave.lab
from kvweave import models
from kvweave.serve.engines.handoff import request_of
from vllm import LLM, SamplingParams

STEPS = 20
BLOCKS = 32  # of 32 tokens each: too few for all requests at once
METHODS = ("full", "snapkv", "h2o", "flowmm:mass_bias=false")


@dataclass
class Asked:
    """A context, the tokens behind it, and what kvweave's own cache answers."""

    digest: str
    slots: int
    tokens: list[int]
    truth: list[int]
    logprobs: list[float]

    @property
    def request(self):
        return request_of({"digest": self.digest, "slots": self.slots}, self.tokens)

    @property
    def prompt(self):
        return {"prompt_token_ids": self.request["prompt"], "cache_salt": self.request["cache_salt"]}

    def params(self, **other):
        chosen = {"max_tokens": STEPS, "temperature": 0, "ignore_eos": True, "detokenize": False, "logprobs": 0}
        named = {"kv_transfer_params": self.request["kv_transfer_params"] | other.pop("named", {})}
        return SamplingParams(**chosen | other, extra_args=named)


@dataclass
class Served:
    """An engine and what it can be asked."""

    folder: Path
    engine: LLM
    replies: list[Asked]
    questions: list[Asked]
    model: torch.nn.Module

    def answers(self, prompts, params):
        return [out.outputs[0] for out in self.engine.generate(prompts, params, use_tqdm=False)]


def greedy(model, cache, tokens, steps=STEPS):
    """What the model answers to `tokens` over the cache, one step at a time, and log-probabilities."""
    replied, logprobs, fed = [], [], torch.tensor([tokens])
    for _ in range(steps):
        logits = model(input_ids=fed, past_key_values=cache).logits[0, -1].float().log_softmax(-1)
        replied.append(int(logits.argmax()))
        logprobs.append(float(logits.max()))
        fed = torch.tensor([[replied[-1]]])
    return replied, logprobs


def contexts(model, processor, folder):
    """Albums compressed by every method: replies that go on, and several questions to one context."""
    replies, questions = [], []
    for spelling in METHODS:
        budget = {} if spelling == "full" else {"budget": 0.2}
        for sample in kvweave.lab.samples("lookup", 4, 8, 0):
            method = kvweave.parse_method(spelling, **budget)
            inputs, cache = models.encode(processor, sample.messages()), kvweave.CompressedCache(model.config, method)
            first = int(model(**inputs, past_key_values=cache).logits[0, -1].argmax())
            said = cache.export(folder, model, first_token=first)
            cache.freeze()
            replies.append(Asked(said["digest"], said["slots"], [first], *greedy(model, cache, [first])))
            cache.crop(-STEPS)
            for length in (5, 40):
                tokens = torch.randint(9, 130, (length,), generator=torch.Generator().manual_seed(length)).tolist()
                questions.append(Asked(said["digest"], said["slots"], tokens, *greedy(model, cache, tokens)))
                cache.crop(1 - STEPS - length)
    return replies, questions


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "contexts").mkdir()
    model, processor = models.load("lab", dtype="float32")
    with torch.no_grad(), kvweave.attach(model):
        replies, questions = contexts(model, processor, folder / "contexts")
    models.export_decoder(model, folder / "decoder")
    engine = LLM(
        str(folder / "decoder"),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        block_size=32,
        num_gpu_blocks_override=BLOCKS,
        max_num_seqs=32,
        disable_log_stats=False,
        kv_transfer_config={
            "kv_connector": "KvweaveConnector",
            "kv_role": "kv_consumer",
            "kv_connector_module_path": "kvweave.serve.engines.vllm",
            "kv_connector_extra_config": {"root": str(folder / "contexts")},
        },
    )
    return Served(folder, engine, replies, questions, model)


def metric(engine, name):
    return sum(x.value for x in engine.get_metrics() if x.name == f"vllm:{name}")


def test_replies_go_on_as_kvweaves_own_at_once_and_through_preemptions(served):
    asked = served.replies
    for _ in range(2):  # the second time some blocks are in vLLM's prefix cache
        answers = served.answers([x.prompt for x in asked], [x.params() for x in asked])
        assert [list(x.token_ids) for x in answers] == [x.truth for x in asked]
        worst = max(
            abs(next(iter(mine.values())).logprob - theirs)
            for answer, x in zip(answers, asked, strict=True)
            for mine, theirs in zip(answer.logprobs, x.logprobs, strict=True)
        )
        assert worst < 1e-3
    assert metric(served.engine, "num_preemptions") > 0
    assert len({x.digest for x in asked}) == len(asked)


def test_questions_to_one_context_share_it_and_do_not_mix(served):
    asked = served.questions
    answers = served.answers([x.prompt for x in asked], [x.params() for x in asked])
    assert [list(x.token_ids) for x in answers] == [x.truth for x in asked]
    again = asked[-1]
    (out,) = served.engine.generate([again.prompt], [again.params()], use_tqdm=False)
    assert out.num_cached_tokens >= again.slots  # what came from outside counts, and what was there already
    assert list(out.outputs[0].token_ids) == again.truth


def test_requests_without_a_context_run_beside_them(served):
    asked, plain = served.replies[:4], list(range(20, 90))
    prompts = [{"prompt_token_ids": plain}, *(x.prompt for x in asked)]
    params = [SamplingParams(max_tokens=STEPS, temperature=0, ignore_eos=True, detokenize=False)]
    answers = served.answers(prompts, [*params, *(x.params() for x in asked)])
    ids = torch.tensor([plain])
    expected = served.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False,
        eos_token_id=None,
    )[0, 70:].tolist()  # fmt: skip
    assert [list(x.token_ids) for x in answers] == [expected, *(x.truth for x in asked)]


def test_what_is_refused_fails_alone(served):
    """Half of a batch is wrong, each in its own way, the other half is answered."""
    asked, folder = served.replies[:10], served.folder / "contexts"
    prompts, params = [x.prompt for x in asked], [x.params() for x in asked]
    prompts[1] = asked[1].prompt | {"cache_salt": asked[0].digest}
    prompts[2] = {"prompt_token_ids": asked[2].prompt["prompt_token_ids"]}  # no salt
    params[4] = asked[4].params(named={"context": "f" * 64})
    prompts[4] = asked[4].prompt | {"cache_salt": "f" * 64}
    params[5] = asked[5].params(named={"slots": asked[5].slots - 1})
    params[6] = asked[6].params(prompt_logprobs=1)
    served.engine.reset_prefix_cache()
    path = folder / f"{asked[8].digest}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # altered
    wrong = {1, 2, 4, 5, 6, 8}
    answers = served.answers(prompts, params)
    assert {n for n, x in enumerate(answers) if x.finish_reason == "error"} == wrong
    for n, (answer, x) in enumerate(zip(answers, asked, strict=True)):
        assert n in wrong or list(answer.token_ids) == x.truth
        assert n not in wrong or not answer.token_ids
    path.write_bytes(whole)
    answers = served.answers([x.prompt for x in asked], [x.params() for x in asked])
    assert [list(x.token_ids) for x in answers] == [x.truth for x in asked]


def test_contexts_of_another_model_are_refused(served):
    other, processor = models.load("lab", dtype="float32")
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5) if not other.config.tie_word_embeddings else None
        next(iter(other.model.language_model.layers)).self_attn.q_proj.weight.mul_(1.5)
        cache = kvweave.CompressedCache(other.config, kvweave.SnapKV(budget=0.2))
        (sample,) = kvweave.lab.samples("lookup", 1, 8, 0)
        with kvweave.attach(other):
            other(**models.encode(processor, sample.messages()), past_key_values=cache)
        said = cache.export(served.folder / "contexts", other)
    assert json.loads((served.folder / "decoder" / "kvweave.json").read_text())["model"] != said["model"]
    asked = Asked(said["digest"], said["slots"], [20], [], [])
    (answer,) = served.answers([asked.prompt], [asked.params()])
    assert answer.finish_reason == "error"
