"""What the albums hold, and that every answer can be read off them."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import pytest

from kvweave.lab import ALL_TASKS, AUXILIARY, TASKS, example, require_holdout, samples, words
from kvweave.lab.draw import CELL, CELLS, EMPTY, GRID, ROBOT, SIDE, describe, object_code, render
from kvweave.lab.world import FRAMES, WORLDS, Albums, World, generator, layout


def albums_and_questions(task: str, images: int = 8, count: int = 64, **world: object):
    rng = np.random.default_rng(11)
    needs = {"change": "pair", "action": "walk"}.get(task)
    options = World(**world)
    albums = Albums(count, layout(images, rng, options, needs), rng, options)
    for row in range(count):
        question = albums.question(row, task, rng)
        labels = albums.labels(row)
        image = next((labels.index(word) for word in question.text.split() if word in labels), None)
        yield albums, row, question, image


def seen(albums: Albums, row: int, cell: tuple[int, int, int]) -> str:
    image, line, column = cell
    return describe(int(albums.cells[row, image, line * albums.grid + column]))


@pytest.mark.parametrize("grid", [GRID, 2 * GRID])
class TestAnswersCanBeReadOff:
    def test_text_needle(self, grid: int):
        for albums, row, question, _ in albums_and_questions("text_needle", grid=grid):
            (image,) = question.passages
            passage = " ".join(words.VOCABULARY[token] for token in albums.passages[row, image])
            animal = question.text.split()[-2]
            assert passage == f"code of {animal} is {question.answer}"

    def test_image_needle(self, grid: int):
        for albums, row, question, image in albums_and_questions("image_needle", grid=grid):
            (cell,) = question.cells
            assert cell[0] == image
            assert seen(albums, row, cell) == question.answer

    def test_lookup(self, grid: int):
        for albums, row, question, image in albums_and_questions("lookup", grid=grid):
            (cell,) = question.cells
            shape = question.text.split()[4]
            assert cell[0] == image
            assert seen(albums, row, cell) == f"{question.answer} {shape}"
            shown = [describe(int(code)) for code in albums.cells[row, image]]
            assert sum(name.endswith(f" {shape}") for name in shown) == 1, "the shape must name one object"

    def test_change(self, grid: int):
        kinds = set()
        for albums, row, question, image in albums_and_questions("change", grid=grid):
            before, after = (seen(albums, row, cell) for cell in question.cells)
            assert [cell[0] for cell in question.cells] == [image - 1, image]
            differs = np.flatnonzero(albums.cells[row, image - 1] != albums.cells[row, image])
            _, line, column = question.cells[0]
            assert differs.tolist() == [line * albums.grid + column]
            *_, last = question.answer.split()
            kinds.add(last if last in ("added", "removed") else "turned")
            if last == "added":
                assert (before, f"{after} added") == ("", question.answer)
            elif last == "removed":
                assert (f"{before} removed", after) == (question.answer, "")
            else:
                shape, _, colour = question.answer.split()
                assert after == f"{colour} {shape}"
                assert before.endswith(f" {shape}")
                assert before != after
        assert kinds == {"added", "removed", "turned"}

    def test_action(self, grid: int):
        steps = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
        for albums, row, question, _ in albums_and_questions("action", grid=grid):
            assert all(seen(albums, row, cell) == "robot" for cell in question.cells)
            assert (albums.cells[row] == ROBOT).sum() == FRAMES["walk"]
            path = [(line, column) for _, line, column in question.cells]
            walked = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(path)]
            assert walked == [steps[word] for word in question.answer.split()]

    def test_listing(self, grid: int):
        for albums, row, question, image in albums_and_questions("listing", grid=grid):
            assert question.answer == " ".join(describe(int(code)) for code in albums.cells[row, image] if code)

    def test_two_images(self, grid: int):
        for albums, row, question, first in albums_and_questions("two_images", grid=grid):
            one, other = question.cells
            assert one[0] == first != other[0]
            assert question.text.split()[-2] == albums.labels(row)[other[0]]
            shape = question.text.split()[4]
            colours = question.answer.split()
            assert [seen(albums, row, cell) for cell in (one, other)] == [f"{colour} {shape}" for colour in colours]


@pytest.mark.parametrize("images", [3, 4, 5, 12])
@pytest.mark.parametrize("task", [*ALL_TASKS, *AUXILIARY, "large:change", "large:listing", "large:two_images"])
def test_every_length_has_every_task(task: str, images: int):
    for sample in samples(task, 2, images):
        assert len(sample.images) == images
        assert sample.question.startswith("question: ")
        assert sample.question.endswith(" ?")
        assert sample.cells or sample.passages
        assert all(0 <= image < images for image, _, _ in sample.cells)


def test_large_pictures_hold_as_few_things():
    rng = np.random.default_rng(0)
    albums = Albums(64, layout(8, rng), rng, WORLDS["large"])
    things = (albums.cells != EMPTY).sum(-1)
    assert albums.cells.shape[-1] == 100
    assert (things >= 3).all()
    assert (things <= 6).all()
    assert things.mean() < 6


class TestSeeds:
    def test_the_same_seed_gives_the_same_sample(self):
        one, two = (samples("change", 3, 5, seed=4) for _ in range(2))
        assert [s.answer for s in one] == [s.answer for s in two]
        for a, b in zip(one, two, strict=True):
            assert [p if isinstance(p, str) else p.tobytes() for p in a.content] == [
                p if isinstance(p, str) else p.tobytes() for p in b.content
            ]

    def test_the_first_samples_do_not_depend_on_how_many_are_drawn(self):
        few, many = samples("lookup", 2, 4), samples("lookup", 5, 4)
        assert [s.images[0].tobytes() for s in few] == [s.images[0].tobytes() for s in many[:2]]

    def test_seeds_tasks_and_indices_differ(self):
        asked = (samples(task, 3, 4, seed) for seed in (0, 1) for task in ALL_TASKS)
        pictures = {sample.images[0].tobytes() for some in asked for sample in some}
        assert len(pictures) == 2 * len(ALL_TASKS) * 3

    def test_the_small_world_stays_as_it_was(self):
        """Results that were measured before the large world came hold for the samples of today."""
        digest = hashlib.sha256()
        for task in (*TASKS, *AUXILIARY):
            for images in (3, 8, 12):
                (sample,) = samples(task, 1, images, seed=5)
                pieces = [p if isinstance(p, str) else p.tobytes().hex() for p in sample.content]
                digest.update("".join(pieces).encode())
                digest.update(f"{sample.question} {sample.answer} {sample.evidence}".encode())
        assert digest.hexdigest()[:16] == "2fa940f13e1ee0fe"

    def test_training_and_holdout_share_no_random_numbers(self):
        drawn = [generator(split, 0, 1, 2).integers(2**60, size=4).tolist() for split in ("train", "holdout")]
        assert not set(drawn[0]) & set(drawn[1])
        train, holdout = (samples("large:lookup", 4, 4, split=split) for split in ("train", "holdout"))
        assert {s.images[0].tobytes() for s in train}.isdisjoint(s.images[0].tobytes() for s in holdout)

    def test_evaluation_refuses_training_samples(self):
        require_holdout(samples("lookup", 2, 3))
        with pytest.raises(ValueError, match="'train'"):
            require_holdout(samples("lookup", 2, 3, split="train"))


class TestPictures:
    def test_they_are_ordinary_images(self):
        picture = example(images=3).images[0]
        assert (picture.mode, picture.size) == ("RGB", (SIDE, SIDE))

    def test_each_cell_shows_its_own_code(self):
        codes = np.zeros((2, CELLS), np.int64)
        codes[1, 7] = object_code(np.array(3), np.array(0))
        before, after = render(codes, np.random.default_rng(0)).astype(int)
        cells = abs(after - before).reshape(GRID, CELL, GRID, CELL, 3).mean((1, 3, 4)).ravel()
        assert cells.argmax() == 7
        assert np.delete(cells, 7).max() < 12, "elsewhere only grain may differ"

    def test_frames_tell_cells_apart(self):
        blank = np.zeros(CELLS, np.int64)
        framed, plain = (
            render(blank, np.random.default_rng(0), frames=frames).astype(int) for frames in (True, False)
        )
        assert abs(framed[0] - plain[0]).max() > 100
        assert abs(framed[5:11, 5:11] - plain[5:11, 5:11]).max() == 0


class TestRefusals:
    @pytest.mark.parametrize("task", ["juggling", "large:juggling", "huge:lookup"])
    def test_unknown_task(self, task: str):
        with pytest.raises(ValueError, match="large:text_needle"):
            samples(task, 1)

    def test_two_pictures_may_share_no_shape(self):
        rng = np.random.default_rng(0)
        with pytest.raises(ValueError, match="'two_images' asks about a third image"):
            Albums(1, ("pair",), rng).question(0, "two_images", rng)

    @pytest.mark.parametrize("images", [0, 13])
    def test_albums_that_are_too_short_or_too_long(self, images: int):
        with pytest.raises(ValueError, match="1 to 12"):
            samples("lookup", 1, images)

    def test_no_room_for_a_walk(self):
        with pytest.raises(ValueError, match="walk takes 3 images"):
            samples("action", 1, 2)

    def test_nothing_to_ask_about(self):
        rng = np.random.default_rng(0)
        with pytest.raises(ValueError, match="'action' asks about a walk"):
            Albums(1, ("single",), rng).question(0, "action", rng)

    @pytest.mark.parametrize("code", [-1, 1000])
    def test_cells_hold_known_things(self, code: int):
        with pytest.raises(ValueError, match="a cell holds"):
            describe(code)
