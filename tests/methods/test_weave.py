"""What the reference of weave leaves out: the softened attention of the decoded tokens."""

from dataclasses import replace

import pytest
import torch

import kvweave
from kvweave import lab, models
from kvweave.cut.waiting import decoded_attention
from kvweave.methods.weave import Weave
from kvweave.ops.statistics import AttentionRule
from kvweave.view import LayerView


def view_of(length=20, decoded=None):
    draw = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 1, 2, length, 8, generator=draw)
    queries = torch.randn(1, 4, length, 8, generator=draw)
    slots = torch.arange(length).expand(1, 2, -1)
    ones = torch.ones(1, 2, length)
    return LayerView(keys, values, queries, slots, ones, slots % 2 == 0, AttentionRule(8**-0.5), decoded=decoded)


def test_with_a_temperature_the_decoded_tokens_attention_alone_decides():
    decoded = torch.rand(1, 2, 20, generator=torch.Generator().manual_seed(2))
    method = Weave(budget=6, temperature=2.0, recent=0, merge=False)
    keep = method.plan(view_of(decoded=decoded), 6).keep
    assert torch.equal(keep, decoded.topk(6, -1).indices.sort(-1).values)
    usual = replace(method, temperature=None).plan(view_of(decoded=decoded), 6).keep
    assert not torch.equal(keep, usual)


def test_a_temperature_divides_the_decoded_tokens_logits(monkeypatch):
    rules = []

    def noted(view, queries, keys, counted, rule):
        rules.append(rule)
        return decoded_attention(view, queries, keys, counted, rule)

    monkeypatch.setattr("kvweave.cut.waiting.decoded_attention", noted)
    model, processor = models.load("lab")
    prompt = lab.samples("lookup", 1, images=4)[0].messages()
    inputs = processor.apply_chat_template(
        [prompt], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    for method in ("weave:temperature=4,budget=0.3", "quantized:method=weave,temperature=4,budget=0.3"):
        rules.clear()
        with kvweave.compress(model, kvweave.parse_method(method)):
            model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=10**6)
        assert [rule.scaling for rule in rules] == [pytest.approx(32**-0.5 / 4)] * 4


def test_a_temperature_needs_decoded_tokens():
    with pytest.raises(ValueError, match=r"temperature=2.*defer"):
        Weave(temperature=2.0, defer=0)


@pytest.mark.parametrize("options", [{"merge_rule": "weighted"}, {"merge_keys": False}])
def test_entropy_needs_averaged_keys(options):
    with pytest.raises(ValueError, match="mass_kind='entropy'"):
        Weave(mass_kind="entropy", **options)
