"""Models as the command line names them: loaded, given a prompt, and timed."""

from kvweave.chat import PromptError, encode, reads_images
from kvweave.models.generating import Generation, check_compressible, generate
from kvweave.models.loading import LAB, LABS, ModelError, check, load, pick_device

__all__ = [
    "LAB",
    "LABS",
    "Generation",
    "ModelError",
    "PromptError",
    "check",
    "check_compressible",
    "encode",
    "generate",
    "load",
    "pick_device",
    "reads_images",
]
