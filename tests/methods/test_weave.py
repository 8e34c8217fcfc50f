"""What the reference of weave leaves out: the softened attention of the decoded tokens."""

import pickle
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


@pytest.mark.parametrize("allocation", ["head", "layer", "global"])
def test_first_tokens_stay_and_lend_nothing(allocation):
    decoded = torch.full((1, 2, 20), 1e-3)
    decoded[..., 0], decoded[..., 9] = 0.9, 0.1
    options = {"recent": 0, "merge": False, "ahead": 4, "temperature": 1.0, "allocation": allocation}
    view = view_of(decoded=decoded)

    def kept(sinks):
        method = Weave(budget=6, sinks=sinks, **options)
        if allocation == "global":
            counts = method.allocate([method.observe(replace(view, mean_budget=6))], 6, 20)[0]
            return method.plan_heads(view, counts).keep[0, 0].tolist()
        return method.plan(view, 6).keep[0, 0].tolist()

    assert kept(0)[:5] == [0, 1, 2, 3, 4]
    assert kept(1) == [0, 9, 10, 11, 12, 13]


# -------------------------------------------------------------------- forms


@pytest.mark.parametrize(
    "spelled",
    [
        "weave",
        "weave:form=spelled",
        "weave:merge=true",
        "weave:redecode=true",
        "weave:form=lent",
        "weave:form=lent,recent=32",
        "weave:form=even,defer=4",
        "weave:form=lent,allocation=profile,profile=smol-text",
        "quantized:method=weave,form=even",
    ],
)
def test_a_form_is_read_back_from_what_is_written(spelled):
    method = kvweave.parse_method(spelled)
    assert kvweave.parse_method(method.spelling()) == method
    assert kvweave.method_from_dict(method.to_dict()) == method
    assert replace(method, budget=0.2) == method
    assert pickle.loads(pickle.dumps(method)) == method


def test_a_form_changes_what_is_not_spelled():
    lent, even = Weave(form="lent", recent=32, merge=True), Weave(form="even")
    assert (lent.recent, lent.merge, lent.ahead, lent.allocation) == (32, True, 64, "global")
    assert Weave(form="lent", defer=0).temperature is None
    assert (even.merge, even.mass_bias, even.ahead, even.allocation) == (False, False, 64, "head")


def test_a_profile_of_ones_own_takes_the_place_of_one_that_is_shipped():
    own = Weave(0.1, profile="my.json")
    assert own == Weave(0.1, form="lent", allocation="profile", profile="my.json", mix=0)
    assert own == kvweave.parse_method("weave:budget=0.1,profile=my.json")
    assert own.on_model(lambda: "smol-text") is own
    assert Weave(profile="my.json", form="lent", recent=4).mix == 0
    assert Weave(profile="my.json", form="lent", allocation="profile").mix == 0.5
    assert kvweave.parse_method(own.spelling()) == own
    asked = own.when_probed
    assert (asked.allocation, asked.profile, asked.ahead) == ("global", None, 0)
    with pytest.raises(ValueError, match=r"profile='my\.json' is not allowed with allocation='head'"):
        Weave(profile="my.json", ahead=8)


def test_what_is_spelled_is_not_left_to_the_model():
    assert Weave(0.3).form == Weave(budget=0.3, redecode=True).form == "auto"
    assert Weave(defer=2).form == Weave(recent=8).form == replace(Weave(), defer=3).form == "spelled"


def test_on_a_model_the_form_is_lent_with_its_profile_if_there_is_one():
    assert Weave(0.3).on_model(lambda: None) == Weave(0.3, form="lent")
    for budget in (0.3, 0.05, 100, "1MiB"):
        known = Weave(budget, redecode=True).on_model(lambda: "smol-text")
        assert known == Weave(budget, form="lent", redecode=True, allocation="profile", profile="smol-text", mix=0)
    assert Weave(0.1, coarse=0).on_model(lambda: None) == Weave(0.1, form="lent", coarse=0)
    spelled = Weave(0.3, recent=8)
    assert spelled.on_model(lambda: "smol-text") is spelled


# -------------------------------------------------------------------- who gets how many


def test_how_far_back_heads_look_says_how_many_entries_they_get_and_a_reply_which():
    draw = torch.Generator().manual_seed(3)
    queries, keys, values = ([torch.randn(1, 4, 40, 8, generator=draw) for _ in range(2)] for _ in range(3))
    keys, values = [x[:, :2] for x in keys], [x[:, :2] for x in values]
    replies = [
        (
            [3 * torch.randn(1, 4, 8, 8, generator=draw) for _ in range(2)],
            [torch.randn(1, 2, 8, 8, generator=draw) for _ in range(2)],
        )
        for _ in range(2)
    ]

    def kept(options, reply):
        method = kvweave.parse_method(f"weave:form=lent,budget=0.25{options}")
        visual = torch.zeros(1, 40, dtype=torch.bool)
        return [
            [[p for p in head.tolist() if p >= 0] for head in layer.positions[0]]
            for layer in kvweave.compress_tensors(method, queries, keys, values, visual=visual, decoded=reply)
        ]

    def counts(of):
        return [len(head) for layer in of for head in layer]

    far, others = (kept("", reply) for reply in replies)
    assert counts(far) == counts(others) != [10] * 4
    assert sum(counts(far)) == 40
    assert far != others
    near = [kept(",reach=0", reply) for reply in replies]
    assert counts(near[0]) != counts(near[1])
