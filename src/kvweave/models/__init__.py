"""Models as the command line names them: loaded, given a prompt, and timed."""

from kvweave.models.chat import PromptError, encode, reads_images
from kvweave.models.loading import LAB, LABS, ModelError, check, load, pick_device

__all__ = [
    "LAB",
    "LABS",
    "ModelError",
    "PromptError",
    "check",
    "encode",
    "load",
    "pick_device",
    "reads_images",
]
