"""InternVL2.5's prompts and pictures, as its own code makes them.

A picture is cut into tiles of 448 pixels, 12 at most, and followed by the whole of it in one more. transformers has
that arithmetic in the processor of another model of this family; its own for InternVL needs torchvision, and its
template writes no system turn.
"""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast, QianfanOCRProcessor, Qwen2Tokenizer
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from kvweave.models import tokens
from kvweave.models.internvl import CONTEXT, InternVL
from kvweave.models.published import require
from kvweave.models.source import ModelError
from kvweave.models.weights import read_json

SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
_TEMPLATE = """\
{%- if not messages or messages[0].role != 'system' -%}
  {{- '<|im_start|>system\\n' + SYSTEM + '<|im_end|>\\n' -}}
{%- endif -%}
{%- set seen = namespace(images=0) -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' -}}
  {%- set pieces = message.content -%}
  {%- if pieces is string -%}{%- set pieces = [{'type': 'text', 'text': pieces}] -%}{%- endif -%}
  {%- set images = pieces | selectattr('type', 'equalto', 'image') | list | length -%}
  {%- set first = pieces[:images] | selectattr('type', 'equalto', 'image') | list | length -%}
  {%- for piece in pieces -%}
    {%- if piece.type == 'image' -%}
      {%- set seen.images = seen.images + 1 -%}
      {%- if images > 1 and first == images -%}{{- 'Image-' ~ seen.images ~ ': ' -}}{%- endif -%}
      {{- '<image>\\n' -}}
    {%- elif piece.type == 'text' -%}
      {{- piece.text -}}
    {%- else -%}
      {{- raise_exception('InternVL2.5 reads texts and images, not ' + piece.type) -}}
    {%- endif -%}
  {%- endfor -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
_ROLES = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": CONTEXT}


def processor_of(folder: Path) -> QianfanOCRProcessor:
    """The processor of a published folder.

    Raises:
        ModelError: a template, an option or tokenizer files that are not known; one line says which.
    """
    where, published = str(folder / "config.json"), read_json(folder / "config.json")
    require(where, published, template="internvl2_5", use_thumbnail=True, dynamic_image_size=(True, None))
    config = InternVL().config(folder, published)
    tokenizer = _tokenizer(folder, config.text_config.model_type)
    token = tokenizer.convert_tokens_to_ids(CONTEXT)
    if token != config.image_token_id:
        raise ModelError(f"{folder}: {CONTEXT} is token {token} of the tokenizer, {config.image_token_id} elsewhere")
    system = published.get("system_message")
    images = GotOcr2ImageProcessorPil(
        size={"height": config.vision_config.image_size[0], "width": config.vision_config.image_size[1]},
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
        crop_to_patches=True,
        min_patches=published.get("min_dynamic_patch", 1),
        max_patches=published.get("max_dynamic_patch", 6),
    )
    literal = json.dumps(SYSTEM if system is None else system, ensure_ascii=False)
    template = _TEMPLATE.replace("SYSTEM", literal)
    return QianfanOCRProcessor(
        images, tokenizer, config.image_seq_length, template, image_placeholder_token="<image>"
    )


def _tokenizer(folder: Path, language_model: str) -> PreTrainedTokenizerFast:
    """InternLM2's, read from its SentencePiece model, <s> in front; or Qwen2's, which transformers reads right."""
    if language_model == "llama":
        return tokens.sentencepiece_tokenizer(folder, extra_special_tokens=_ROLES)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name} is missing, a part of Qwen2's tokenizer")
    tokenizer = Qwen2Tokenizer.from_pretrained(folder, padding_side="left", extra_special_tokens=_ROLES)
    for content, number in tokens.special_ids(folder).items():
        if tokenizer.convert_tokens_to_ids(content) != number:
            raise ModelError(
                f"{folder}: {content!r} should have id {number}, comes to {tokenizer.convert_tokens_to_ids(content)}"
            )
    return tokenizer
