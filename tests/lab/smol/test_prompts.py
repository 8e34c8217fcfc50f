"""Packed questions are what each would be alone, and the processor writes what training read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvweave.lab.smol.albums import FAMILIES, TRAIN, album, generator, samples
from kvweave.lab.smol.model import create, load_language
from kvweave.lab.smol.processor import create_processor, load_tokenizer
from kvweave.lab.smol.prompts import CHAT_TEMPLATE, IMAGE, IMAGE_TOKENS, draw_questions, pack
from kvweave.lab.smol.scenes import dress
from kvweave.lab.smol.train import _mask
from kvweave.models.chat import encode


def prompt(tokenizer, captions, question):
    """The tokens of one question, by the tokenizer from the whole text."""
    pieces = []
    for caption in captions:
        pieces += [{"type": "text", "text": caption}, {"type": "image"}, {"type": "text", "text": "\n"}]
    turn = {"role": "user", "content": [*pieces, {"type": "text", "text": question.text}]}
    text = tokenizer.apply_chat_template(
        [turn], chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text.replace(IMAGE, IMAGE * IMAGE_TOKENS), add_special_tokens=False).input_ids


EVENLY = dict.fromkeys(FAMILIES, 1.0)


@pytest.fixture
def packed(tiny_language, noise_pictures):
    tokenizer, rng = load_tokenizer(tiny_language), generator(TRAIN, 0, 0)
    albums = [album(rng, 3) for _ in range(2)]
    questions = draw_questions(albums, 6, EVENLY, rng)
    cells = np.concatenate([made.cells for made in albums])
    return tokenizer, albums, questions, pack(tokenizer, albums, questions, dress(cells, rng))


def test_a_packed_question_reads_as_if_it_were_alone(tiny_language, packed):
    tokenizer, albums, questions, batch = packed
    model = create(load_language(tiny_language)).eval()
    features = torch.randn(2, 3 * IMAGE_TOKENS, model.config.text_config.hidden_size)
    image = model.config.image_token_id

    def states(tokens, seen, **rest):
        embedded = model.get_input_embeddings()(tokens)
        embedded = embedded.masked_scatter((tokens == image)[..., None], seen)
        return model.model.language_model(inputs_embeds=embedded, use_cache=False, **rest).last_hidden_state

    with torch.inference_mode():
        mask = _mask(batch.groups, torch.float32)
        together = states(batch.tokens, features, attention_mask=mask, position_ids=batch.places)
        together, count = together.flatten(0, 1)[batch.behind], 0
        for row, (made, asked) in enumerate(zip(albums, questions, strict=True)):
            for question in asked:
                ask = prompt(tokenizer, made.captions(), question)
                answer = tokenizer(question.answer + "<|im_end|>", add_special_tokens=False).input_ids
                mine = torch.nonzero(batch.owner == count).flatten()
                assert batch.targets[mine].tolist() == answer
                assert FAMILIES[batch.families[count]] == question.family
                alone = states(torch.tensor([ask + answer[:-1]]), features[row])[0, len(ask) - 1 :]
                torch.testing.assert_close(together[mine], alone, atol=1e-5, rtol=1e-4)
                count += 1
    assert count == len(batch.families) > 6


def test_no_question_is_asked_twice(packed):
    _, _, questions, _ = packed
    assert all(len({question.text for question in asked}) == len(asked) for asked in questions)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_processor_gives_the_tokens_that_training_reads(tiny_language, noise_pictures, family):
    processor = create_processor(tiny_language)
    found = samples(family, 2, 5)
    inputs = encode(processor, *(sample.messages() for sample in found))
    assert inputs["pixel_values"].shape == (10, 3, 96, 96)
    for row, sample in enumerate(found):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        assert ids == prompt(processor.tokenizer, sample.captions, sample.question)
