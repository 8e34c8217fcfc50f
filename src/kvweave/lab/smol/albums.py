"""Albums of pictograms with captions, and seven families of questions about them.

An album has up to twenty images. An image shows two to five things in a 3 x 3 grid, or what the image before it shows
and one thing more. Some captions say where an image was taken, some a code. Answers are sentences whose first words
give nothing away, so what is asked for is read from the cache while it is said, as a real answer is.

One in eight placements (a thing in a place) is held out: training never shows it, hold-out albums show nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL.Image import Image

from kvweave.lab.smol import scenes
from kvweave.lab.smol.nouns import NOUNS
from kvweave.lab.smol.scenes import CELLS, EMPTY

MAX_IMAGES = 20
PLACES = (
    "top left", "top middle", "top right", "middle left", "centre", "middle right", "bottom left", "bottom middle",
    "bottom right",
)  # fmt: skip
_CITIES = """
Paris Rome Tokyo Cairo Lima Oslo Delhi Berlin Madrid Athens Vienna Dublin Moscow Sydney Boston Havana Prague Lisbon
Seoul Nairobi Chicago London Toronto Geneva Naples Dubai Manila Warsaw Zurich Hamburg
"""
_KEEPERS = """
harbour library garden museum office market bakery theatre tower cellar attic garage gallery kitchen workshop archive
laboratory warehouse chapel palace
"""
CITIES = tuple(_CITIES.split())
KEEPERS = tuple(_KEEPERS.split())  # of codes; none of them is a noun that pictures show
TRAIN, HOLDOUT = 0, 1
FEWEST_OF_TALKS, QUESTIONS_OF_TALKS = 4, 10  # images of an album that is asked about many times; how many times


@dataclass(frozen=True)
class Question:
    """What is asked about an album, and the one right answer."""

    family: str
    text: str
    answer: str


@dataclass
class Album:
    """What the images of an album show and their captions say; counted from 0, as the cells are.

    Attributes:
        cells: int [images, 9], the noun in each cell or -1; holdout: which placements and pictures it may have.
        cities: where images were taken; codes: the image whose caption has it and the code, by its keeper;
        additions: what an image shows more than the one before.
    """

    cells: np.ndarray
    holdout: bool
    cities: dict[int, str] = field(default_factory=dict)
    codes: dict[str, tuple[int, int]] = field(default_factory=dict)
    additions: dict[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.cells)

    def captions(self) -> list[str]:
        """What stands before each image."""
        captions = [
            f"Image {n + 1}" + (f", taken in {self.cities[n]}" if n in self.cities else "") for n in range(len(self))
        ]
        for keeper, (n, code) in self.codes.items():
            captions[n] += f"; the code of the {keeper} is {code}"
        return [f"{caption}:" for caption in captions]

    def shown(self, image: int) -> list[str]:
        """The things in an image, row by row."""
        return [NOUNS[noun] for noun in self.cells[image] if noun != EMPTY]

    def unique(self, image: int) -> list[str]:
        """The things that no other image shows."""
        elsewhere = set(np.delete(self.cells, image, axis=0).flat)
        return [NOUNS[noun] for noun in self.cells[image] if noun != EMPTY and noun not in elsewhere]

    def scenes(self, rng: np.random.Generator) -> scenes.Scenes:
        """The images, before they are drawn."""
        return scenes.dress(self.cells, rng, self.holdout)

    def question(self, family: str, rng: np.random.Generator) -> Question | None:
        """One question of this family; None if there is nothing of the kind in the album."""
        pair = _FAMILIES[family](self, rng)
        return None if pair is None else Question(family, *pair)


@dataclass(frozen=True)
class Sample:
    """A question about a hold-out album, drawn.

    Attributes:
        id: unique over families, seeds and lengths; captions: before each of the images.
    """

    id: str
    captions: Sequence[str]
    images: Sequence[Image]
    question: Question

    def messages(self) -> list[dict[str, Any]]:
        """One turn of the user's, for a processor's chat template."""
        pieces: list[dict[str, Any]] = []
        for caption, image in zip(self.captions, self.images, strict=True):
            pieces += [
                {"type": "text", "text": caption},
                {"type": "image", "image": image},
                {"type": "text", "text": "\n"},
            ]
        return [{"role": "user", "content": [*pieces, {"type": "text", "text": self.question.text}]}]


def generator(*key: int) -> np.random.Generator:
    """Random numbers that follow from a key."""
    return np.random.default_rng(list(key))


def album(rng: np.random.Generator, images: int, holdout: bool = False) -> Album:
    """An album by chance."""
    used: set[int] = set()
    made = Album(np.full((images, CELLS), EMPTY), holdout)
    cities, keepers = list(rng.permutation(CITIES)), list(rng.permutation(KEEPERS))
    for n in range(images):
        free = np.flatnonzero(made.cells[n - 1] == EMPTY) if n else np.empty(0, np.int64)
        if len(free) and rng.random() < 0.35:
            made.cells[n] = made.cells[n - 1]
            place = int(rng.choice(free))
            made.additions[n] = made.cells[n, place] = _thing(place, used, holdout, rng)
        else:
            for place in rng.choice(CELLS, int(rng.integers(2, 6)), replace=False):
                made.cells[n, place] = _thing(int(place), used, holdout, rng)
        if rng.random() < 0.5:
            made.cities[n] = str(cities.pop())
        if rng.random() < 0.25:
            made.codes[str(keepers.pop())] = (n, int(rng.integers(1000, 10000)))
    return made


def samples(family: str, count: int, images: int, seed: int = 0) -> list[Sample]:
    """Hold-out questions of one family, each about an album of its own; the same for the same seed.

    Raises:
        ValueError: an unknown family, or a number of images that no album has.
    """
    return [
        Sample(f"{family}/{images}/{seed}/{n}", made.captions(), scenes.images(made.scenes(rng), rng), question)
        for n, (made, question, rng) in enumerate(holdout_albums(family, count, images, seed))
    ]


def talks(count: int, images: int, seed: int = 0) -> list[list[Sample]]:
    """So many hold-out albums with ten questions each, all families among them; the same for the same seed.

    Raises:
        ValueError: a number of images whose albums hold too little for ten questions, or that no album has.
    """
    if not FEWEST_OF_TALKS <= images <= MAX_IMAGES:
        raise ValueError(f"images={images} is not allowed for many: allowed is {FEWEST_OF_TALKS} to {MAX_IMAGES}")
    return [_talk(n, images, seed) for n in range(count)]


def _talk(number: int, images: int, seed: int) -> list[Sample]:
    rng = generator(HOLDOUT, seed, len(FAMILIES), images, number)
    questions: list[Question] = []
    while len(questions) < QUESTIONS_OF_TALKS or {question.family for question in questions} != set(FAMILIES):
        made = album(rng, images, holdout=True)
        tried = [made.question(family, rng) for family in (*FAMILIES, *FAMILIES)]
        unlike = {question.text: question for question in tried if question is not None}
        questions = list(unlike.values())[:QUESTIONS_OF_TALKS]
    captions, pictures = made.captions(), scenes.images(made.scenes(rng), rng)
    return [
        Sample(f"many/{images}/{seed}/{number}/{n}", captions, pictures, question)
        for n, question in enumerate(questions)
    ]


def holdout_albums(
    family: str, count: int, images: int, seed: int = 0
) -> list[tuple[Album, Question, np.random.Generator]]:
    """Hold-out albums with a question each, and the generator that draws the pictures."""
    check(family, images)
    albums = []
    for n in range(count):
        rng = generator(HOLDOUT, seed, FAMILIES.index(family), images, n)
        question = None
        while question is None:
            made = album(rng, images, holdout=True)
            question = made.question(family, rng)
        albums.append((made, question, rng))
    return albums


def check(family: str, images: int) -> None:
    """Refuse what cannot be asked.

    Raises:
        ValueError: an unknown family, or a number of images that no album has.
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} is unknown: allowed is one of {', '.join(FAMILIES)}")
    fewest = 2 if family == "change" else 1
    if not fewest <= images <= MAX_IMAGES:
        raise ValueError(f"images={images} is not allowed for {family}: allowed is {fewest} to {MAX_IMAGES}")


def held_out(noun: np.ndarray | int, place: int) -> np.ndarray | bool:
    """Whether training never shows this thing in this place."""
    return (np.asarray(noun) * 5 + place) % 8 == 0


def _thing(place: int, used: set[int], holdout: bool, rng: np.random.Generator) -> int:
    while True:
        noun = int(rng.choice(_PLACED[holdout][place]))
        if noun not in used:
            used.add(noun)
            return noun


_PLACED = {
    kind: [np.flatnonzero(held_out(np.arange(len(NOUNS)), place) == kind) for place in range(CELLS)]
    for kind in (False, True)
}


def _a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _and(nouns: Sequence[str]) -> str:
    named = [_a(noun) for noun in nouns]
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"


def _pick(rng: np.random.Generator, items: Sequence[Any]) -> Any:
    return items[int(rng.integers(len(items)))]


_Pair = tuple[str, str] | None


def _text_needle(album: Album, rng: np.random.Generator) -> _Pair:
    if not album.codes:
        return None
    keeper = _pick(rng, list(album.codes))
    return f"What is the code of the {keeper}?", f"The code is {album.codes[keeper][1]}."


def _image_needle(album: Album, rng: np.random.Generator) -> _Pair:
    image = int(rng.integers(len(album)))
    alone = album.unique(image)
    return (f"Which image shows {_a(_pick(rng, alone))}?", f"It is image {image + 1}.") if alone else None


def _lookup(album: Album, rng: np.random.Generator) -> _Pair:
    image = int(rng.integers(len(album)))
    place = int(_pick(rng, np.flatnonzero(album.cells[image] != EMPTY).tolist()))
    noun = NOUNS[album.cells[image, place]]
    return f"What is at the {PLACES[place]} of image {image + 1}?", f"There is {_a(noun)}."


def _listing(album: Album, rng: np.random.Generator) -> _Pair:
    image = int(rng.integers(len(album)))
    return f"What does image {image + 1} show?", f"It shows {_and(album.shown(image))}."


def _change(album: Album, rng: np.random.Generator) -> _Pair:
    if not album.additions:
        return None
    image = _pick(rng, list(album.additions))
    return f"What is new in image {image + 1}?", f"The new thing is {_a(NOUNS[album.additions[image]])}."


def _picture_to_caption(album: Album, rng: np.random.Generator) -> _Pair:
    taken = [(image, noun) for image in album.cities for noun in album.unique(image)]
    if not taken:
        return None
    image, noun = _pick(rng, taken)
    return f"Where was the image with the {noun} taken?", f"It was taken in {album.cities[image]}."


def _caption_to_picture(album: Album, rng: np.random.Generator) -> _Pair:
    if not album.cities:
        return None
    image = _pick(rng, list(album.cities))
    return f"What does the image taken in {album.cities[image]} show?", f"It shows {_and(album.shown(image))}."


_FAMILIES: dict[str, Callable[[Album, np.random.Generator], _Pair]] = {
    "text_needle": _text_needle,
    "image_needle": _image_needle,
    "lookup": _lookup,
    "listing": _listing,
    "change": _change,
    "picture_to_caption": _picture_to_caption,
    "caption_to_picture": _caption_to_picture,
}
FAMILIES = tuple(_FAMILIES)
