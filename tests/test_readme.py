"""The Python in README runs, one block after the other, with the embedded model in the place of a large one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kvweave
import kvweave.lab
from kvweave import models

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture
def names(monkeypatch):
    """What README takes as given."""
    model, processor = models.load("lab")
    monkeypatch.setattr(models, "load", lambda name: (model, processor))
    albums = [kvweave.lab.example(images=images).messages() for images in (3, 2)]
    inputs = models.encode(processor, albums[0])
    question = processor.tokenizer("question: what colour is the circle in image #1 ?", return_tensors="pt")
    pieces = [{"input_ids": torch.randint(5, 50, (1, 300))} for _ in range(4)]
    return {
        "kvweave": kvweave, "model": model, "processor": processor, "inputs": inputs, "context": dict(inputs),
        "messages": albums[0], "conversation": albums[0], "another": albums[1], "ids": question["input_ids"],
        "pieces": pieces,
    }  # fmt: skip


def test_readme_runs_as_it_stands(names):
    assert len(BLOCKS) >= 5
    with torch.no_grad():
        for block in BLOCKS:
            given = dict(names)
            exec(block, given)
            session = given.get("session")
            assert session is None or session.report["totals"]["kept"] > 0


def test_one_import_is_enough_for_what_readme_uses():
    said = (
        "import kvweave; print(kvweave.models.load.__name__, kvweave.lab.example.__name__, kvweave.methods.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["load", "example", "kvweave.methods"]
