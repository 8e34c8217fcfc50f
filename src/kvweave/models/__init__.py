"""Models: loaded by name or from a published folder, and given a prompt.

Importing it lets transformers' auto classes load what `kvweave convert` writes of MobileVLM V2.
"""

from kvweave.models.chat import PromptError, encode, reads_images
from kvweave.models.decoder import export_decoder
from kvweave.models.loading import load, load_tokenizer, pick_device
from kvweave.models.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration
from kvweave.models.mobilevlm_processor import MobileVLMProcessor
from kvweave.models.pictures import PictureError, open_picture
from kvweave.models.published import from_published, processor_from_published
from kvweave.models.source import LAB, LABS, SMOL, ModelError, check, checkpoint_mark

__all__ = [
    "LAB",
    "LABS",
    "SMOL",
    "MobileVLMConfig",
    "MobileVLMForConditionalGeneration",
    "MobileVLMProcessor",
    "ModelError",
    "PictureError",
    "PromptError",
    "check",
    "checkpoint_mark",
    "encode",
    "export_decoder",
    "from_published",
    "load",
    "load_tokenizer",
    "open_picture",
    "pick_device",
    "processor_from_published",
    "reads_images",
]
