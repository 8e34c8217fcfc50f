"""The seven families of questions about albums of pictograms, for `smol`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from kvweave.evals.tasks.tasks import Example
from kvweave.lab import smol

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
        return 64 if self.name in _LISTS else 24

    @property
    def metrics(self) -> tuple[str, ...]:
        """Word for word; of lists also the words' overlap."""
        return ("exact", "rouge_l") if self.name in _LISTS else ("exact",)

    def examples(self, seed: int) -> list[Example]:
        """`count` questions, each about an album of its own."""
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
        smol.check(name, images)
    return tuple(SmolTask(name, count, images) for name in dict.fromkeys(names))
