"""A model that decodes by the kernels gives what it gives by torch."""

import pytest
import torch
from kernel_inputs import DEVICE
from transformers import Qwen2Config, Qwen2ForCausalLM

import kvweave
from kvweave.memory import attend as attention
from kvweave.memory import heads
from kvweave.ops import decode

METHODS = {
    "snapkv": "attend",
    "flowmm:mass_bias=true": "attend",
    "adakv:window=4": "attend_uneven",
    "quantized:method=snapkv,residual=0": "attend_packed",
    "quantized:method=adakv,residual=0,window=4": "attend_packed",
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=64, initializer_range=0.3,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval().to(DEVICE)


@torch.no_grad()
def logits(model, method, ids, reserved, padded):
    """Of three decoded tokens, [batch, 3, vocabulary]."""
    with kvweave.compress(model, method) as session:
        mask = torch.ones_like(ids)
        mask[1, :padded] = 0
        out = model(ids[:, :97], attention_mask=mask[:, :97] if padded else None)
        if reserved:
            session.cache.reserve(4)
        found = []
        for n in range(97, 100):
            seen = mask[:, : n + 1] if padded else None
            out = model(ids[:, n : n + 1], past_key_values=session.cache, attention_mask=seen)
            found.append(out.logits[:, -1])
        return torch.stack(found, 1)


CASES = [(spelling, reserved) for spelling in METHODS for reserved in (False, True)[: 2 - ("quantized" in spelling)]]


@pytest.mark.parametrize(("spelling", "reserved"), CASES)
def test_decoding(model, spelling, reserved, monkeypatch):
    calls = []
    for name in ("attend", "attend_uneven", "attend_packed"):
        real = getattr(decode, name)

        def noted(*args, real=real, name=name, **kwargs):
            calls.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(decode, name, noted)
    monkeypatch.setattr(heads, "FEW", 0)  # as on a GPU, where one kernel takes heads of any counts
    method = kvweave.parse_method(spelling, budget=0.7)
    ids = torch.randint(64, (2, 100), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    monkeypatch.setattr(attention, "fused", lambda *_: False)
    one_by_one = METHODS[spelling] == "attend_uneven" and not reserved  # as uneven heads read a mask then
    padded = 0 if one_by_one else 9
    plain = logits(model, method, ids, reserved, padded)
    assert not calls
    monkeypatch.setattr(attention, "fused", lambda *_: True)
    torch.testing.assert_close(logits(model, method, ids, reserved, padded), plain, rtol=1e-4, atol=1e-4)
    assert METHODS[spelling] in calls
