"""The lab's processor: a picture becomes 5 x 5 visual tokens, a large one 10 x 10, any known word one token.

transformers' own Qwen2.5-VL processor also reads video and cannot be built without torchvision. This one
reads pictures only, needs nothing but Pillow, and `AutoProcessor` finds it once `kvweave.lab` is imported.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoProcessor,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from kvweave.lab import words
from kvweave.lab.draw import CELL, MERGE, PATCH, SIDE
from kvweave.lab.world import WORLDS
from kvweave.processor import PictureProcessor

if TYPE_CHECKING:
    import numpy as np

_SIZES = {(world.grid * CELL, world.grid * CELL) for world in WORLDS.values()}
IMAGE_TOKEN = words.VOCABULARY[words.IMAGE]

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- set pieces = message.content -%}
  {%- if pieces is string -%}{%- set pieces = [{'type': 'text', 'text': pieces}] -%}{%- endif -%}
  {%- if message.role == 'assistant' -%}{{- ' <a>' -}}{%- endif -%}
  {%- for piece in pieces -%}
    {%- if piece.type == 'image' -%}
      {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
    {%- elif piece.type != 'text' -%}
      {{- raise_exception('the lab model reads texts and images, not ' + piece.type) -}}
    {%- elif message.role == 'user' and loop.last and 'question:' not in piece.text | lower -%}
      {{- ' question: ' + piece.text -}}
    {%- else -%}
      {{- ' ' + piece.text -}}
    {%- endif -%}
  {%- endfor -%}
  {%- if message.role == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
"""


class LabImageProcessor(Qwen2VLImageProcessorPil):
    """Qwen2-VL's image processor for pictures of the lab's worlds: others are scaled to 80 x 80 pixels."""

    def resize(self, image: np.ndarray, size: SizeDict, resample: Any, factor: int, **_: Any) -> np.ndarray:
        """Scale [3, height, width] to [3, 80, 80], whatever its proportions, unless a world has this size."""
        if image.shape[-2:] in _SIZES:
            return image
        return PilBackend.resize(self, image, size=SizeDict(height=SIDE, width=SIDE), resample=resample)


class LabProcessor(PictureProcessor):
    """Pictures and text in, `input_ids`, `mm_token_type_ids`, `pixel_values`, `image_grid_thw` out.

    Attributes:
        default_probes: what the lab model is asked about an album before it is cut, with `probes="default"`.
    """

    pictures = LabImageProcessor
    inputs = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
    default_probes = tuple(f"list image {label} ?" for label in words.LABELS)

    def __init__(
        self,
        image_processor: LabImageProcessor,
        tokenizer: PreTrainedTokenizerFast,
        chat_template: str | None = None,
    ) -> None:
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def create(cls) -> LabProcessor:
        """The processor, made from the lab's vocabulary."""
        return cls(_image_processor(), _tokenizer(), chat_template=CHAT_TEMPLATE)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: str | None = None,
        images_kwargs: dict[str, Any] | None = None,
        text_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare prompts for the model.

        `text` is a prompt or several, with one ``<|image_pad|>`` for each picture; `images` a picture, a
        list, or a list for each prompt. `padding` and the like go to the tokenizer. Raises ValueError where
        pictures and placeholders do not match, and for videos and sound.
        """
        kwargs.pop("return_mm_token_type_ids", None)  # always given
        prompts, pictures = self.prompts_and_pictures(text, images, kwargs)
        pixels, tokens = {}, []
        if pictures:
            pixels = self.image_processor(pictures, return_tensors=return_tensors, **(images_kwargs or {}))
            tokens = [int(rows * columns) // MERGE**2 for _, rows, columns in pixels["image_grid_thw"]]
        each = iter(tokens)
        prompts = [re.sub(re.escape(IMAGE_TOKEN), lambda _: IMAGE_TOKEN * next(each), text) for text in prompts]
        read = self.tokenizer(prompts, **{**kwargs, **(text_kwargs or {})})
        ids = read["input_ids"]
        if sum(row.count(self.image_token_id) for row in ids) != sum(tokens):
            raise ValueError("truncation cut through an image: give fewer images or a longer max_length")
        read["mm_token_type_ids"] = [[int(token == self.image_token_id) for token in row] for row in ids]
        return BatchFeature({**read, **pixels}, tensor_type=return_tensors)


class LabConfig(PreTrainedConfig):
    """A name for `AutoProcessor` to keep the processor by; the model's configuration is Qwen2.5-VL's."""

    model_type = "kvweave_lab"


def register() -> None:
    """Let `AutoProcessor` load a folder that holds the lab's processor."""
    AutoProcessor.register(LabConfig, LabProcessor, exist_ok=True)


def _image_processor() -> LabImageProcessor:
    half = [0.5] * 3  # bytes become [-1, 1]
    return LabImageProcessor(
        patch_size=PATCH, merge_size=MERGE, temporal_patch_size=1, image_mean=half, image_std=half,
        size={"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE},
    )  # fmt: skip


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, however it is capitalised; question marks, full stops and commas stand alone."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(words.TOKEN, unk_token=words.UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(rf"{words.QUESTION}|[?.,]"), behavior="isolated"),
        ]
    )
    pad, bos, eos, *visual = words.SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=words.UNKNOWN,
        additional_special_tokens=[*visual, words.ANSWER],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=4096,
    )
