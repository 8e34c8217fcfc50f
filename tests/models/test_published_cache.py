"""The models of published folders under compression: decoding is decoding from the masked full cache."""

import pytest
import torch
from published_folders import write_internvl, write_mobilevlm
from test_published_weights import internvl_inputs, mobilevlm_inputs
from tiny import assert_close, cut_of, decode, masked

import kvweave

METHODS = {
    "snapkv": (kvweave.SnapKV(budget=0.2, window=4), False),
    "flowmm": (kvweave.FlowMM(budget=0.2, proxies=4), True),
}
FOLDERS = {
    "internlm2": (write_internvl, internvl_inputs),
    "qwen2": (lambda folder: write_internvl(folder, "qwen2", "6b"), internvl_inputs),
    "mobilevlm": (write_mobilevlm, mobilevlm_inputs),
}


@pytest.mark.parametrize(("method", "merged"), METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(("write", "make"), FOLDERS.values(), ids=FOLDERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_decoding_equals_the_masked_full_cache(tmp_path, write, make, attention, method, merged):
    """A batch of two, one row padded on the left, with pictures."""
    write(tmp_path / "model")
    model = kvweave.models.from_published(tmp_path / "model", attn_implementation=attention)
    model.generation_config.eos_token_id = None
    inputs = make(model)
    del inputs["position_ids"]
    visual = inputs["input_ids"] == model.config.image_token_id
    length = visual.shape[1]
    tokens, plain = decode(model, inputs, 6)
    with kvweave.compress(model, method) as session:
        mine, logits = decode(model, inputs, 6)
    assert torch.equal(logits[:, 0], plain[:, 0])
    assert (logits - plain)[:, 1:].abs().max() > 1e-2  # else the oracle would prove nothing
    with masked(model, cut_of(session.cache, length, merged=merged)):
        same, expected = decode(model, inputs, 6)
    assert torch.equal(mine, same)
    assert torch.equal(mine[:, 0], tokens[:, 0])
    assert_close(logits, expected, 2e-5)
    assert torch.equal(session.cache.prompt.visual[:, :length], visual)
    assert torch.equal(session.cache.prompt.valid[:, :length], inputs["attention_mask"].bool())
    assert session.report["totals"]["layers"] == model.config.text_config.num_hidden_layers
    lengths = inputs["attention_mask"].sum(1)
    kept = (session.cache.layers[0].positions[:, :, :] < length) & (session.cache.layers[0].positions >= 0)
    assert torch.equal(kept.sum(-1)[:, 0], (lengths * 0.2).long())


def test_encoded_images_are_read_as_pixels_are(tmp_path):
    """`generate` encodes images once and hands them over; a wrong number of them is refused by either way."""
    write_mobilevlm(tmp_path / "model")
    model = kvweave.models.from_published(tmp_path / "model")
    inputs = mobilevlm_inputs(model)
    with torch.no_grad():
        pixels = inputs.pop("pixel_values")
        seen = model.get_image_features(pixels, return_dict=True)
        assert torch.equal(
            model(**inputs, pixel_values=pixels).logits, model(**inputs, mm_encoder_outputs={"image": seen}).logits
        )
        with pytest.raises(ValueError, match="288 placeholders for 144 tokens of images"):
            model(**inputs, pixel_values=pixels[:1])
