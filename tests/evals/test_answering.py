"""Answers come out of the compressed cache, whether the question was compressed with it or came later."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import kvweave
from kvweave.evals.answer.answering import answer, prefill, prepare
from kvweave.evals.tasks.tasks import Example, lab_tasks
from kvweave.seam import probing
from kvweave.seam.probes import Probes, read_probes


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Questions of unequal lengths."""
    return [example for task in lab_tasks(["action", "lookup"], 2, 6) for example in task.examples(0)]


def test_seen_prompts_are_compressed_whole(model: Any, processor: Any, examples: list[Example]):
    batch = prepare(processor, examples, "seen")
    for said, lengths in zip(
        answer(model, processor, kvweave.SnapKV(budget=0.2), batch, 6),
        batch.inputs["attention_mask"].sum(1).tolist(),
        strict=True,
    ):
        assert said.length == lengths
        assert said.kept == [int(0.2 * lengths + 1e-9)] * 4


def test_a_context_and_its_question_are_the_prompt(processor: Any, examples: list[Example]):
    whole, batch = prepare(processor, examples, "seen"), prepare(processor, examples, "unseen")
    for row in range(len(examples)):
        real = [
            inputs["input_ids"][row][inputs["attention_mask"][row] == 1] for inputs in (whole.inputs, batch.inputs)
        ]
        question = torch.tensor(batch.rounds[0].questions[row])
        assert torch.equal(torch.cat([real[1], question]), real[0])
        assert processor.decode(question) == examples[row].question
    assert torch.equal(batch.inputs["pixel_values"], whole.inputs["pixel_values"])
    visual = batch.inputs["input_ids"] == processor.image_token_id
    assert torch.equal(batch.inputs["mm_token_type_ids"] == 1, visual)


def test_an_unseen_question_is_never_compressed(model: Any, processor: Any, examples: list[Example]):
    batch = prepare(processor, examples, "unseen")
    for said, length in zip(
        answer(model, processor, kvweave.FlowMM(budget=0.1), batch, 6),
        batch.inputs["attention_mask"].sum(1).tolist(),
        strict=True,
    ):
        assert said.length == length
        assert said.kept == [int(0.1 * length + 1e-9)] * 4


def test_without_compression_the_protocols_agree(model: Any, processor: Any, examples: list[Example]):
    full = kvweave.get_method("full")
    seen, unseen = (
        [said.text for said in answer(model, processor, full, prepare(processor, examples, protocol), 6)]
        for protocol in ("seen", "unseen")
    )
    assert seen == unseen == [example.answer for example in examples]


@pytest.mark.parametrize("protocol", ["seen", "unseen"])
def test_a_batch_answers_as_its_rows_do_alone(model: Any, processor: Any, examples: list[Example], protocol: str):
    method = kvweave.SnapKV(budget=0.15)
    together = answer(model, processor, method, prepare(processor, examples, protocol), 6)
    alone = [answer(model, processor, method, prepare(processor, [one], protocol), 6)[0] for one in examples]
    assert [(said.text, said.kept) for said in together] == [(said.text, said.kept) for said in alone]


def test_an_unseen_question_is_read_as_by_plain_forwards(model: Any, processor: Any, examples: list[Example]):
    method = kvweave.SnapKV(budget=0.3)
    batch = prepare(processor, examples[2:3], "unseen")
    with torch.inference_mode(), kvweave.compress(model, method) as session:
        out = model(**batch.inputs, use_cache=True)
        cache = session.cache
        words = []
        for token in [*batch.rounds[0].questions[0], *[None] * 3]:
            if token is None:
                token = int(out.logits[0, -1].argmax())
                words.append(token)
            out = model(input_ids=torch.tensor([[token]]), past_key_values=cache)
    said = processor.decode(words, skip_special_tokens=True).strip()
    assert said
    assert said == answer(model, processor, method, batch, 3)[0].text


def test_a_question_that_does_not_end_the_prompt_is_refused(processor: Any, examples: list[Example]):
    one = examples[0]
    elsewhere = Example("odd", one.messages, "question: where is it ?", one.answer)
    with pytest.raises(ValueError, match="does not hold its question"):
        prepare(processor, [elsewhere], "unseen")


def test_probes_tell_what_a_context_will_be_asked(model: Any, processor: Any):
    examples = [example for task in lab_tasks(["image_needle"], 8, 6) for example in task.examples(3)]
    batch = prepare(processor, examples, "probed")
    method = kvweave.get_method("weave", budget=0.2, recent=8)
    said = answer(model, processor, method, batch, 6, probed=True)
    assert said == answer(model, processor, method, batch, 6, prefill(model, batch, 6), probed=True)
    plain = answer(model, processor, method, batch, 6)
    right = [sum(one.text == example.answer for one, example in zip(x, examples, strict=True)) for x in (said, plain)]
    assert right[0] > right[1]
    assert [one.kept for one in said] == [one.kept for one in plain]


def test_questions_that_begin_unalike_share_a_context_whatever_the_tokenizer(tmp_path):
    """MobileVLM's puts a blank in front of each text, Qwen2's joins one to the word behind it."""
    from published_folders import write_internvl, write_mobilevlm

    from kvweave.models import encode, processor_from_published

    write_mobilevlm(tmp_path / "mobile")
    write_internvl(tmp_path / "qwen", "qwen2")
    for name in ("mobile", "qwen"):
        processor = processor_from_published(tmp_path / name)
        asked = [
            Example(question, [{"role": "user", "content": [{"type": "text", "text": f"on a mat {question}"}]}],
                    question, "", context="one")
            for question in ("the cat sat", "What is this", "cat")
        ]  # fmt: skip
        batch = prepare(processor, asked, "unseen")
        context = batch.inputs["input_ids"][0].tolist()
        for number, example in enumerate(asked):
            question = batch.rounds[number].questions[0]
            assert context + question == encode(processor, example.messages)["input_ids"][0].tolist()
        assert "cat" not in processor.decode(context)


def test_kvzip_gives_its_instruction_in_evaluations(model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch):
    """Its replay is not the user's `probes`, but asks with the same processor."""
    asked: list[Probes] = []
    monkeypatch.setattr(
        probing, "answer_probes", lambda model, cache, probes: asked.append(probes) or cache.cut_waiting()
    )
    example = lab_tasks(["image_needle"], 1)[0].examples(0)[0]
    answer(model, processor, kvweave.get_method("kvzip"), prepare(processor, [example], "unseen"), 4)
    expected = read_probes("replay", processor, 32)
    assert expected.instruction
    assert asked == [expected]


@pytest.mark.parametrize("spelled", ["kvzip:images=true", "weave"])
def test_images_of_a_shared_prefill_are_said_again(model: Any, processor: Any, examples: list[Example], spelled: str):
    method, batch = kvweave.parse_method(spelled, budget=0.2), prepare(processor, examples[:2], "unseen")
    alone = answer(model, processor, method, batch, 4)
    shared = prefill(model, batch, 4)
    assert shared.embeddings is not None
    assert answer(model, processor, method, batch, 4, shared) == alone
    blind = replace(shared, embeddings=torch.zeros_like(shared.embeddings))
    assert [one.kept for one in answer(model, processor, method, batch, 4, blind)] != [one.kept for one in alone]
