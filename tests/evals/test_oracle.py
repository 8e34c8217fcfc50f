"""One prefill serves all methods, and the oracle knows what the answer with the full cache attends to."""

from functools import partial
from typing import Any

import pytest
import tiny
import torch

import kvweave
from kvweave.evals.answer.answering import Batch, answer, prefill, prepare
from kvweave.evals.answer.oracle import Oracle, paid_attention
from kvweave.evals.answer.prefill import Prefill
from kvweave.evals.tasks.tasks import lab_tasks

PROTOCOLS = ("seen", "unseen")


@pytest.fixture(scope="module", params=PROTOCOLS)
def batch(request: pytest.FixtureRequest, processor: Any) -> Batch:
    """Questions of unequal lengths, whose answers have unequal lengths."""
    examples = [example for task in lab_tasks(["lookup", "change"], 2, 4) for example in task.examples(0)]
    return prepare(processor, examples, request.param)


@pytest.fixture(scope="module")
def shared(model: Any, batch: Batch) -> Prefill:
    return prefill(model, batch, 6)


@pytest.mark.parametrize("name", [*kvweave.list_methods(), "flowmm:rope_aware=true"])
def test_a_shared_prefill_changes_nothing(model: Any, processor: Any, batch: Batch, shared: Prefill, name: str):
    method = kvweave.parse_method(name, budget=0.2)
    alone = answer(model, processor, method, batch, 6)
    assert answer(model, processor, method, batch, 6, shared) == alone
    assert "forward" not in vars(model)


@pytest.mark.parametrize(("kind", "other"), [("llama", None), ("gemma3_text", "sliding"), ("qwen3_next", "linear")])
def test_it_can_be_replayed_on_other_architectures(kind: str, other: str | None):
    special = {"layer_types": [f"{other}_attention", "full_attention"]} if other else {}
    model = tiny.text_model(kind, **special)
    inputs = tiny.text_inputs((24, 17), images=())
    say = partial(model.generate, **inputs, max_new_tokens=5, do_sample=False)
    method = kvweave.get_method("h2o", budget=0.3)
    with torch.inference_mode():
        shared = Prefill.recorded(model, say)
        assert torch.equal(shared.tokens, say())
        with kvweave.compress(model, method) as plain:
            expected = say()
        with kvweave.compress(model, method) as session, shared.replayed(model):
            assert torch.equal(say(), expected)
    assert session.report == plain.report


def test_paid_attention_is_what_eager_attention_shows(model: Any, batch: Batch, shared: Prefill):
    ends = torch.tensor([model.generation_config.eos_token_id]).view(-1)
    start, fed = shared.start, shared.tokens[:, shared.start :]
    paid = paid_attention(shared, ends)
    steps = fed.shape[1] - 1
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            mask = torch.cat([batch.inputs["attention_mask"], torch.ones_like(fed)], 1)
            kinds = torch.cat([batch.inputs["mm_token_type_ids"], torch.zeros_like(fed)], 1)
            whole = dict(batch.inputs) | {
                "input_ids": shared.tokens,
                "attention_mask": mask,
                "mm_token_type_ids": kinds,
            }
            attentions = model(**whole, output_attentions=True).attentions  # [batch, heads, rows, columns] a layer
    finally:
        model.set_attn_implementation("sdpa")
    for layer, seen in enumerate(attentions):
        for row in range(len(fed)):
            going = [bool((~torch.isin(fed[row, : n + 1], ends)).all()) for n in range(steps)]
            for head in range(2):
                group = seen[row, 2 * head : 2 * head + 2, start : start + steps, :start]
                expected = torch.stack([group[:, n].amax(0) for n in range(steps) if going[n]]).amax(0)
                torch.testing.assert_close(paid[layer][row, head], expected, rtol=1e-4, atol=1e-5)


def test_the_oracle_keeps_what_is_paid_most(model: Any, processor: Any, batch: Batch, shared: Prefill):
    said = answer(model, processor, Oracle(budget=0.2), batch, 6, shared)
    assert said == answer(model, processor, Oracle(budget=0.2), batch, 6)
    for each in said:
        assert each.kept == [int(0.2 * each.length + 1e-9)] * 4
    right = [one.text == example.answer for one, example in zip(said, batch.examples, strict=True)]
    assert sum(right) >= 3


def test_the_oracle_is_no_method_to_use(model: Any, batch: Batch):
    assert "oracle" not in kvweave.list_methods()
    assert kvweave.parse_method("oracle:budget=0.1") == Oracle(budget=0.1)
    with pytest.raises(ValueError, match="needs the answer beforehand"), kvweave.compress(model, Oracle()):
        model(**batch.inputs)
