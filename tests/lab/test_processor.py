"""Pictures and words in, the model's inputs out, and both parts through the Auto classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from kvweave.lab import LabProcessor, example, samples, words
from kvweave.lab.draw import CELLS, GRID
from kvweave.lab.model import patches
from kvweave.lab.world import slot


def prepare(processor: Any, messages: Any, **kwargs: Any) -> Any:
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )


def test_an_album_becomes_the_token_layout_that_training_uses(processor: Any):
    sample = example(images=4)
    inputs = prepare(processor, sample.messages())
    question = words.encode(sample.question)
    assert inputs["input_ids"].shape == (1, 1 + 4 * slot(GRID) + len(question))
    assert inputs["input_ids"][0, 0] == words.BOS
    assert inputs["input_ids"][0, -len(question) :].tolist() == question
    assert words.VOCABULARY[inputs["input_ids"][0, -1]] == "?", "the answer's opening is left to the model"
    visual = inputs["input_ids"] == words.IMAGE
    assert visual.sum() == 4 * CELLS
    assert torch.equal(inputs["mm_token_type_ids"], visual.long())
    assert inputs["image_grid_thw"].tolist() == [[1, 10, 10]] * 4
    assert words.TOKEN[words.UNKNOWN] not in inputs["input_ids"]


def test_evidence_points_at_the_answer(processor: Any):
    needle, digit = (samples(task, 1, 6)[0] for task in ("text_needle", "image_needle"))
    ids = prepare(processor, needle.messages())["input_ids"][0]
    passage = processor.decode(ids[needle.evidence])
    assert passage.startswith("code of ")
    assert passage.endswith(needle.answer)
    pixels = prepare(processor, digit.messages())["pixel_values"].unflatten(0, (-1, 4)).clone()
    visual = prepare(processor, digit.messages())["mm_token_type_ids"][0].cumsum(0) - 1
    shown = pixels[visual[digit.evidence]]
    assert shown.median() < -0.9, "a digit stands on black"
    assert len(digit.evidence) == 1


def test_pictures_become_what_training_sees(processor: Any):
    sample = example(images=3)
    inputs = prepare(processor, sample.messages())
    trained_on = patches(torch.from_numpy(np.stack([np.asarray(image) for image in sample.images])))
    torch.testing.assert_close(inputs["pixel_values"], trained_on.flatten(0, 1), atol=1e-6, rtol=0)


def test_large_pictures_keep_their_size_beside_small_ones(processor: Any):
    large, small = samples("large:listing", 1, 3)[0], samples("listing", 1, 2)[0]
    inputs = prepare(processor, [large.messages(), small.messages()], processor_kwargs={"padding": True})
    assert inputs["image_grid_thw"].tolist() == [[1, 20, 20]] * 3 + [[1, 10, 10]] * 2
    assert (inputs["input_ids"] == words.IMAGE).sum(1).tolist() == [300, 50]
    question = len(words.encode(large.question))
    assert inputs["attention_mask"][0].sum() == 1 + 3 * slot(10) + question
    trained_on = patches(torch.from_numpy(np.stack([np.asarray(image) for image in large.images])))
    torch.testing.assert_close(inputs["pixel_values"][:1200], trained_on.flatten(0, 1), atol=1e-6, rtol=0)


def test_background_can_be_told_from_what_matters(processor: Any):
    sample = samples("large:two_images", 1, 8)[0]
    inputs = prepare(processor, sample.messages())
    visual = inputs["mm_token_type_ids"][0].bool()
    assert visual[sample.background].all()
    matters = sorted(set(visual.nonzero().flatten().tolist()) - set(sample.background))
    assert set(sample.evidence) <= set(matters)
    assert 8 * 4 <= len(matters) + 1 <= 8 * 6, "four objects in a picture, and at times a digit or a robot"

    cells = torch.zeros(len(visual), 16, 16, 3)
    patch = inputs["pixel_values"].view(-1, 2, 2, 3, 8, 8)
    cells[visual] = patch.permute(0, 1, 4, 2, 5, 3).reshape(-1, 16, 16, 3)
    contrast = cells[:, 1:-1, 1:-1].std((1, 2)).amax(-1)  # of a cell without its border
    assert contrast[sample.background].max() < 0.1 < contrast[matters].min()


@pytest.mark.parametrize("size", [(80, 80), (640, 480), (20, 300), (7, 9)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_any_picture_becomes_25_visual_tokens(processor: Any, size: tuple[int, int], mode: str):
    message = [{"role": "user", "content": [
        {"type": "image", "image": Image.new(mode, size)}, {"type": "text", "text": "list image #1 ?"},
    ]}]  # fmt: skip
    inputs = prepare(processor, message)
    assert (inputs["input_ids"] == words.IMAGE).sum() == CELLS
    assert inputs["pixel_values"].shape == (100, 192)


def test_batches_are_padded_on_the_left(processor: Any):
    short, long = samples("action", 1, 3)[0], samples("lookup", 1, 5)[0]
    inputs = prepare(processor, [short.messages(), long.messages()], processor_kwargs={"padding": True})
    padding = inputs["attention_mask"][0] == 0
    assert padding.sum() > 0
    assert padding.int().diff().max() == 0, "padding comes first"
    assert (inputs["input_ids"][0, padding] == words.PAD).all()
    assert inputs["mm_token_type_ids"].shape == inputs["input_ids"].shape
    assert len(inputs["image_grid_thw"]) == 8


def test_questions_may_be_written_freely(processor: Any):
    text = "What colour is the star in image #3? Please."
    ids = prepare(processor, [{"role": "user", "content": text}])["input_ids"][0]
    plain = [words.VOCABULARY[token] for token in ids]
    assert plain == f"<bos> question: what colour is the star in image #3 ? {words.UNKNOWN} .".split()


def test_conversations_follow_the_form_of_training(processor: Any):
    conversation = [
        {"role": "user", "content": "what is the code of lion ?"},
        {"role": "assistant", "content": [{"type": "text", "text": "kilo echo"}]},
        {"role": "user", "content": "what did the robot do ?"},
    ]
    ids = prepare(processor, conversation)["input_ids"][0]
    assert processor.decode(ids) == (
        "<bos> question: what is the code of lion ? <a> kilo echo <eos> question: what did the robot do ?"
    )


def test_decoding_drops_what_frames_an_answer(processor: Any):
    ids = words.encode("<a> star turned red <eos> <pad>")
    assert processor.decode(ids, skip_special_tokens=True) == "star turned red"
    assert processor.batch_decode([ids], skip_special_tokens=True) == ["star turned red"]


class TestRefusals:
    def test_pictures_and_placeholders_must_match(self, processor: Any):
        with pytest.raises(ValueError, match="1 images for 0"):
            processor(images=Image.new("RGB", (80, 80)), text="list image #1 ?")

    def test_truncation_must_not_cut_a_picture(self, processor: Any):
        with pytest.raises(ValueError, match="truncation"):
            processor(images=Image.new("RGB", (80, 80)), text=processor.image_token, truncation=True, max_length=9)

    @pytest.mark.parametrize("kind", ["videos", "audio"])
    def test_other_modalities(self, processor: Any, kind: str):
        with pytest.raises(ValueError, match=kind):
            processor(text="list image #1 ?", **{kind: [0]})

    def test_other_pieces_of_a_message(self, processor: Any):
        message = [{"role": "user", "content": [{"type": "sound", "sound": "beep"}]}]
        with pytest.raises(Exception, match="texts and images, not sound"):
            processor.apply_chat_template(message)

    def test_text_is_needed(self, processor: Any):
        with pytest.raises(ValueError, match="no text"):
            processor(images=Image.new("RGB", (80, 80)))


def test_saved_and_loaded_through_the_auto_classes(processor: Any, model: Any, tmp_path: Any):
    model.save_pretrained(tmp_path)
    LabProcessor.create().save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    same = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(again, LabProcessor)
    inputs = prepare(processor, example(images=3).messages())
    for key, value in prepare(again, example(images=3).messages()).items():
        assert torch.equal(value, inputs[key]), key
    with torch.inference_mode():
        torch.testing.assert_close(same(**inputs).logits, model(**inputs).logits)
