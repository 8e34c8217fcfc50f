"""A language model without eyes is asked by the same path as any other; ten questions about one text or album."""

from __future__ import annotations

import pytest

from kvweave.evals import Evaluation, lab_tasks, run
from kvweave.evals.run.plan import parse_methods
from kvweave.evals.tasks.smol import smol_tasks
from kvweave.evals.tasks.text import text_tasks
from kvweave.lab.smol import FAMILIES, talks


def test_a_tokenizer_is_enough_for_questions_about_texts(tiny_language, tmp_path):
    tasks = text_tasks(["needle", "copy"], 2, 200)
    plan = Evaluation(str(tiny_language), tasks, parse_methods(["snapkv"]), (0.2,), protocols=("seen", "unseen"))
    for result in run(plan, tmp_path, batch=2):
        assert not result["failed"]
        assert len(result["samples"]) == 2
        share = result["cell"]["budget"]
        assert all(set(sample["kept"]) == {int(share * sample["length"])} for sample in result["samples"])


def test_pictures_are_refused_before_any_is_asked_about(tiny_language, tmp_path):
    plan = Evaluation(str(tiny_language), lab_tasks(["lookup"], 1, 6), parse_methods(["snapkv"]), (0.2,))
    with pytest.raises(ValueError, match="reads text only: allowed here is a model that reads images"):
        run(plan, tmp_path)


@pytest.mark.usefixtures("noise_pictures")
def test_ten_questions_about_one_album_are_of_all_families():
    (task,) = smol_tasks(["many"], 20, 5)
    examples = task.examples(3)
    assert len(examples) == 20
    for start in (0, 10):
        talk = examples[start : start + 10]
        assert len({one.context for one in talk}) == 1
        assert len({one.question for one in talk}) == 10
        assert all(one.messages[0]["content"][:-1] == talk[0].messages[0]["content"][:-1] for one in talk)
    assert examples[0].context != examples[10].context
    (same,) = talks(1, 5, 3)
    assert [one.question.text for one in same] == [one.question for one in examples[:10]]
    assert {one.question.family for one in same} == set(FAMILIES)


def test_albums_too_small_for_ten_questions_are_refused():
    with pytest.raises(ValueError, match="images=3 is not allowed for many: allowed is 4 to 20"):
        smol_tasks(["many"], 10, 3)


def test_one_cut_serves_ten_questions(tiny_language, tmp_path):
    plan = Evaluation(
        str(tiny_language), text_tasks(["many"], 10, 200), parse_methods(["snapkv"]), (0.2,), protocols=("unseen",)
    )
    full, cut = run(plan, tmp_path, batch=1)
    assert len(cut["samples"]) == len(full["samples"]) == 10
    assert len({(sample["length"], *sample["kept"]) for sample in cut["samples"]}) == 1
