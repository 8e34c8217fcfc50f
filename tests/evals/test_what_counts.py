"""What an evaluation counts: an answer's end, each question once, timed rounds, and the code behind a result."""

import copy
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

import kvweave
from kvweave.evals.answer import answering
from kvweave.evals.answer.answering import answer, prepare
from kvweave.evals.paper import timing
from kvweave.evals.run.store import code_mark
from kvweave.evals.tasks.tasks import Example, lab_tasks


@pytest.mark.parametrize("protocol", ["seen", "unseen"])
def test_the_token_that_ends_an_answer_is_part_of_it(model: Any, processor: Any, protocol: str):
    """It comes from the compressed cache like any other: whether a method finds it counts in its fidelity."""
    examples = [example for task in lab_tasks(["action", "change"], 1, 4) for example in task.examples(0)]
    stop = model.generation_config.eos_token_id
    batch, whole = (prepare(processor, examples, name) for name in (protocol, "seen"))
    with torch.inference_mode():
        tokens = model.generate(**whole.inputs, max_new_tokens=6, do_sample=False)
    said = [row[: row.index(stop) + 1] for row in tokens[:, whole.inputs["input_ids"].shape[1] :].tolist()]
    assert len({len(row) for row in said}) == 2
    full = answer(model, processor, kvweave.get_method("full"), batch, 6, refer=True)
    references = [one.reference for one in full]
    assert [reference.tokens for reference in references if reference] == said
    cut = answer(model, processor, kvweave.SnapKV(budget=0.9), batch, 6, references=references)
    behind_the_prompt = 0 if protocol == "unseen" else 1
    assert [one.fidelity.tokens for one in cut if one.fidelity] == [len(row) - behind_the_prompt for row in said]


def two_contexts(processor: Any) -> list[Example]:
    """Two questions about one album, one about another."""
    albums = lab_tasks(["lookup"], 2, 3)[0].examples(0)
    examples = []
    for context, (album, asked) in {"a": (0, 0), "b": (1, 1), "c": (0, 1)}.items():
        messages = copy.deepcopy(albums[album].messages)
        last = messages[-1]["content"][-1]
        last["text"] = last["text"].replace(albums[album].question, albums[asked].question)
        name = "b" if context == "b" else "a"
        examples.append(Example(context, messages, albums[asked].question, albums[asked].answer, context=name))
    return examples


def test_a_row_without_a_further_question_is_asked_again_and_not_heard(
    model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
):
    batch = prepare(processor, two_contexts(processor), "unseen")
    assert [round_.examples for round_ in batch.rounds] == [[0, 1], [2, 1]]
    assert [round_.again for round_ in batch.rounds] == [frozenset(), frozenset({1})]
    rounds = iter(([[11], [12]], [[13], [14]]))

    def replies(talk: Any, questions: list[list[int]], most: int) -> list[list[int]]:
        if not talk.blanks:
            talk._at_the_prompts_end()
        return next(rounds)

    monkeypatch.setattr(answering._Talk, "replies", replies)
    said = answer(model, processor, kvweave.SnapKV(budget=0.5), batch, 2)
    assert [one.text for one in said] == [processor.decode([token]) for token in (11, 12, 13)]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_first_round_is_run_and_not_timed(count: int):
    """It fills caches and compiles: of what it takes nothing may enter the median."""
    turns: dict[str, list[float]] = {"fast": [], "slow": []}
    order = []

    def run(name: str, pace: float) -> float:
        order.append(name)
        took = 1e6 if not turns[name] else pace * len(turns[name]) ** 2
        turns[name].append(took)
        return took

    medians = timing.rounds({"fast": lambda: run("fast", 1.0), "slow": lambda: run("slow", 3.0)}, count)
    assert order == ["fast", "slow"] * (count + 1)
    assert medians == {name: statistics.median(times[1:]) for name, times in turns.items()}
    assert max(medians.values()) < 1e3


def test_results_of_changed_code_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A change of one byte, a file that is renamed, one that is new: each gives another mark."""
    home = tmp_path / "kvweave"
    shutil.copytree(
        Path(kvweave.__file__).parent, home, ignore=shutil.ignore_patterns("weights", "weights_large", "__pycache__")
    )
    here = code_mark()
    monkeypatch.setattr(kvweave, "__file__", str(home / "__init__.py"))
    assert code_mark() == here
    marks = {here}
    for name in ("methods/snapkv.py", "seam/session.py", "ops/merge.py", "view.py", "profiles/smol.json"):
        path = home / name
        text = path.read_bytes()
        path.write_bytes(text + b"\n")
        marks.add(code_mark())
        path.write_bytes(text)
        assert code_mark() == here
    (home / "methods" / "peak.py").rename(home / "methods" / "summit.py")
    marks.add(code_mark())
    (home / "methods" / "new.py").write_bytes(b"")
    marks.add(code_mark())
    assert len(marks) == 8
