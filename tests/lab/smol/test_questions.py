"""A language model without eyes is asked by the same path as any other."""

from __future__ import annotations

import pytest

from kvweave.evals import Evaluation, lab_tasks, run
from kvweave.evals.run.plan import parse_methods
from kvweave.evals.tasks.text import text_tasks


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
