"""One forward pass over a frozen cache says what `kvweave eval` says token by token."""

import pytest
from tiny import text_inputs, text_model

import kvweave
from benchmarks.research.scores import expected, table
from kvweave.evals.answer.answering import Batch, Round, answer, prefill
from kvweave.evals.answer.fidelity import Reference, compared
from kvweave.evals.tasks.tasks import Example


class Words:
    """A processor that writes tokens as numbers."""

    def batch_decode(self, rows, **_):
        return [" ".join(map(str, row)) for row in rows]


@pytest.mark.parametrize("method", ["snapkv", "weave:form=lent,defer=2", "weave:form=spelled"])
def test_a_reply_read_at_once_is_as_near_as_one_read_token_by_token(method):
    model, inputs = text_model(), text_inputs((40, 33))
    batch = Batch([Example(f"{n}", [], "", "") for n in range(2)], inputs, [Round([0, 1], [[], []])])
    shared = prefill(model, batch, 6)
    replies = [[5, 9, 14, 6, 8, 7, 11], [7, 12, 5, 6]]
    logits = expected(model, kvweave.parse_method("full"), batch, replies, shared)
    whole = [Reference.of(reply, 1, rows) for reply, rows in zip(replies, logits, strict=True)]
    cut = kvweave.parse_method(method, budget=0.2)
    steps = answer(model, Words(), cut, batch, 6, shared, references=whole)
    at_once = expected(model, cut, batch, replies, shared)
    for one, reference, rows in zip(steps, whole, at_once, strict=True):
        assert len(rows) == len(reference.tokens) - 1 == one.fidelity.tokens
        assert one.fidelity.kl > 1e-5
        assert compared(reference, [], rows).kl == pytest.approx(one.fidelity.kl, rel=1e-3)


def test_methods_are_held_against_the_first_on_the_same_samples():
    def row(method, sample, kl):
        return {"key": [method, 0.2, sample], "task": "prose", "kl": kl, "tokens": 63}

    rows = [row("a", "1", 0.5), row("a", "2", 0.1), row("b", "1", 0.4), row("b", "2", 0.2), row("b", "3", 9.0)]
    short = row("b", "4", 5.0) | {"tokens": 2}
    lines = table([*rows, short], ["a", "b"], [0.2], "kl").splitlines()
    assert lines[2].split(" | ")[1] == "0.300 (0.300), 2"
    assert "0.400" in lines[3]
    assert "+0.000" in lines[3]
