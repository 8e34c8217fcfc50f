"""What albums show, what is asked about them, and what training never sees."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvweave.lab.smol.albums import FAMILIES, PLACES, album, generator, held_out, holdout_albums
from kvweave.lab.smol.nouns import NOUNS
from kvweave.lab.smol.scenes import CELLS, EMPTY

worlds = st.tuples(st.integers(0, 10**6), st.integers(1, 20), st.booleans())


def drawn(seed: int, images: int, holdout: bool):
    rng = generator(seed)
    return album(rng, images, holdout), rng


@given(worlds)
def test_placements_are_kept_apart(world):
    made, _ = drawn(*world)
    for image, place in itertools.product(range(len(made)), range(CELLS)):
        if (noun := made.cells[image, place]) != EMPTY:
            assert held_out(noun, place) == world[2]


@given(worlds)
def test_a_thing_comes_back_only_in_the_images_right_behind(world):
    made, _ = drawn(*world)
    for noun in set(made.cells.flat) - {EMPTY}:
        images, places = np.nonzero(made.cells == noun)
        assert len(set(places)) == 1
        assert images.tolist() == list(range(images[0], images[-1] + 1))
        assert all(image in made.additions for image in images[1:])


@given(worlds)
def test_an_image_with_an_addition_is_the_one_before_and_one_thing_more(world):
    made, _ = drawn(*world)
    for image, noun in made.additions.items():
        differs = np.flatnonzero(made.cells[image] != made.cells[image - 1])
        assert made.cells[image, differs].tolist() == [noun]
        assert made.cells[image - 1, differs].tolist() == [EMPTY]


def things(sentence: str) -> list[str]:
    return [part.split(" ", 1)[1] for part in sentence.removesuffix(".").replace(" and ", ", ").split(", ")]


@pytest.mark.parametrize("family", FAMILIES)
@given(world=worlds)
def test_answers_follow_from_the_album(family, world):
    made, rng = drawn(*world)
    question = made.question(family, rng)
    if question is None:
        return
    captions, words = made.captions(), question.text.removesuffix("?").split()
    answer = question.answer.removesuffix(".").split()[-1]

    def shown(image: int) -> list[str]:
        return [NOUNS[noun] for noun in made.cells[image] if noun != EMPTY]

    def with_city(city: str) -> int:
        (image,) = [n for n, caption in enumerate(captions) if f"taken in {city}" in caption]
        return image

    match family:
        case "text_needle":
            (caption,) = [caption for caption in captions if f"code of the {words[-1]} is" in caption]
            assert f"the code of the {words[-1]} is {answer}" in caption
        case "image_needle":
            assert [n + 1 for n in range(len(made)) if words[-1] in shown(n)] == [int(answer)]
        case "lookup":
            place = PLACES.index(" ".join(words[4 : words.index("of")]))
            assert NOUNS[made.cells[int(words[-1]) - 1, place]] == answer
        case "listing":
            assert things(question.answer.removeprefix("It shows ")) == shown(int(words[3]) - 1)
        case "change":
            image = int(words[-1]) - 1
            assert {answer} == set(shown(image)) - set(shown(image - 1))
        case "picture_to_caption":
            assert [n for n in range(len(made)) if words[6] in shown(n)] == [with_city(answer)]
        case "caption_to_picture":
            assert things(question.answer.removeprefix("It shows ")) == shown(with_city(words[6]))


@pytest.mark.parametrize("family", FAMILIES)
def test_holdout_questions_are_the_same_for_the_same_seed_only(family):
    first, again, other = (holdout_albums(family, 3, 6, seed) for seed in (4, 4, 5))
    assert [question for _, question, _ in first] == [question for _, question, _ in again]
    assert [made.captions() for made, _, _ in first] != [made.captions() for made, _, _ in other]
    assert all(made.holdout and question.family == family for made, question, _ in first)


@pytest.mark.parametrize(
    ("family", "images", "named"),
    [("listing", 0, "images=0"), ("listing", 21, "images=21"), ("change", 1, "images=1"), ("sum", 4, "family='sum'")],
)
def test_what_cannot_be_asked_is_refused_by_name(family, images, named):
    with pytest.raises(ValueError, match=named):
        holdout_albums(family, 1, images)
