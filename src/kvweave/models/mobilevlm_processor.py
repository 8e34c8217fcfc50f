"""MobileVLM V2's prompts and pictures, as its own code makes them.

A prompt is tokenized in the pieces between its pictures, each as a text of its own: a blank that begins one is kept,
which no tokenizer gives the whole string.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerFast
from transformers.image_utils import SizeDict
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from kvweave.models import tokens
from kvweave.models.mobilevlm import MobileVLM, MobileVLMConfig, tower_folder
from kvweave.models.published import require
from kvweave.models.source import ModelError
from kvweave.models.weights import read_json
from kvweave.processor import PictureProcessor

IMAGE = "<image>"
_TEMPLATE = """\
{%- if messages and messages[0].role == 'system' -%}
  {%- set system, turns = messages[0].content, messages[1:] -%}
{%- else -%}
  {%- set system, turns = SYSTEM, messages -%}
{%- endif -%}
{{- (system if system is string else system[0].text) + ' ' -}}
{%- for message in turns -%}
  {{- 'USER: ' if message.role == 'user' else 'ASSISTANT: ' -}}
  {%- set pieces = message.content -%}
  {%- if pieces is string -%}{%- set pieces = [{'type': 'text', 'text': pieces}] -%}{%- endif -%}
  {%- for piece in pieces -%}
    {%- if piece.type == 'image' -%}
      {{- '<image>\\n' -}}
    {%- elif piece.type == 'text' -%}
      {{- piece.text -}}
    {%- else -%}
      {{- raise_exception('MobileVLM reads texts and images, not ' + piece.type) -}}
    {%- endif -%}
  {%- endfor -%}
  {{- ' ' if message.role == 'user' else '</s>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


class MobileVLMImageProcessor(CLIPImageProcessorPil):
    """CLIP's image processor for pictures put on a square of its mean colour."""

    def resize(self, image: np.ndarray, size: SizeDict, **options: Any) -> np.ndarray:
        """Scale [3, height, width] once it is a square of the longer side, the picture in its middle."""
        height, width = image.shape[-2:]
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        square = np.empty((3, side, side), image.dtype)
        square[:] = np.array([int(255 * mean) for mean in self.image_mean], image.dtype)[:, None, None]
        square[:, top : top + height, left : left + width] = image
        return super().resize(square, size, **options)


class MobileVLMProcessor(PictureProcessor):
    """Pictures and text in; `input_ids`, `attention_mask` and `pixel_values` out.

    `AutoProcessor` finds it for a converted folder once `kvweave.models` is imported.

    Attributes:
        image_token: what stands for a picture in a prompt; image_token_id: what stands for each of its tokens.
        image_seq_length: tokens of a picture.
    """

    pictures = MobileVLMImageProcessor
    inputs = ("input_ids", "attention_mask", "pixel_values")

    def __init__(
        self,
        image_processor: MobileVLMImageProcessor,
        tokenizer: PreTrainedTokenizerFast,
        image_seq_length: int,
        chat_template: str | None = None,
    ) -> None:
        self.image_seq_length = image_seq_length
        self.image_token = IMAGE
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        images_kwargs: dict[str, Any] | None = None,
        text_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare prompts for the model.

        `text` is a prompt or several, with one ``<image>`` for each picture; `images` a picture, a list, or a list
        for each prompt. Options of padding go to the tokenizer. Raises ValueError where pictures and placeholders do
        not match, for truncation, and for videos and sound.
        """
        padding = {"padding": False, **kwargs, **(text_kwargs or {})}
        padding.pop("return_mm_token_type_ids", None)  # the model takes none
        if padding.pop("truncation", None):
            raise ValueError("truncation would cut through an image: allowed is none")
        prompts, pictures = self.prompts_and_pictures(text, images, padding)
        rows = [self._row(prompt, add_special_tokens) for prompt in prompts]
        read = self.tokenizer.pad({"input_ids": rows}, **padding)
        pixels = self.image_processor(pictures, **(images_kwargs or {})) if pictures else {}
        return BatchFeature({**read, **pixels}, tensor_type=return_tensors)

    def _row(self, prompt: str, add_special_tokens: bool) -> list[int]:
        """A prompt's tokens: <s>, and its pieces one by one, an image's placeholders between two."""
        row = [self.tokenizer.bos_token_id] if add_special_tokens else []
        for number, piece in enumerate(prompt.split(IMAGE)):
            row += [self.image_token_id] * self.image_seq_length if number else []
            row += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return row


AutoProcessor.register(MobileVLMConfig, MobileVLMProcessor, exist_ok=True)


def processor_of(folder: Path) -> MobileVLMProcessor:
    """The processor of a published folder.

    Raises:
        ModelError: an option or tokenizer files that are not known; one line says which.
    """
    published = read_json(folder / "config.json")
    require(str(folder / "config.json"), published, image_aspect_ratio="pad")
    config = MobileVLM().config(folder, published)
    legacy = read_json(folder / "tokenizer_config.json").get("legacy")
    tokenizer = tokens.sentencepiece_tokenizer(folder, prefix_behind_specials=legacy is not False, appended=(IMAGE,))
    if tokenizer.convert_tokens_to_ids(IMAGE) != config.image_token_id:
        raise ModelError(
            f"{folder}: its tokenizer has {len(tokenizer) - 1} tokens, config.json {config.image_token_id}"
        )
    tower = tower_folder(folder, published["mm_vision_tower"])
    if tower is not None and (tower / "preprocessor_config.json").is_file():
        images = MobileVLMImageProcessor.from_pretrained(tower)
    else:
        side = config.vision_config.image_size
        images = MobileVLMImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return MobileVLMProcessor(
        images, tokenizer, config.image_seq_length, _TEMPLATE.replace("SYSTEM", json.dumps(_SYSTEM))
    )
