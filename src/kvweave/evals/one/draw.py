"""What a method keeps of the lab's example, as a picture: `kvweave methods flowmm:theta=0.3 --draw`."""

import shlex
from pathlib import Path

from kvweave import lab, models
from kvweave.evals.one.collect import Subject, compare
from kvweave.methods import Method
from kvweave.report.data import Run
from kvweave.report.picture import png


def draw(method: Method, folder: Path) -> tuple[Run, Path]:
    """Let the method answer the lab's example, and write its picture into `folder`."""
    run = example(method)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{run.answers[0].name}.png"
    png(run).save(path, optimize=True)
    return run, path


def example(method: Method) -> Run:
    """The lab's example, answered with the full cache and with one method."""
    model, processor = models.load()
    sample = lab.example(images=12, task="image_needle")
    inputs = models.encode(processor, sample.messages())
    subject = Subject("lab", model, processor, inputs, sample.images, sample.question, sample.answer)
    return compare(subject, [method], 8, 1, shlex.join(["kvweave", "run", "--method", method.spelling()]))
