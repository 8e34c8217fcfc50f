"""transformers' LLaVA processor around SmolLM2's tokenizer: a picture of any size becomes 36 visual tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlavaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from kvweave.lab.smol.prompts import CHAT_TEMPLATE, IMAGE
from kvweave.lab.smol.scenes import PATCH, SIDE


def load_tokenizer(language: Path) -> Any:
    """The language model's tokenizer, with a token for pictures."""
    tokenizer = AutoTokenizer.from_pretrained(language)
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    return tokenizer


def create_processor(language: Path) -> LlavaProcessor:
    """The whole model's, from the language model's folder."""
    pictures = SiglipImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    )
    return LlavaProcessor(
        pictures,
        load_tokenizer(language),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )
