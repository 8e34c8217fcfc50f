"""A tiny language model of SmolLM2's kind with a tokenizer of its own, and pictures of noise: no package needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvweave.lab.smol import scenes
from kvweave.lab.smol.albums import CITIES, KEEPERS, PLACES
from kvweave.lab.smol.nouns import NOUNS

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def tiny_language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of 64, words whole, as SmolLM2 has most of them."""
    folder = tmp_path_factory.mktemp("tiny-language")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = " ".join((*NOUNS, *CITIES, *KEEPERS, *PLACES, "What is at the image show taken in It nothing"))
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([words] * 2, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2, pad_token_id=2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def noise_pictures(monkeypatch: pytest.MonkeyPatch) -> Iterator[np.ndarray]:
    """In the pictograms' place."""
    found = np.random.default_rng(0).integers(0, 256, (len(NOUNS), 64, 64, 4), dtype=np.uint8)
    monkeypatch.setattr(scenes, "pictures", lambda: found)
    scenes._bank.cache_clear()
    yield found
    scenes._bank.cache_clear()


def lines(path: Path) -> list[dict[str, Any]]:
    """A log's records."""
    return [json.loads(line) for line in path.read_text().splitlines()]
