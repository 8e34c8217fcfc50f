"""What the seam tells methods of a model's inputs and layers: videos are visual, and some layers turn no keys."""

from types import SimpleNamespace

import pytest
import torch
from tiny import IMAGE, assert_close, decode, text_inputs, text_model, tiny_config, vision_model, words

import kvweave
from kvweave.prompt import visual_mask

VIDEO = 6  # the tiny models' placeholder
FLOW = kvweave.FlowMM(budget=0.4, proxies=4, flow="cross", merge_rule="average")


def pictures_and_a_video():
    ids = words(2, 24, images=((3, 7),))
    ids[:, 12:20] = VIDEO
    ids[1, 3:7] = words(1, 4, seed=4)  # the second row: a video alone
    return ids, (ids == IMAGE) | (ids == VIDEO)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava_onevision"])
def test_placeholders_of_videos_are_visual(kind):
    model = vision_model() if kind == "qwen2_5_vl" else text_model(kind)
    ids, visual = pictures_and_a_video()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "qwen2_5_vl":
        inputs["position_ids"] = torch.arange(24).expand(3, 2, 24)
    with torch.no_grad(), kvweave.compress(model, FLOW) as session:
        model(**inputs)
    assert torch.equal(session.cache.prompt.visual, visual)
    assert all(row["flow_balanced"] > 0 for row in session.report["layers"][0]["rows"])


@pytest.mark.parametrize("name", ["image_token_id", "image_token_index", "video_token_id", "video_token_index"])
def test_every_name_that_configurations_give_placeholders(name):
    ids = torch.tensor([[11, 6, 12]])
    config = SimpleNamespace(**{name: 6})
    inside = SimpleNamespace(sub_configs={"text_config": None}, text_config=config)
    for given in (config, inside):
        assert visual_mask(given, ids, {}).tolist() == [[False, True, False]]


def test_a_processors_token_types_tell_images_and_videos_from_text_and_sound():
    kinds = torch.tensor([[0, 1, 1, 0, 2, 2, 3, 0]])
    config = tiny_config("qwen2_5_vl")
    expected = [[False, True, True, False, True, True, False, False]]
    assert visual_mask(config, torch.full((1, 8), 11), {"mm_token_type_ids": kinds}).tolist() == expected


def test_a_video_that_a_processor_marks_is_visual_in_generate():
    model = vision_model()
    ids = words(1, 24)
    kinds = torch.zeros_like(ids)
    kinds[:, 4:12] = 2
    positions = torch.arange(24).expand(3, 1, 24)
    with torch.no_grad(), kvweave.compress(model, FLOW) as session:
        model(input_ids=ids, mm_token_type_ids=kinds, position_ids=positions)
    assert torch.equal(session.cache.prompt.visual, kinds == 2)


def test_keys_of_a_layer_without_rotary_are_merged_as_they_are():
    """SmolLM3's second layer has none: turning them by tables that they never saw would be wrong."""
    model = text_model("smollm3", no_rope_layers=[1, 0], layer_types=["full_attention"] * 2)
    inputs = text_inputs((26, 19))
    caches = []
    for rope_aware in (False, True):
        method = kvweave.FlowMM(budget=0.4, proxies=4, flow="cross", merge_rule="average", rope_aware=rope_aware)
        with kvweave.compress(model, method) as session:
            decode(model, inputs, 1)
        caches.append(session.cache)
    plain, turned = caches
    for one, other in zip(plain.layers, turned.layers, strict=True):
        assert torch.equal(one.positions, other.positions)
        assert one.mass.max() > 2
    assert (plain.layers[0].keys - turned.layers[0].keys).abs().max() > 0.1
    assert_close(turned.layers[1].keys, plain.layers[1].keys)
