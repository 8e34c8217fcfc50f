"""What decoded tokens and probes are noted to look at, against the model's own eager attention."""

from dataclasses import dataclass, replace

import pytest
import torch
from methods_for_tests import HEARD, Biased, Listening
from tiny import IMAGE, assert_close, picture_inputs, text_inputs, text_model, vision_model, words

import kvweave
from kvweave.cut.waiting import decoded_attention
from kvweave.ops.statistics import AttentionRule
from kvweave.view import LayerView

PEAKS: dict[int, torch.Tensor] = {}


@dataclass(frozen=True)
class BiasedListener(Listening):
    """Adds biases to the logits of what it keeps."""

    name = "biased listener"

    def plan(self, view, budget):
        plan = super().plan(view, budget)
        return replace(plan, bias=Biased.bias(view.positions.gather(-1, plan.keep)))


@dataclass(frozen=True)
class PeakListener(kvweave.Weave):
    """Notes the largest attention that it is told of."""

    name = "peak listener"

    def plan(self, view, budget):
        if view.probed:
            PEAKS[view.layer] = view.received("max", "mean")
        return super().plan(view, budget)


@pytest.fixture(autouse=True)
def _silence():
    HEARD.clear()
    PEAKS.clear()


def by_kv_head(attention):
    """[batch, heads, ...] -> [batch, kv_heads, ...], the mean over the two heads of each group."""
    return attention.unflatten(1, (2, 2)).mean(2)


def test_a_row_that_has_ended_is_not_counted_again_while_the_others_go_on():
    """What `generate` feeds a finished row is padding that its mask shows: only the reply's own tokens speak."""
    model, inputs = text_model(attention="eager"), text_inputs((26, 26))
    tokens = model.generate(**inputs, max_new_tokens=6)[:, 26:]
    stop = int(tokens[0, 1])
    assert stop not in tokens[1]
    assert stop != tokens[0, 0]
    with kvweave.compress(model, Listening(budget=0.3, window=4, defer=5)) as session:
        model.generate(**inputs, max_new_tokens=8, eos_token_id=stop)
    assert session.report["deferred"] == 5
    whole = torch.cat([inputs["input_ids"], tokens[:, :5]], 1)
    with torch.no_grad():
        attentions = model(whole, output_attentions=True).attentions
    for layer in range(2):
        seen = by_kv_head(attentions[layer][:, :, 26:, :26])  # [batch, kv_heads, tokens, columns]
        assert_close(HEARD[layer][0], seen[0, :, :1].mean(1))
        assert_close(HEARD[layer][1], seen[1].mean(1))


def test_a_bias_of_an_earlier_turn_is_part_of_what_decoded_tokens_see():
    model = text_model(attention="eager")
    ids = words(1, 40)
    attentions, cache = [], None
    with torch.no_grad(), kvweave.compress(model, BiasedListener(budget=0.3, window=4, defer=2)) as session:
        for start, stop in ((0, 26), (26, 27), (27, 28), (28, 38), (38, 39), (39, 40)):
            out = model(input_ids=ids[:, start:stop], past_key_values=cache, output_attentions=True)
            attentions.append(out.attentions)
            cache = session.cache
            if stop == 38:
                held = [layer.positions.shape[-1] for layer in cache.layers]
    assert held == [7 + 2 + 10] * 2
    for layer in range(2):
        seen = [by_kv_head(step[layer][:, :, 0, : held[layer]]) for step in attentions[-2:]]
        assert_close(HEARD[layer], torch.stack(seen).mean(0))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gaps", [False, True])
def test_decoded_attention_in_plain_loops(biased, gaps):
    """Two heads a group, slots with biases, slots that hold nothing, a token that does not count."""
    draw = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    keys, later, queries, bias = normal(1, 2, 9, 4), normal(1, 2, 3, 4), 2 * normal(1, 4, 3, 4), normal(1, 2, 9)
    empty = torch.zeros(1, 2, 9, dtype=torch.bool)
    empty[0, 1, :3] = True
    slots, ones = torch.arange(9).expand(1, 2, 9), torch.ones(1, 2, 9)
    view = LayerView(keys, keys, None, slots, ones, slots < 0, AttentionRule(0.5))
    view.bias, view.empty = bias if biased else None, empty if gaps else None
    counted = torch.tensor([[True, False, True]])
    mine = decoded_attention(view, queries, later, counted, view.rule)
    for kv in range(2):
        held = [j for j in range(9) if not (gaps and empty[0, kv, j])]
        expected = torch.zeros(9, dtype=torch.float64)
        for token in (0, 2):
            for head in (2 * kv, 2 * kv + 1):
                query = queries[0, head, token]
                logits = [0.5 * query @ keys[0, kv, j] + (bias[0, kv, j] if biased else 0) for j in held]
                logits += [0.5 * query @ later[0, kv, t] for t in range(token + 1)]
                expected[held] += torch.stack(logits).softmax(0)[: len(held)] / 2
        assert_close(mine[0, kv], expected, 1e-6)


def test_probes_after_a_final_picture_stand_where_the_next_text_would():
    """Of three axes of positions the last image token has three different ones: text goes on from the largest."""
    model = vision_model(attention="eager")
    inputs = picture_inputs((14,), pictures=2)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        inputs[name] = inputs[name][:, :13]
    assert int(inputs["input_ids"][0, -1]) == IMAGE
    probe = torch.tensor([[11, 12, 13]])
    with kvweave.compress(model, Listening(budget=0.5, window=4), probes=probe.tolist(), probe_tokens=3) as session:
        model.generate(**inputs, max_new_tokens=1)
    whole = inputs | {
        "input_ids": torch.cat([inputs["input_ids"], probe], 1),
        "attention_mask": torch.ones(1, 16, dtype=torch.long),
        "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(probe)], 1),
    }
    out = model.generate(
        **whole, max_new_tokens=3, suppress_tokens=[IMAGE], output_attentions=True, return_dict_in_generate=True
    )
    fed = session.report["probes"]["tokens"]
    assert fed == 3 + 2
    for layer in range(2):
        rows = [out.attentions[0][layer][:, :, 13:16, :13], *(x[layer][..., :13] for x in out.attentions[1:])]
        assert_close(HEARD[layer], by_kv_head(torch.cat(rows, 2)).mean(2))


def test_with_probes_weave_reads_all_rows_of_the_prompt_however_few_its_proxies():
    model, inputs = text_model(attention="eager"), text_inputs((26,))
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    for method in (
        PeakListener(budget=0.3, proxies=2, recent=4),
        kvweave.Quantized(PeakListener(budget=0.3, proxies=2, recent=4), bits=8, group=8, residual=64),
    ):
        PEAKS.clear()
        with kvweave.compress(model, method, probes=[[11, 12]], probe_tokens=2):
            model.generate(**inputs, max_new_tokens=2)
        for layer in range(2):
            assert_close(PEAKS[layer], by_kv_head(attentions[layer]).amax(2))
