"""The seven families of questions about albums of pictograms, for `smol`, and *many*: ten questions about one album.

Of the ten every family has one or two; `unseen` asks them on one cut.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from kvweave.evals.tasks.tasks import Example
from kvweave.lab import smol

MANY = "many"
KNOWN = (*smol.FAMILIES, MANY)
_LISTS = ("listing", "caption_to_picture")  # part of the answer may be right


@dataclass(frozen=True)
class SmolTask:
    """One family, on hold-out albums: placements, sizes and grounds that training never showed."""

    name: str
    count: int = 100
    images: int = 8

    @property
    def max_new_tokens(self) -> int:
        """Enough for the longest answer: nine things of three tokens each, and commas."""
        return 64 if self.name in (*_LISTS, MANY) else 24

    @property
    def metrics(self) -> tuple[str, ...]:
        """Word for word; of lists also the words' overlap."""
        return ("exact", "rouge_l") if self.name in _LISTS else ("exact",)

    def examples(self, seed: int) -> list[Example]:
        """`count` questions, each about an album of its own; of *many* ten about each."""
        if self.name == MANY:
            talks = smol.talks(-(-self.count // 10), self.images, seed)
            return [
                Example(one.id, one.messages(), one.question.text, one.question.answer, context=talk[0].id)
                for talk in talks
                for one in talk
            ][: self.count]
        return [
            Example(sample.id, sample.messages(), sample.question.text, sample.question.answer)
            for sample in smol.samples(self.name, self.count, self.images, seed)
        ]

    def to_dict(self) -> dict[str, object]:
        return {"source": "smol", **asdict(self)}


def smol_tasks(names: Sequence[str] = smol.FAMILIES, count: int = 100, images: int = 8) -> tuple[SmolTask, ...]:
    """Tasks by name.

    Raises:
        ValueError: a name, a count or a number of images that is not allowed.
    """
    if count < 1:
        raise ValueError(f"count={count} is not allowed: allowed is an int >= 1")
    if not names:
        raise ValueError(f"tasks is empty: allowed is at least one of {', '.join(smol.FAMILIES)}")
    for name in names:
        if name == MANY:
            smol.talks(0, images)
        else:
            smol.check(name, images)
    return tuple(SmolTask(name, count, images) for name in dict.fromkeys(names))
