"""What a method keeps of the lab's example, as a picture: `python -m kvweave.methods.flowmm theta=0.3`."""

import shlex
import sys
from pathlib import Path

from kvweave import lab, models
from kvweave.methods import parse_method
from kvweave.report.collect import Subject, compare
from kvweave.report.data import Run
from kvweave.report.picture import png


def main(name: str) -> None:
    """Draw the method, with the options that the command line gives, and say where."""
    run = example(":".join([name, *sys.argv[1:]]))
    path = Path("out") / f"{run.answers[0].name}.png"
    path.parent.mkdir(exist_ok=True)
    png(run).save(path, optimize=True)
    answer = run.answers[0]
    print(
        f"{run.question} full cache: {run.full.text}; {answer.method}: {answer.text}; right: {run.right}; see {path}"
    )


def example(spelling: str) -> Run:
    """The lab's example, answered with the full cache and with one method."""
    method = parse_method(spelling)
    model, processor = models.load()
    sample = lab.example(images=12, task="image_needle")
    inputs = models.encode(processor, sample.messages())
    subject = Subject("lab", model, processor, inputs, sample.images, sample.question, sample.answer)
    return compare(subject, [method], 8, 1, shlex.join(["kvweave", "run", "--method", spelling]))
