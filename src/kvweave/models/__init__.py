"""Models as the command line names them: loaded, given a prompt, and timed."""

from kvweave.models.chat import PromptError, encode, reads_images
from kvweave.models.loading import load, load_tokenizer, pick_device
from kvweave.models.pictures import PictureError, open_picture
from kvweave.models.source import LAB, LABS, ModelError, check, checkpoint_mark

__all__ = [
    "LAB",
    "LABS",
    "ModelError",
    "PictureError",
    "PromptError",
    "check",
    "checkpoint_mark",
    "encode",
    "load",
    "load_tokenizer",
    "open_picture",
    "pick_device",
    "reads_images",
]
