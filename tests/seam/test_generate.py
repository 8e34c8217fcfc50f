"""What only `generate` knows: branches of guidance, drafts that wait for the cut, compiled steps in two threads."""

import threading

import pytest
import torch
from compiling import TWELVE, Graphs
from tiny import assert_close, decode, text_inputs, text_model, words

import kvweave

SNAP = kvweave.SnapKV(budget=0.25, window=4)
INPUTS = text_inputs((24,))


def test_guidance_reports_the_conditional_branch():
    model = text_model()
    negative = {"negative_prompt_ids": words(1, 11, seed=5), "negative_prompt_attention_mask": torch.ones(1, 11)}
    with kvweave.compress(model, SNAP) as session:
        for more in ({}, negative):
            decode(model, INPUTS, 4, guidance_scale=1.5, **more)
            assert session.cache.get_seq_length() == 27
            assert [layer["length"] for layer in session.report["layers"]] == [24, 24]
            assert [layer["kept"] for layer in session.report["layers"]] == [6, 6]


LOOKS = kvweave.get_method("snapkv", budget=0.2, window=2)
METHODS = {
    "snapkv": LOOKS,
    "h2o": kvweave.H2O(budget=0.2),
    "weave": kvweave.Weave(budget=0.2, proxies=4, recent=2),
    "deferred by three": kvweave.get_method("snapkv", budget=0.2, window=2, defer=3),
    "decoded again": kvweave.get_method("snapkv", budget=0.2, window=2, defer=2, redecode=True),
    "layer budgets": kvweave.PyramidKV(budget=0.2, window=2),
}
REPEATS = {"input_ids": words(1, 6, seed=4).repeat(1, 5), "attention_mask": torch.ones(1, 30, dtype=torch.long)}


class Perfect:
    """Drafts what the model would say with its full cache, six tokens at once."""

    def __init__(self, sequence):
        self.sequence, self.drafted = sequence, []

    requires_model_outputs = False

    def get_candidates(self, input_ids, *args, **kwargs):
        ids = torch.cat([input_ids, self.sequence[:, input_ids.shape[1] :][:, :6]], 1)
        self.drafted.append(ids.shape[1] - input_ids.shape[1])
        return ids, None

    def update_candidate_strategy(self, *args, **kwargs):
        pass


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_drafts_that_are_all_right_do_not_get_past_the_cut(method, monkeypatch):
    model = text_model()
    full = model.generate(**REPEATS, max_new_tokens=20)
    perfect = Perfect(full)
    monkeypatch.setattr(type(model), "_get_candidate_generator", lambda self, **kwargs: perfect)
    with kvweave.compress(model, method):
        greedy, expected = decode(model, REPEATS, 10)
        drafted, logits = decode(model, REPEATS, 10, prompt_lookup_num_tokens=6)
    assert perfect.drafted[0] == 6  # and all of them would have been accepted in the prompt's own pass
    assert torch.equal(drafted, greedy)
    assert_close(logits, expected)
    assert (expected - decode(model, REPEATS, 10)[1]).abs().max() > 1e-2


@pytest.mark.parametrize("how", ["look-up", "assistant"])
def test_assisted_decoding_gives_what_greedy_decoding_gives(how):
    model = text_model()
    options = {"prompt_lookup_num_tokens": 4} if how == "look-up" else {"assistant_model": text_model(seed=0)}
    for method in METHODS.values():
        with kvweave.compress(model, method):
            greedy, expected = decode(model, REPEATS, 12)
            drafted, logits = decode(model, REPEATS, 12, **options)
        assert torch.equal(drafted, greedy)
        assert_close(logits, expected)


def test_two_threads_compile_their_steps_and_neither_takes_the_others_away():
    """Deferred cuts: steps before them must run as they are, in both threads, whoever leaves first."""
    model = text_model()
    method = kvweave.get_method("snapkv", budget=0.3, window=4, defer=4)
    with kvweave.compress(model, method):
        expected = model.generate(**INPUTS, **TWELVE)
    told, waits = [], threading.Event()
    graphs = Graphs()

    class Slow:
        """A streamer that waits, so that the other thread leaves first."""

        def put(self, value):
            waits.wait(60)

        def end(self):
            pass

    def work(streamer):
        cache = kvweave.CompressedCache(model.config, method)
        try:
            told.append(
                model.generate(**INPUTS, **TWELVE, **graphs.compiling(), past_key_values=cache, streamer=streamer)
            )
        except Exception as error:
            told.append(error)

    with kvweave.attach(model):
        slow = threading.Thread(target=work, args=(Slow(),))
        slow.start()
        work(None)
        waits.set()
        slow.join()
    assert len(told) == 2
    for tokens in told:
        assert not isinstance(tokens, Exception), tokens
        assert torch.equal(tokens, expected)
    assert "get_compiled_call" not in vars(model)
