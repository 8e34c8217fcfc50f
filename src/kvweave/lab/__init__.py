"""The embedded model: a vision-language model of 0.9 million parameters that the project trains itself.

Small enough to ship, large enough to have learnt real attention over text and pictures, so that compression
has something to lose. It loads through the code that loads a checkpoint from a hub, and needs no network::

    import kvweave.lab  # AutoProcessor now finds the lab's processor
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(kvweave.lab.weights_path())
    processor = AutoProcessor.from_pretrained(kvweave.lab.weights_path())
    sample = kvweave.lab.example(images=12)

`world` says what it sees, `model` what it is, `train` how it learnt; `kvweave.evals.tasks.lab_score`: how well it
answers.
"""

from pathlib import Path

from kvweave.lab.processor import LabProcessor, register
from kvweave.lab.world import (
    ALL_TASKS,
    AUXILIARY,
    LARGE_TASKS,
    TASKS,
    WORLDS,
    Question,
    Sample,
    example,
    parse,
    require_holdout,
    samples,
)

__all__ = [
    "ALL_TASKS",
    "AUXILIARY",
    "LARGE_TASKS",
    "TASKS",
    "LabProcessor",
    "Question",
    "Sample",
    "example",
    "parse",
    "require_holdout",
    "samples",
    "weights_path",
]


def weights_path(world: str = "small") -> Path:
    """The folder of the packaged model of a world, to be given to `from_pretrained`."""
    if world not in WORLDS:
        raise ValueError(f"world={world!r} is not allowed: allowed is one of {', '.join(WORLDS)}")
    return Path(__file__).with_name({"small": "weights", "large": "weights_large"}[world])


register()
