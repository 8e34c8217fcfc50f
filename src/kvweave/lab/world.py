"""The lab's worlds: picture albums, and questions that only looking back at them can answer.

An album is a row of pictures (`draw`), each with a label before it and a passage of six words after it::

    image #4 [picture] the old lion sleeps near river image #5 [picture] code of whale is kilo echo ...

Its pictures come in segments: *single* ones, *pairs* that differ in one thing, and *walks* of a robot over
three frames. Five families of questions mirror MileBench's:

================  ==========================================  ========================  ==================
task              question                                    answer                    MileBench
================  ==========================================  ========================  ==================
``text_needle``   what is the code of whale ?                 kilo echo                 TextNeedle...
``image_needle``  what digit is hidden in image #4 ?          blue 7                    ImageNeedle...
``lookup``        what colour is the star in image #4 ?       red                       attribute look-up
``change``        what changed in image #6 ?                  star turned red           Spot-the-Diff
``action``        what did the robot do ?                     up left                   ALFRED
================  ==========================================  ========================  ==================

The *large* world is redundant as photographs are: its pictures have 100 cells instead of 25, with the same few
things on a background that repeats itself, and most passages hold a code. Its tasks are named ``large:lookup``
and so on. It asks for lists and about two images besides::

    large:listing      list image #4 ?                                  blue heart red 7 red star (as one reads)
    large:two_images   what colour is the star in image #2 and image #7 ?     red blue

Of the 890 tokens of eight images 800 are visual; some 40 of these show anything at all (`Sample.background` has
those that do not), and an answer stands in one to six (`Sample.evidence`). Only ``text_needle`` needs text, the
others need pictures alone: one, two (``change``, ``two_images``) or three (``action``). Alike ones surround
whatever is asked about, so that nothing but attention from the question can tell what will be needed.

`TASKS` and `LARGE_TASKS` are what the packaged models answer at least 95 % of with their full cache. The large
world's ``change``, ``listing`` and ``two_images`` are not among them yet (the model's card has the figures):
`samples` draws them, for training.

Every random choice follows from a seed, a split and a world, so that what is evaluated was never trained on.
In the small world ``listing`` is asked in training only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvweave.lab import words
from kvweave.lab.draw import EMPTY, GRID, ROBOT, Pixels, describe, digit_code, object_code, render
from kvweave.lab.words import TOKEN

if TYPE_CHECKING:
    from PIL.Image import Image

TASKS = ("text_needle", "image_needle", "lookup", "change", "action")
AUXILIARY = ("listing",)
FAMILIES = (*TASKS, *AUXILIARY, "two_images")  # numbered in this order: never reorder, only append
_HARD = ("change", "listing", "two_images")  # in the large world: the packaged model answers fewer than 95 % of these
LARGE_TASKS = tuple(f"large:{family}" for family in FAMILIES if family not in _HARD)
ALL_TASKS = (*TASKS, *LARGE_TASKS)
NEEDS = {"change": "pair", "action": "walk"}  # the segment that a question is about

LONGEST = len(words.LABELS)  # images in an album
OBJECTS = 4  # in a picture
PASSAGE = 6  # words after a picture
FRAMES = {"single": 1, "pair": 2, "walk": 3}

Split = Literal["train", "holdout"]
SPLITS: tuple[Split, ...] = ("train", "holdout")
Ints = NDArray[np.int64]

_ROW_STEP = np.array([-1, 1, 0, 0])  # of words.DIRECTIONS
_COLUMN_STEP = np.array([0, 0, -1, 1])
_ADDED, _REMOVED, _TURNED = range(3)
_DIGIT_SHARE = 0.7  # of the segments hide a digit


@dataclass(frozen=True)
class World:
    """How albums are drawn; a curriculum starts with simpler ones."""

    grid: int = GRID  # rows and columns of cells in a picture
    frames: bool = True  # each cell has a border of its own
    needles: int = 2  # passages with a code, in albums that have as many; half of the images if that is more
    walks: float = 0.5  # chance of a walk among 3 to 5 images; longer albums always have one
    pairs: float = 0.5  # chance that the next two images are a pair


WORLDS = {"small": World(), "large": World(grid=2 * GRID, needles=6)}


def slot(grid: int) -> int:
    """Tokens of an image in an album: image #4 <start> cells <end> passage."""
    return 3 + grid * grid + 1 + PASSAGE


@dataclass(frozen=True)
class Question:
    """A question about one album, and where in the album its answer stands."""

    task: str
    text: str
    answer: str
    cells: tuple[tuple[int, int, int], ...] = ()  # (image, row, column)
    passages: tuple[int, ...] = ()  # images whose passage holds the answer


@dataclass(frozen=True)
class Sample:
    """One album with one question: what a user of a vision-language model would send."""

    task: str
    content: tuple[str | Image, ...]
    question: str
    answer: str
    segments: tuple[str, ...]
    cells: tuple[tuple[int, int, int], ...]
    passages: tuple[int, ...]
    empty: tuple[tuple[int, int, int], ...]  # cells that show nothing
    split: Split
    seed: int
    index: int

    @property
    def grid(self) -> int:
        """Rows and columns of cells in its pictures."""
        return WORLDS[parse(self.task)[0]].grid

    @property
    def images(self) -> list[Image]:
        """The album's pictures, in order."""
        return [piece for piece in self.content if not isinstance(piece, str)]

    @property
    def evidence(self) -> list[int]:
        """Where the answer stands: columns of the unpadded prompt's `input_ids`, ascending."""
        size = slot(self.grid)
        passages = [1 + (image + 1) * size - PASSAGE + word for image in self.passages for word in range(PASSAGE)]
        return sorted(self._columns(self.cells) + passages)

    @property
    def background(self) -> list[int]:
        """Visual tokens of cells that show nothing, as columns of the unpadded prompt's `input_ids`."""
        return self._columns(self.empty)

    def _columns(self, cells: Iterable[tuple[int, int, int]]) -> list[int]:
        return [1 + image * slot(self.grid) + 3 + row * self.grid + column for image, row, column in cells]

    def messages(self) -> list[dict[str, Any]]:
        """One user turn for `apply_chat_template`: texts and images interleaved, the question last."""
        pieces = [
            {"type": "text", "text": piece} if isinstance(piece, str) else {"type": "image", "image": piece}
            for piece in (*self.content, self.question)
        ]
        return [{"role": "user", "content": pieces}]


def generator(split: Split, seed: int, *path: int) -> np.random.Generator:
    """The random numbers of one place in one split: no two splits, seeds or paths share any."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), *path)))


def parse(task: str) -> tuple[str, str]:
    """The world and the family that a task names: "lookup" or "large:lookup"; ValueError if there is none."""
    world, _, family = task.rpartition(":")
    world = world or "small"
    if family not in FAMILIES or world not in WORLDS:
        raise ValueError(f"no task {task!r}: choose one of {', '.join((*FAMILIES, *LARGE_TASKS))}")
    return world, family


def samples(task: str, count: int, images: int = 8, seed: int = 0, *, split: Split = "holdout") -> list[Sample]:
    """Questions of one task, each about an album of its own; the first ones do not depend on `count`.

    Raises ValueError for an unknown task, or for a number of images that has no room for it.
    """
    return [_sample(task, images, seed, index, split) for index in range(count)]


def example(images: int = 12, seed: int = 0, task: str = "lookup") -> Sample:
    """One hold-out sample to show."""
    return _sample(task, images, seed, 0, "holdout")


def require_holdout(samples: Iterable[Sample]) -> None:
    """Raise ValueError if any of the samples may have been seen in training."""
    for sample in samples:
        if sample.split != "holdout":
            raise ValueError(
                f"evaluation takes hold-out samples only, and number {sample.index} of {sample.task} "
                f"(seed {sample.seed}) is of the split {sample.split!r}"
            )


def _sample(task: str, images: int, seed: int, index: int, split: Split) -> Sample:
    from PIL import Image

    name, family = parse(task)
    world, place = WORLDS[name], list(WORLDS).index(name)
    rng = generator(split, seed, FAMILIES.index(family), images, index, *[place] * (place > 0))
    segments = layout(images, rng, world, NEEDS.get(family))
    albums = Albums(1, segments, rng, world)
    question = albums.question(0, family, rng)
    pictures = render(albums.cells[0], rng)
    content: list[str | Image.Image] = []
    for label, picture, passage in zip(albums.labels(0), pictures, albums.passages[0], strict=True):
        content += [f"image {label}", Image.fromarray(picture), _text(passage)]
    return Sample(
        task, tuple(content), f"{words.QUESTION} {question.text}", question.answer, segments,
        question.cells, question.passages, albums.empty(0), split, seed, index,
    )  # fmt: skip


def layout(
    images: int, rng: np.random.Generator, world: World | None = None, needs: str | None = None
) -> tuple[str, ...]:
    """Segments that fill an album of so many images; `needs` names one that must be among them."""
    if not 1 <= images <= LONGEST:
        raise ValueError(f"an album has 1 to {LONGEST} images, not {images}")
    if needs and FRAMES[needs] > images:
        raise ValueError(f"a {needs} takes {FRAMES[needs]} images, and the album has {images}")
    world = world or World()
    every_kind = images >= 6
    segments, left = [], images
    room_for_walk = left - (FRAMES["pair"] if needs == "pair" else 0) >= FRAMES["walk"]
    if needs == "walk" or every_kind or (room_for_walk and rng.random() < world.walks):
        segments.append("walk")
        left -= FRAMES["walk"]
    if needs == "pair" or every_kind:
        segments.append("pair")
        left -= FRAMES["pair"]
    while left:
        segments.append("pair" if left >= FRAMES["pair"] and rng.random() < world.pairs else "single")
        left -= FRAMES[segments[-1]]
    return tuple(segments[i] for i in rng.permutation(len(segments)))


class Albums:
    """Albums of one layout, drawn together: what is in each picture and passage, and what can be asked.

    `cells` [count, images, 25 or 100] says what each cell shows, `passages` [count, images, 6] holds token ids.
    """

    def __init__(
        self, count: int, segments: Sequence[str], rng: np.random.Generator, world: World | None = None
    ) -> None:
        world = world or World()
        self.count, self.segments = count, tuple(segments)
        self.images = sum(FRAMES[kind] for kind in segments)
        self._rows = np.arange(count)
        self.grid = world.grid
        each = (count, self.images)
        self.cells = np.full((*each, self.grid**2), EMPTY)
        self._shape, self._colour, self._place = (np.zeros((*each, OBJECTS), np.int64) for _ in range(3))
        self._change: dict[int, _Change] = {}
        self._walk: _Walk | None = None

        first = 0
        for kind in segments:
            {"single": self._draw_single, "pair": self._draw_pair, "walk": self._draw_walk}[kind](first, rng)
            first += FRAMES[kind]
        self._hide_digits(rng)
        self._write_passages(rng, max(world.needles, self.images // 2))
        self._first_label = rng.integers(LONGEST - self.images + 1, size=count)

    def labels(self, row: int) -> list[str]:
        """The labels of one album's images, as #4."""
        first = int(self._first_label[row])
        return list(words.LABELS[first : first + self.images])

    def tokens(self) -> Ints:
        """Everything before the questions, images as placeholders: [count, 1 + images x `slot`]."""
        slots = np.full((self.count, self.images, slot(self.grid)), words.IMAGE)
        slots[..., 0] = TOKEN["image"]
        slots[..., 1] = TOKEN[words.LABELS[0]] + self._first_label[:, None] + np.arange(self.images)
        slots[..., 2] = words.VISION_START
        slots[..., -PASSAGE - 1] = words.VISION_END
        slots[..., -PASSAGE:] = self.passages
        start = np.full((self.count, 1), words.BOS)
        return np.concatenate([start, slots.reshape(self.count, -1)], 1)

    def pictures(self, rng: np.random.Generator, *, frames: bool = True) -> Pixels:
        """The painted images [count, images, side, side, 3]."""
        return render(self.cells, rng, frames=frames)

    def empty(self, row: int) -> tuple[tuple[int, int, int], ...]:
        """The cells of one album that show nothing: (image, row, column)."""
        return tuple(self._cell(image, place) for image, place in np.argwhere(self.cells[row] == EMPTY))

    def answerable(self, task: str) -> bool:
        """Whether these albums have what the task asks about."""
        if task == "two_images":
            return self.images >= 3  # of three pictures, two share a shape
        return task not in NEEDS or NEEDS[task] in self.segments

    def question(self, row: int, task: str, rng: np.random.Generator) -> Question:
        """A question of this task about album `row`; ValueError if the layout has nothing to ask about."""
        if not self.answerable(task):
            needed = NEEDS.get(task, "third image")
            raise ValueError(f"{task!r} asks about a {needed}, and the album has {self.segments}")
        return {
            "text_needle": self._ask_text_needle,
            "image_needle": self._ask_image_needle,
            "lookup": self._ask_lookup,
            "change": self._ask_change,
            "action": self._ask_action,
            "listing": self._ask_listing,
            "two_images": self._ask_two_images,
        }[task](row, rng)

    # ---- drawing

    def _draw_objects(self, image: int, rng: np.random.Generator, taken: Ints | None = None) -> _Extra:
        """Put objects of different shapes into free cells; return one more that is not put anywhere."""
        order = rng.random((self.count, self.grid**2))
        if taken is not None:
            np.put_along_axis(order, taken, np.inf, axis=1)
        place = np.argsort(order, 1)[:, : OBJECTS + 1]
        shape = np.argsort(rng.random((self.count, len(words.SHAPES))), 1)[:, : OBJECTS + 1]
        colour = rng.integers(len(words.COLOURS), size=(self.count, OBJECTS + 1))
        self._place[:, image] = place[:, :OBJECTS]
        self._shape[:, image] = shape[:, :OBJECTS]
        self._colour[:, image] = colour[:, :OBJECTS]
        codes = object_code(shape, colour)
        np.put_along_axis(self.cells[:, image], place[:, :OBJECTS], codes[:, :OBJECTS], axis=1)
        return _Extra(place[:, OBJECTS], shape[:, OBJECTS], colour[:, OBJECTS])

    def _copy_objects(self, source: int, target: int) -> None:
        for values in (self.cells, self._shape, self._colour, self._place):
            values[:, target] = values[:, source]

    def _draw_single(self, first: int, rng: np.random.Generator) -> None:
        self._draw_objects(first, rng)

    def _draw_pair(self, first: int, rng: np.random.Generator) -> None:
        """The second picture repeats the first, but one object comes, goes or changes colour."""
        extra = self._draw_objects(first, rng)
        after = first + 1
        self._copy_objects(first, after)
        kind = rng.integers(3, size=self.count)
        added, removed, turned = kind == _ADDED, kind == _REMOVED, kind == _TURNED
        shape = np.where(added, extra.shape, self._shape[:, first, 0])
        before = np.where(added, extra.colour, self._colour[:, first, 0])
        place = np.where(added, extra.place, self._place[:, first, 0])
        colour = (before + turned * rng.integers(1, len(words.COLOURS), size=self.count)) % len(words.COLOURS)
        self.cells[self._rows, after, place] = np.where(removed, EMPTY, object_code(shape, colour))
        self._colour[turned, after, 0] = colour[turned]
        for values in (self._shape, self._colour, self._place):  # what is gone cannot be asked about
            values[removed, after, 0] = values[removed, after, 1]
        self._change[after] = _Change(kind, shape, colour, place)

    def _draw_walk(self, first: int, rng: np.random.Generator) -> None:
        """Three frames of the same objects; the robot takes two steps to free cells."""
        moves = rng.integers(len(words.DIRECTIONS), size=(self.count, 2))
        path = []
        for step in (_ROW_STEP, _COLUMN_STEP):
            way = np.concatenate([np.zeros((self.count, 1), np.int64), step[moves].cumsum(1)], 1)
            start = rng.integers(-way.min(1), self.grid - way.max(1))
            path.append(start[:, None] + way)
        places = path[0] * self.grid + path[1]  # [count, 3]
        self._draw_objects(first, rng, taken=places)
        for frame in range(1, FRAMES["walk"]):
            self._copy_objects(first, first + frame)
        for frame in range(FRAMES["walk"]):
            self.cells[self._rows, first + frame, places[:, frame]] = ROBOT
        self._walk = _Walk(first, moves, places)

    def _hide_digits(self, rng: np.random.Generator) -> None:
        """Most segments hide a digit, in the same cell of all their frames; one to ask about always does."""
        lengths = [FRAMES[kind] for kind in self.segments]
        starts = np.cumsum([0, *lengths])
        singles = [i for i, kind in enumerate(self.segments) if kind == "single"]
        candidates = np.array(singles or range(len(self.segments)))
        hides = rng.random((self.count, len(self.segments))) < _DIGIT_SHARE
        hides[self._rows, rng.choice(candidates, self.count)] = True
        grid = (self.count, self.images)
        self._digit, self._digit_colour = np.zeros(grid, np.int64), np.zeros(grid, np.int64)
        self._digit_place = np.full(grid, -1)  # -1: none
        self._digit_asked = np.zeros(grid, bool)
        for segment in range(len(self.segments)):
            rows = np.flatnonzero(hides[:, segment])
            frames = slice(starts[segment], starts[segment + 1])
            free = (self.cells[rows, frames] == EMPTY).all(1)
            place = np.where(free, rng.random(free.shape), np.inf).argmin(1)
            digit = rng.integers(len(words.DIGITS), size=len(rows))
            colour = rng.integers(len(words.COLOURS), size=len(rows))
            for image in range(frames.start, frames.stop):
                self.cells[rows, image, place] = digit_code(digit, colour)
                self._digit[rows, image], self._digit_colour[rows, image] = digit, colour
                self._digit_place[rows, image] = place
                self._digit_asked[rows, image] = segment in candidates

    def _write_passages(self, rng: np.random.Generator, needles: int) -> None:
        grid = (self.count, self.images)
        columns = [
            np.full(grid, TOKEN["the"]),
            *(
                TOKEN[kind[0]] + rng.integers(len(kind), size=grid)
                for kind in (words.ADJECTIVES, words.ANIMALS, words.VERBS, words.PREPOSITIONS, words.PLACES)
            ),
        ]
        self.passages = np.stack(columns, -1)
        needles = min(needles, self.images)
        self._needle_image = np.argsort(rng.random(grid), 1)[:, :needles]
        self._needle_animal = np.argsort(rng.random((self.count, len(words.ANIMALS))), 1)[:, :needles]
        self._needle_code = rng.integers(len(words.CODES), size=(self.count, needles, 2))
        code, of, is_ = (np.full((self.count, needles), TOKEN[word]) for word in ("code", "of", "is"))
        animal = TOKEN[words.ANIMALS[0]] + self._needle_animal
        first, second = np.moveaxis(TOKEN[words.CODES[0]] + self._needle_code, -1, 0)
        self.passages[self._rows[:, None], self._needle_image] = np.stack([code, of, animal, is_, first, second], -1)

    # ---- asking

    def _label(self, row: int, image: int) -> str:
        return words.LABELS[int(self._first_label[row]) + image]

    def _ask_text_needle(self, row: int, rng: np.random.Generator) -> Question:
        pick = int(rng.integers(self._needle_image.shape[1]))
        animal = words.ANIMALS[self._needle_animal[row, pick]]
        answer = " ".join(words.CODES[code] for code in self._needle_code[row, pick])
        passages = (int(self._needle_image[row, pick]),)
        return Question("text_needle", f"what is the code of {animal} ?", answer, passages=passages)

    def _ask_image_needle(self, row: int, rng: np.random.Generator) -> Question:
        image = int(rng.choice(np.flatnonzero(self._digit_asked[row])))
        answer = f"{words.COLOURS[self._digit_colour[row, image]]} {words.DIGITS[self._digit[row, image]]}"
        text = f"what digit is hidden in image {self._label(row, image)} ?"
        return Question("image_needle", text, answer, (self._cell(image, self._digit_place[row, image]),))

    def _ask_lookup(self, row: int, rng: np.random.Generator) -> Question:
        image, pick = int(rng.integers(self.images)), int(rng.integers(OBJECTS))
        shape = words.SHAPES[self._shape[row, image, pick]]
        text = f"what colour is the {shape} in image {self._label(row, image)} ?"
        answer = words.COLOURS[self._colour[row, image, pick]]
        return Question("lookup", text, answer, (self._cell(image, self._place[row, image, pick]),))

    def _ask_change(self, row: int, rng: np.random.Generator) -> Question:
        image = int(rng.choice(list(self._change)))
        change = self._change[image]
        shape, colour = words.SHAPES[change.shape[row]], words.COLOURS[change.colour[row]]
        answer = (f"{colour} {shape} added", f"{colour} {shape} removed", f"{shape} turned {colour}")[
            change.kind[row]
        ]
        cells = tuple(self._cell(i, change.place[row]) for i in (image - 1, image))
        return Question("change", f"what changed in image {self._label(row, image)} ?", answer, cells)

    def _ask_action(self, row: int, rng: np.random.Generator) -> Question:
        assert self._walk is not None  # `question` checked
        answer = " ".join(words.DIRECTIONS[move] for move in self._walk.moves[row])
        cells = tuple(self._cell(self._walk.first + i, place) for i, place in enumerate(self._walk.places[row]))
        return Question("action", "what did the robot do ?", answer, cells)

    def _ask_listing(self, row: int, rng: np.random.Generator) -> Question:
        image = int(rng.integers(self.images))
        objects_seen = [(place, describe(int(code))) for place, code in enumerate(self.cells[row, image]) if code]
        answer = " ".join(name for _, name in objects_seen)
        cells = tuple(self._cell(image, place) for place, _ in objects_seen)
        return Question("listing", f"list image {self._label(row, image)} ?", answer, cells)

    def _ask_two_images(self, row: int, rng: np.random.Generator) -> Question:
        """The colours of a shape that two pictures share, each in its own."""
        shapes = self._shape[row]
        pairs = [
            (one, other, shape)
            for one, other in combinations(range(self.images), 2)
            for shape in np.intersect1d(shapes[one], shapes[other])
        ]
        one, other, shape = pairs[rng.integers(len(pairs))]
        objects = [(image, int(np.argmax(shapes[image] == shape))) for image in (one, other)]
        answer = " ".join(words.COLOURS[self._colour[row, image, pick]] for image, pick in objects)
        where = f" {words.AND} ".join(f"image {self._label(row, image)}" for image in (one, other))
        cells = tuple(self._cell(image, self._place[row, image, pick]) for image, pick in objects)
        return Question("two_images", f"what colour is the {words.SHAPES[shape]} in {where} ?", answer, cells)

    def _cell(self, image: int, place: int | np.integer) -> tuple[int, int, int]:
        row, column = divmod(int(place), self.grid)
        return int(image), row, column


@dataclass(frozen=True)
class _Extra:
    """An object for each album: all [count]."""

    place: Ints
    shape: Ints
    colour: Ints


@dataclass(frozen=True)
class _Change:
    """What differs in the second picture of a pair: all [count]; the colour is the new one."""

    kind: Ints
    shape: Ints
    colour: Ints
    place: Ints


@dataclass(frozen=True)
class _Walk:
    """A robot's walk from image `first` on: moves [count, 2], places [count, 3]."""

    first: int
    moves: Ints
    places: Ints


def _text(tokens: Ints) -> str:
    return " ".join(words.VOCABULARY[token] for token in tokens)
