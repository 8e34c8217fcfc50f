"""How often a prompt makes the host wait for a device: what is known of it is read once, not once a layer."""

import pytest
import torch
from tiny import text_inputs, text_model

import kvweave
from benchmarks.guard import counted

#: Waits of a prompt without padding, and of each of its layers: an adaptive method reads each layer's weight.
METHODS = {"snapkv": (1, 0), "streaming_llm": (1, 0), "h2o": (1, 0), "pyramidkv": (1, 0), "flashcache": (1, 1)}


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_waits_once(name):
    waits = []
    for layers in (2, 4):
        model = text_model(num_hidden_layers=layers)
        inputs = text_inputs((40,))
        with kvweave.compress(model, kvweave.get_method(name, budget=0.5)), counted() as operations:
            model(**inputs)
        with counted() as plain:
            model(**inputs)
        waits.append(operations.waits - plain.waits)
    once, each = METHODS[name]
    assert waits == [once + 2 * each, once + 4 * each]
