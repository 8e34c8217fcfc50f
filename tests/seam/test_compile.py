"""A decode step on a compressed cache compiles to one graph."""

import pytest
import torch
from tiny import assert_close, text_inputs, text_model, words
from torch._dynamo.testing import CompileCounter

import kvweave


@pytest.mark.parametrize(("lengths", "mass_bias"), [((30,), False), ((30, 21), True)], ids=["one", "batch, bias"])
def test_a_decode_step_is_one_graph_whatever_the_number_of_slots(lengths, mass_bias):
    model = text_model(num_hidden_layers=1)
    method = kvweave.FlowMM(budget=0.3, proxies=4, mass_bias=mass_bias)
    inputs, follow = text_inputs(lengths), words(len(lengths), 8, seed=7)
    counter = CompileCounter()
    torch._dynamo.reset()

    def step(ids, cache, mask, positions):
        return model(input_ids=ids, past_key_values=cache, attention_mask=mask, position_ids=positions).logits

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad(), kvweave.compress(model, method) as session:
        runs = []
        for function in (step, compiled):
            positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
            model(**inputs, position_ids=positions)
            mask, logits = inputs["attention_mask"], []
            for n in range(8):
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                position = mask.sum(1, keepdim=True) - 1
                logits.append(function(follow[:, n : n + 1], session.cache, mask, position))
            runs.append(torch.cat(logits, 1))
    assert_close(runs[1], runs[0])
    assert counter.frame_count <= 2  # the first step's cache has no decoded token yet: one more graph, not one a step
