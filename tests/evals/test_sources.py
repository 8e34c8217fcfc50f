"""What models are asked where no data are named: the questions of smol and smol-text, and whose are whose."""

from __future__ import annotations

import pytest

from kvweave.evals.scores.metrics import METRICS
from kvweave.evals.tasks.smol import smol_tasks
from kvweave.evals.tasks.sources import SOURCES, make_tasks, source
from kvweave.evals.tasks.text import DEFAULT_KINDS, KINDS, text_tasks
from kvweave.lab.smol import FAMILIES

TOKENS = 400


def asked(name: str, count: int = 3, seed: int = 0):
    (task,) = text_tasks([name], count, TOKENS)
    return task, task.examples(seed)


@pytest.mark.parametrize("name", KINDS)
def test_texts_are_the_same_for_the_same_seed_only(name):
    _, first = asked(name)
    assert asked(name)[1] == first
    _, other = asked(name, seed=1)
    assert [one.messages for one in other] != [one.messages for one in first]
    assert len({one.id for one in (*first, *other)}) == 6


@pytest.mark.parametrize("name", [kind for kind in KINDS if kind != "prose"])
def test_what_is_asked_for_stands_in_the_text_and_not_in_the_question(name):
    task, examples = asked(name, 8)
    for example in examples:
        context, question = (piece["text"] for piece in example.messages[0]["content"])
        assert question == example.question
        for part in example.answer.split(", ") if name == "several" else [example.answer]:
            assert context.count(part) == 1
            assert part not in question
        assert METRICS[task.metrics[0]](f"It is {example.answer}", example.answer, ()) > 0.7
        assert METRICS[task.metrics[0]]("It is 12.", example.answer, ()) < 0.3


@pytest.mark.parametrize("name", ["needle", "records", "several", "reversed"])
def test_the_answer_belongs_to_the_name_asked_for(name):
    name_last = name == "reversed"
    for example in asked(name, 8)[1]:
        context = example.messages[0]["content"][0]["text"]
        for code in example.answer.split(", "):
            (sentence,) = [part for part in context.split(".") if code in part]
            name = sentence.split(" to " if name_last else " of ")[1].split(" is ")[0]
            assert name in example.question
            assert (sentence.index(name) > sentence.index(code)) == name_last


def test_ten_questions_are_asked_about_one_text():
    _, examples = asked("many", 25)
    texts = [example.messages[0]["content"][0]["text"] for example in examples]
    assert [len({*texts[at : at + 10]}) for at in (0, 10, 20)] == [1, 1, 1]
    assert len({*texts}) == len({example.context for example in examples}) == 3
    assert len({(example.context, example.question) for example in examples}) == 25
    for text, example in zip(texts, examples, strict=True):
        assert f"{example.question.removeprefix('What is t').removesuffix('?')} is {example.answer}." in text


def test_texts_are_about_as_long_as_asked():
    for tokens in (300, 1000):
        for task in text_tasks(["needle", "records", "copy", "prose"], 2, tokens):
            for example in task.examples(0):
                words = len(example.messages[0]["content"][0]["text"].split())
                assert 0.25 * tokens < words < tokens


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(([], 1, 400), "tasks is empty"), ((["sum"], 1, 400), "tasks='sum'"), ((["copy"], 0, 400), "count=0"),
     ((["copy"], 1, 100), "tokens=100"), ((["copy"], 1, 9000), "tokens=9000")],
)  # fmt: skip
def test_texts_that_are_not_allowed_are_refused_by_name(arguments, said):
    with pytest.raises(ValueError, match=said):
        text_tasks(*arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(([], 1, 4), "tasks is empty"), ((["sum"], 1, 4), "family='sum'"), ((["change"], 1, 1), "images=1"),
     ((["lookup"], 0, 4), "count=0")],
)  # fmt: skip
def test_albums_that_are_not_allowed_are_refused_by_name(arguments, said):
    with pytest.raises(ValueError, match=said):
        smol_tasks(*arguments)


def test_a_model_is_asked_what_its_own_world_knows():
    assert source("smol").tasks == FAMILIES
    assert source("smol-text").tasks == DEFAULT_KINDS
    assert source("lab-large").tasks == SOURCES["lab-large"].tasks
    assert source("someone/model") is source("lab")
    assert source("out/smol/model", "smol") is source("smol")
    with pytest.raises(ValueError, match="questions='mine'"):
        source("lab", "mine")


def test_sizes_belong_to_the_source():
    (task,) = make_tasks(source("smol-text"), ["copy"], 3, images=None, tokens=700)
    assert (task.count, task.tokens) == (3, 700)
    tasks = make_tasks(source("smol"), [], None, images=5, tokens=None)
    assert {(task.name, task.images, task.count) for task in tasks} == {(name, 5, 100) for name in FAMILIES}
    with pytest.raises(ValueError, match="images=4 is not of these questions: allowed is tokens"):
        make_tasks(source("smol-text"), [], None, images=4, tokens=None)


def test_parts_of_an_answer_count_by_themselves():
    parts = METRICS["strict_parts"]
    assert parts("The codes are 123 and 456.", "123, 456", ()) == 1
    assert parts("The codes are 123 and 4567.", "123, 456", ()) == 0.5
    assert parts("No.", "123, 456", ()) == 0
