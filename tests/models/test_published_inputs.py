"""Tokenizers, templates and pictures of published folders, against the originals' rules in plain code."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from PIL import Image
from plain_tokens import slow_ids
from published_folders import (
    APPENDED,
    edit,
    sentencepiece_model,
    write_internlm2_tokenizer,
    write_internvl,
    write_llama_tokenizer,
    write_mobilevlm,
)

from kvweave import models
from kvweave.models import ModelError, processor_from_published
from kvweave.models.tokens import sentencepiece_tokenizer

SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
WORDS = ["the", "cat", " ", "  ", "\n", "\t", "你", "好", "书生", "é", "🙂", "sat", "W", "hat", "▁", "ing", "."]
MARKED = st.lists(st.sampled_from([*WORDS, "</s>", "<|im_end|>", "<img>", "<IMG_CONTEXT>"]), max_size=12).map("".join)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder of each: a for InternLM2, q for Qwen2, m for MobileVLM."""
    home = tmp_path_factory.mktemp("published")
    write_internvl(home / "a")
    write_internvl(home / "q", "qwen2")
    write_mobilevlm(home / "m")
    return home


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def user(*pieces):
    """A turn of texts and pictures."""
    return {
        "role": "user",
        "content": [
            {"type": "text", "text": piece} if isinstance(piece, str) else {"type": "image", "image": piece}
            for piece in pieces
        ],
    }


def said(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def written(processor, *messages):
    return processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)


# -------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module", params=[False, True], ids=["no blank in front", "a blank in front"])
def internlm2(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("internlm2")
    write_internlm2_tokenizer(folder, prefix=request.param)
    config = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    added = {entry["content"]: int(number) for number, entry in config.items()}
    return sentencepiece_tokenizer(folder), added, request.param


@given(text=MARKED)
def test_internlm2s_ids_are_the_slow_tokenizers(internlm2, text):
    tokenizer, added, prefix = internlm2
    assert tokenizer(text)["input_ids"] == [1, *slow_ids(text, added, prefix=prefix)]


@pytest.fixture(scope="module", params=[None, True, False], ids=["legacy unsaid", "legacy", "not legacy"])
def llama(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    write_llama_tokenizer(folder, **({} if request.param is None else {"legacy": request.param}))
    legacy = request.param is not False
    return sentencepiece_tokenizer(folder, prefix_behind_specials=legacy), legacy


@given(text=MARKED)
def test_llamas_ids_are_the_slow_tokenizers(llama, text):
    tokenizer, legacy = llama
    added = {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert tokenizer(text)["input_ids"] == [1, *slow_ids(text, added, prefix=True, legacy=legacy, unused=0)]


@given(text=st.lists(st.sampled_from(WORDS), max_size=12).map("".join))
def test_decoding_gives_the_text_back(internlm2, text):
    tokenizer, _, _ = internlm2
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace("▁", " ")


def test_added_tokens_have_the_ids_of_the_configuration(home):
    for name in "aq":
        tokenizer = processor_from_published(home / name).tokenizer
        added = json.loads((home / name / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        for number, token in added.items():
            assert tokenizer(token["content"], add_special_tokens=False)["input_ids"] == [int(number)]
            assert tokenizer.decode([int(number)], skip_special_tokens=True) == ""
        vocabulary = json.loads((home / name / "config.json").read_text())["llm_config"]["vocab_size"]
        assert len(tokenizer) == vocabulary
        assert tokenizer.convert_tokens_to_ids(list(APPENDED)) == list(range(vocabulary - 9, vocabulary))


def test_only_internlm2_and_llama_begin_with_a_token(home):
    first = [processor_from_published(home / name).tokenizer("the cat")["input_ids"][0] for name in "amq"]
    assert first[:2] == [1, 1]
    assert first[2] == processor_from_published(home / "q").tokenizer("the", add_special_tokens=False)["input_ids"][0]


def test_what_was_saved_reads_the_same(home, tmp_path):
    text = "the  cat<|im_end|>\n你好 书生<img><IMG_CONTEXT></img> 🙂</s>sat"
    for name in "aqm":
        processor = processor_from_published(home / name)
        processor.save_pretrained(tmp_path / name)
        again = type(processor).from_pretrained(tmp_path / name)
        assert again.tokenizer(text)["input_ids"] == processor.tokenizer(text)["input_ids"]
        assert again.chat_template == processor.chat_template
        assert again.image_token_id == processor.image_token_id


def test_a_tokenizer_that_is_not_known_is_refused(tmp_path):
    write_internvl(tmp_path / "a")
    file = tmp_path / "a" / "tokenizer.model"
    whole = file.read_bytes()
    for data, words in (
        (sentencepiece_model(False, kind=1), "kind 1: allowed is byte-pair encoding"),
        (whole[: len(whole) // 2 + 1], "cannot be read as a SentencePiece model"),
        (b"", "byte-pair encoding"),
    ):
        file.write_bytes(data)
        with pytest.raises(ModelError, match=words):
            processor_from_published(tmp_path / "a")
    file.unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.model cannot be read"):
        processor_from_published(tmp_path / "a")
    for unused, words in ((7, "'<img>' should have id .*, which is the piece"), (5, "should have id")):
        file.write_bytes(sentencepiece_model(False, unused=unused))  # every added token's id is one off
        with pytest.raises(ModelError, match=words):
            processor_from_published(tmp_path / "a")
    write_internvl(tmp_path / "q", "qwen2")
    (tmp_path / "q" / "merges.txt").unlink()
    with pytest.raises(ModelError, match=r"merges\.txt is missing"):
        processor_from_published(tmp_path / "q")
    write_mobilevlm(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.model").write_bytes(sentencepiece_model(True, unused=3))
    with pytest.raises(ModelError, match="its tokenizer has"):
        processor_from_published(tmp_path / "m")


# -------------------------------------------------------------------- prompts


def test_internvls_prompts(home):
    for name in "aq":
        processor, shown = processor_from_published(home / name), picture(60, 60)
        system = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        assistant = "<|im_end|>\n<|im_start|>assistant\n"
        one = system + "<|im_start|>user\n<image>\nWhat is this?" + assistant
        assert written(processor, user(shown, "What is this?")) == one
        two = system + "<|im_start|>user\nImage-1: <image>\nImage-2: <image>\nWhat changed?" + assistant
        assert written(processor, user(shown, shown, "What changed?")) == two
        assert written(processor, user("Hello")) == system + "<|im_start|>user\nHello" + assistant
        turns = (user(shown, "What is this?"), said("A cat."), user("And now?"))
        assert written(processor, *turns) == one + "A cat.<|im_end|>\n<|im_start|>user\nAnd now?" + assistant
        own = {"role": "system", "content": "Be brief."}
        assert written(processor, own, user("Hi")).startswith(
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user"
        )


def test_a_videos_frames_as_internvl_is_asked_about_them(home):
    """Pictures amid text are not numbered: whoever writes them there says what they are. A frame is one tile."""
    processor, shown = processor_from_published(home / "a"), [picture(200, 80, seed) for seed in range(3)]
    pieces = [piece for n, each in enumerate(shown) for piece in (f"Frame{n + 1}: ", each)]
    text = written(processor, user(*pieces, "What happens?"))
    frames = "Frame1: <image>\nFrame2: <image>\nFrame3: <image>\nWhat happens?"
    assert (
        text
        == f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{frames}<|im_end|>\n<|im_start|>assistant\n"
    )
    seen = processor(shown, text, images_kwargs={"max_patches": 1}, return_tensors="pt")["pixel_values"]
    assert torch.allclose(seen, torch.cat([pixels(tiles(each, 1, 56), *IMAGENET) for each in shown]), atol=2e-6)


def test_a_system_message_of_the_folders_replaces_internvls(tmp_path):
    text = 'Say "no" \\ often,\nplease.'
    write_internvl(tmp_path, system_message=text)
    assert written(processor_from_published(tmp_path), user("Hi")).startswith(
        f"<|im_start|>system\n{text}<|im_end|>\n"
    )


def test_internvls_tokens(home):
    """<s>, then the text with <img>, four placeholders a tile and </img> where a picture is."""
    processor, shown = processor_from_published(home / "a"), picture(60, 60)
    inputs = models.encode(processor, [user(shown, "What is this?")])
    config = json.loads((home / "a" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    added = {entry["content"]: int(number) for number, entry in config.items()}
    text = written(processor, user(shown, "What is this?")).replace(
        "<image>", "<img>" + "<IMG_CONTEXT>" * 4 * len(inputs["pixel_values"]) + "</img>"
    )
    assert inputs["input_ids"][0].tolist() == [1, *slow_ids(text, added, prefix=False)]
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}


def test_mobilevlms_prompts(home):
    processor, shown = processor_from_published(home / "m"), picture(60, 60)
    one = f"{VICUNA} USER: <image>\nWhat is this? ASSISTANT:"
    assert written(processor, user(shown, "What is this?")) == one
    turns = (user(shown, "What is this?"), said("A cat."), user("And now?"))
    assert written(processor, *turns) == f"{one} A cat.</s>USER: And now? ASSISTANT:"
    assert written(processor, user(shown, shown, "What changed?")).count("<image>\n<image>\nWhat") == 1


def test_mobilevlms_pieces_are_tokenized_one_by_one(home):
    """The piece behind an image begins with a blank of its own."""
    processor, shown = processor_from_published(home / "m"), picture(60, 60)
    inputs = models.encode(processor, [user(shown, "What is this?")])
    before, after = written(processor, user(shown, "What is this?")).split("<image>")
    added = {"<unk>": 0, "<s>": 1, "</s>": 2}
    first, last = (slow_ids(text, added, prefix=True, unused=0) for text in (before, after))
    visual = [processor.image_token_id] * 144
    assert inputs["input_ids"][0].tolist() == [1, *first, *visual, *last]
    tokens = processor.tokenizer.convert_ids_to_tokens(first[-1:] + last[:2])
    assert tokens == ["▁", "▁", "<0x0A>"]
    assert processor.tokenizer(before + "<image>" + after)["input_ids"] != [1, *first, visual[0], *last][:-1]


def test_rows_of_a_batch_are_padded_on_the_left_and_read_as_alone(home):
    for name in "aqm":
        processor = processor_from_published(home / name)
        rows = [[user(picture(90, 60), "What?")], [user("the cat")], [user(picture(60, 90), picture(50, 50), "the")]]
        together = models.encode(processor, *rows)
        pixels = []
        for ids, mask, row in zip(together["input_ids"], together["attention_mask"], rows, strict=True):
            alone = models.encode(processor, row)
            assert torch.equal(ids[mask.bool()], alone["input_ids"][0])
            assert mask.tolist() == sorted(mask.tolist())
            assert (ids[~mask.bool()] == processor.tokenizer.pad_token_id).all()
            pixels += [alone["pixel_values"]] if "pixel_values" in alone else []
        assert torch.equal(together["pixel_values"], torch.cat(pixels))


def test_a_llama_that_names_no_padding_pads_with_unknown(tmp_path):
    write_mobilevlm(tmp_path / "m")
    edit(tmp_path / "m" / "special_tokens_map.json", pad_token="absent")
    tokenizer = processor_from_published(tmp_path / "m").tokenizer
    assert tokenizer(["the", "the cat sat"], padding=True)["input_ids"][0][0] == tokenizer.pad_token_id == 0


def test_what_a_processor_cannot_read_is_refused(home):
    video = [{"role": "user", "content": [{"type": "video", "video": [picture(9, 9)]}]}]
    for name in "aqm":
        processor = processor_from_published(home / name)
        with pytest.raises(TemplateError, match="texts and images, not video"):
            processor.apply_chat_template([video], tokenize=True)
        with pytest.raises(ValueError, match="trunca"):
            processor(picture(9, 9), "the <image> cat", truncation=True, max_length=4)
    for images, text, words in (
        (picture(9, 9), "<image> <image>", "1 images for 2 <image>"),
        (None, "<image>", "0 images for 1 <image>"),
        ([[picture(9, 9)], []], ["", "<image><image>"], "1 images for 2 <image>"),
        (picture(9, 9), None, "no text"),
    ):
        with pytest.raises(ValueError, match=words):
            processor(images, text)
    with pytest.raises(ValueError, match="videos are given: allowed are texts and images"):
        processor(text="Hi", videos=[[picture(9, 9)]])


# -------------------------------------------------------------------- pictures


def tiles(image, most, side):
    """The original's tiling in plain loops."""
    grids = [(w, h) for w in range(1, most + 1) for h in range(1, most + 1) if w * h <= most]
    best, least = (1, 1), float("inf")
    for w, h in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        off = abs(image.width / image.height - w / h)
        tie = off == least and image.width * image.height > 0.5 * side * side * w * h
        if off < least or tie:
            best, least = (w, h), off
    w, h = best
    whole = image.resize((w * side, h * side), Image.Resampling.BICUBIC)
    out = [whole.crop((x * side, y * side, (x + 1) * side, (y + 1) * side)) for y in range(h) for x in range(w)]
    if len(out) > 1:
        out.append(image.resize((side, side), Image.Resampling.BICUBIC))
    return out


def pixels(images, mean, std):
    arrays = np.stack([np.asarray(image, np.float32) / 255 for image in images])
    return torch.from_numpy(((arrays - np.float32(mean)) / np.float32(std)).transpose(0, 3, 1, 2))


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@pytest.mark.parametrize("size", [(60, 60), (200, 80), (80, 200), (40, 100), (300, 30), (112, 112), (56, 56)])
def test_internvls_tiles_and_the_whole_behind_them(home, size):
    processor, shown = processor_from_published(home / "a"), picture(*size)
    for most in (1, 6, 12):
        seen = processor(shown, "<image>", return_tensors="pt", images_kwargs={"max_patches": most})
        expected = pixels(tiles(shown, most, 56), *IMAGENET)
        assert torch.allclose(seen["pixel_values"], expected, atol=2e-6)
        assert (seen["input_ids"] == processor.image_token_id).sum() == 4 * len(expected)


def test_each_of_several_pictures_has_all_the_tiles(home):
    processor, shown = processor_from_published(home / "a"), [picture(200, 80, seed) for seed in range(3)]
    seen = processor([shown], "<image>" * 3, return_tensors="pt")
    expected = [pixels(tiles(each, 12, 56), *IMAGENET) for each in shown]
    assert torch.allclose(seen["pixel_values"], torch.cat(expected), atol=2e-6)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
def test_pictures_of_other_modes_are_made_rgb(home, mode):
    shown = picture(60, 60).convert(mode)
    for name in "am":
        processor = processor_from_published(home / name)
        one, other = (
            processor(each, "<image>", return_tensors="pt")["pixel_values"] for each in (shown, shown.convert("RGB"))
        )
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", [(336, 336), (400, 300), (299, 401), (50, 49), (700, 20)])
def test_mobilevlms_pictures_are_put_on_a_square(home, size):
    shown, side = picture(*size), max(size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(shown, ((side - size[0]) // 2, (side - size[1]) // 2))
    expected = pixels([square.resize((336, 336), Image.Resampling.BICUBIC)], *CLIP)
    seen = processor_from_published(home / "m")(shown, "<image>", return_tensors="pt")
    assert torch.allclose(seen["pixel_values"], expected, atol=2e-6)
    assert (seen["input_ids"] == processor_from_published(home / "m").image_token_id).sum() == 144


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"template": "internlm2-chat"}, "template='internlm2-chat': allowed is 'internvl2_5'"),
        ({"use_thumbnail": False}, "use_thumbnail=False: allowed is True"),
        ({"dynamic_image_size": False}, "dynamic_image_size=False: allowed is True"),
    ],
)
def test_inputs_of_another_internvl_are_refused(tmp_path, changes, words):
    write_internvl(tmp_path)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(ModelError, match=words):
        processor_from_published(tmp_path)


def test_a_mobilevlm_that_squares_nothing_is_refused(tmp_path):
    write_mobilevlm(tmp_path / "m", image_aspect_ratio="anyres")
    with pytest.raises(ModelError, match="image_aspect_ratio='anyres': allowed is 'pad'"):
        processor_from_published(tmp_path / "m")
