"""The bias of a merged entry: never more than its members had, and just that for the query of the weights."""

import torch

from kvweave.ops.merge import segment_sum, tangent_bias

LENGTH, DIM = 12, 4
KEEP = torch.tensor([[[0, 5, 11]]])
SOURCE = torch.tensor([[[1, 2, 3, 4, 6, 7, 8, 9, 10]]])
TARGET = torch.tensor([[[0, 0, 1, 1, 1, 1, -1, 0, 0]]])  # the last kept token has no member


def merged(shares, before):
    """Weights from shares [length] of somebody's attention, and the biases [kept] that go with them."""
    at = TARGET.clamp(min=0)
    own, weight = shares[KEEP], shares[SOURCE]
    total = own + segment_sum(weight, TARGET, 3)
    own, weight = own / total, weight / total.gather(-1, at)
    return own, weight, tangent_bias(before, KEEP, SOURCE, TARGET, weight, own)


def logits_of(query, keys, before, own, weight, bias):
    """Logits of the merged entries [kept], and the log-sum-exp of their members [kept]."""
    means = keys[KEEP[0, 0]] * own[0, 0, :, None]
    sums = torch.full((3,), 0.0, dtype=torch.float64)
    logits = keys @ query + before[0, 0]
    sums += logits[KEEP[0, 0]].exp()
    for source, target, w in zip(SOURCE[0, 0], TARGET[0, 0], weight[0, 0], strict=True):
        if target >= 0:
            means[target] += w * keys[source]
            sums[target] += logits[source].exp()
    return means @ query + bias[0, 0], sums.log()


def test_the_bias_bounds_what_the_members_had_and_is_exact_for_the_query_of_the_weights():
    draw = torch.Generator().manual_seed(0)
    keys, seen, *others = (
        torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((LENGTH, DIM), *[(DIM,)] * 20)
    )
    before = torch.rand(1, 1, LENGTH, generator=draw, dtype=torch.float64)
    shares = (keys @ seen + before[0, 0]).softmax(-1)
    parts = merged(shares, before)
    entries, members = logits_of(seen, keys, before, *parts)
    torch.testing.assert_close(entries, members)
    for query in others:
        entries, members = logits_of(query, keys, before, *parts)
        assert (entries <= members + 1e-12).all()
        assert (entries[:2] < members[:2] - 1e-6).any()


def test_equal_weights_give_the_logarithm_of_the_mass_and_a_lone_entry_keeps_its_bias():
    own, weight, bias = merged(torch.full((LENGTH,), 0.1, dtype=torch.float64), None)
    torch.testing.assert_close(bias[0, 0].exp(), torch.tensor([5.0, 5.0, 1.0], dtype=torch.float64))
    had = torch.full((1, 1, LENGTH), 0.7, dtype=torch.float64)
    assert tangent_bias(had, KEEP, SOURCE, TARGET, weight, own)[0, 0, 2] == had[0, 0, 11]
