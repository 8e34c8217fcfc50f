"""What is drawn agrees with what the cache reports, and the lab's tokens with the lab's pictures."""

import numpy as np
import pytest

from kvweave import lab, models, parse_method
from kvweave.evals.one.collect import Subject, compare
from kvweave.evals.one.draw import example
from kvweave.report import Run

METHODS = ("flowmm", "flowmm:theta=0.45,budget=40", "snapkv", "h2o", "random", "streaming_llm:budget=1.0")


@pytest.fixture(scope="module")
def subject() -> Subject:
    model, processor = models.load()
    sample = lab.example(images=3, task="lookup")
    inputs = models.encode(processor, sample.messages())
    return Subject("lab", model, processor, inputs, sample.images, sample.question, sample.answer)


@pytest.fixture(scope="module")
def run(subject: Subject) -> Run:
    return compare(subject, [parse_method(method) for method in METHODS], 8, 1, "kvweave run")


def test_every_image_has_its_cells(run: Run) -> None:
    assert [(grid.image, grid.rows, grid.columns, grid.known) for grid in run.grids] == [
        (image, 5, 5, True) for image in range(3)
    ]
    assert run.visual == 75
    for grid in run.grids:
        assert all(run.tokens[place].visual for place in grid.tokens)
    assert "".join(token.text for token in run.tokens[-4:]).endswith("?")


@pytest.mark.parametrize("place", range(len(METHODS)), ids=METHODS)
def test_fates_add_up_to_the_report(run: Run, place: int) -> None:
    for layer in run.answers[place].layers:
        assert layer.compressed
        if layer.fate is None:
            assert layer.kept == layer.length
            continue
        fate = np.array(layer.fate)
        own = np.arange(len(run.tokens))
        assert fate.shape[1] == layer.length == len(run.tokens)
        assert round((fate == own).sum(1).mean()) == layer.kept
        assert abs(((fate != own) & (fate >= 0)).sum(1).mean() - layer.merged) <= 1
        for head in fate:
            goals = np.unique(head[head >= 0])
            assert (head[goals] == goals).all()  # whatever is merged, is merged into something kept


def test_the_whole_budget_changes_nothing(run: Run) -> None:
    whole = run.answers[-1]
    assert whole.text == run.full.text
    assert whole.cache_bytes == run.full.cache_bytes


@pytest.mark.parametrize(
    ("method", "said", "share"),
    [
        ("weave:defer=20", "was over before, and nothing was cut", 1.0),
        ("weave:defer=20,redecode=True", "then decodes them again", 0.25),
        ("weave:defer=1", "they stay in the answer", 0.25),
    ],
)
def test_an_answer_that_is_over_before_the_cut_is_said_to_be_whole(
    subject: Subject, method: str, said: str, share: float
) -> None:
    run = compare(subject, [parse_method(method, budget=0.2)], 8, 1, "kvweave run")
    assert [note for note in run.notes if "cuts once" in note and said in note]
    assert run.answers[0].cache_bytes <= share * run.full.cache_bytes
    assert (run.answers[0].cache_bytes == run.full.cache_bytes) is (share == 1)


def test_a_method_draws_itself() -> None:
    assert example(parse_method("snapkv:budget=0.5")).answers[0].layers[0].kept > 100
