"""How often a prompt makes the host wait for a device: what is known of it is read once, not once a layer."""

import pytest
import torch
from tiny import text_inputs, text_model

import kvweave
from benchmarks.guard import counted

#: Waits of a prompt without padding, however many layers: for its length, and for all layers' weights.
METHODS = {"snapkv": 1, "streaming_llm": 1, "h2o": 1, "pyramidkv": 1, "flashcache": 2}


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_waits_of_a_prompt(name):
    waits = []
    for layers in (2, 4):
        model = text_model(num_hidden_layers=layers)
        inputs = text_inputs((40,))
        with kvweave.compress(model, kvweave.get_method(name, budget=0.5)), counted() as operations:
            model(**inputs)
        with counted() as plain:
            model(**inputs)
        waits.append(operations.waits - plain.waits)
    assert waits == [METHODS[name]] * 2
