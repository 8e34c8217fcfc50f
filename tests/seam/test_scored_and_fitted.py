"""Methods of SPEC 16 and 17 on a model: decoding is that of the full cache with all but the kept columns masked, with
the entries' own contents and biases in place; batches, deferred cuts, probes and later turns."""

import contextlib
import json

import pytest
import torch
from test_equals_masked_full_cache import check
from tiny import assert_close, cut_of, decode, masked, picture_inputs, text_inputs, text_model, vision_model

import kvweave

SCORED = ["tova", "keydiff", "knorm", "expected_attention", "leave_one_out", "defensive", "leverage", "tgv", "kvzip"]
EVICTING = [
    *SCORED,
    "snapkv:window=4,ahead=2,behind=1,rows_by=max,heads_by=max,allocation=global",
    "snapkv:window=4,allocation=layer",
    "weave:merge=false,recent=2,allocation=global,defer=0",
    "critical:method=snapkv,window=4",
    "critical:method=kvzip,first=0",
]
ENTRIES = [
    "fold:method=snapkv,window=4,spare=0",
    "fold:method=kvzip,sinks=1",
    "residual:method=snapkv,window=4,rows=6",
    "residual:method=kvzip,gate=false",
    "regress:method=snapkv,window=4,rows=8,fixed=2,gate=false",
    "match:rows=6,recent=4",
    "weave2:rows=8,recent=4,defer=0,gate=none",
    "weave:recent=2,allocation=global,defer=0",
]
LENGTHS = {"one prompt": (26,), "left-padded batch": (26, 19, 26, 5)}
lengths_of = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


@contextlib.contextmanager
def attached(model):
    handle = kvweave.attach(model)
    try:
        yield
    finally:
        handle.detach()


def method_of(text, **options):
    return kvweave.parse_method(text, budget=0.3, **options)


def kept_of(layer):
    return (layer.positions >= 0).sum(-1)


@lengths_of
@pytest.mark.parametrize("spelled", EVICTING)
def test_eviction_is_a_mask(spelled, lengths):
    session = check(vision_model(), picture_inputs(lengths, pictures=0), method_of(spelled))
    json.dumps(session.report)
    budgets = torch.tensor([max(1, int(0.3 * n)) for n in lengths])
    prompt = [(layer.positions >= 0) & (layer.positions < max(lengths)) for layer in session.cache.layers]
    total = sum(held.sum((1, 2)) for held in prompt)
    assert torch.equal(total, budgets * sum(held.shape[1] for held in prompt))
    for layer in session.report["layers"]:
        assert layer["kept"] + layer["merged"] + layer["evicted"] == layer["length"]


@lengths_of
@pytest.mark.parametrize("spelled", ENTRIES)
def test_entries_are_read_with_their_contents_and_biases(spelled, lengths):
    model, inputs = vision_model(), picture_inputs(lengths, pictures=0)
    with kvweave.compress(model, method_of(spelled)) as session:
        mine, logits = decode(model, inputs, 5)
    cut = cut_of(session.cache, max(lengths), merged=True)
    for number, seen in cut.bias.items():
        layer = session.cache.layers[number]
        if layer.bias is None:
            continue
        for row, head, slot in (layer.positions >= 0).nonzero().tolist():
            column = int(layer.positions[row, head, slot])
            if column < max(lengths):
                seen[row, head, column] += layer.bias[row, head, slot].double()
    with masked(model, cut):
        same, expected = decode(model, inputs, 5)
    assert_close(logits, expected)
    assert torch.equal(mine, same)


@pytest.mark.parametrize("spelled", [*SCORED, *ENTRIES])
def test_a_row_of_a_batch_gives_what_it_gives_alone(spelled):
    """Deferred by two tokens, so that statistics wait by row."""
    model, lengths = text_model(), (26, 19)
    method = method_of(spelled)
    method = kvweave.method_from_dict(method.to_dict() | {"defer": 2}) if "method=" not in spelled else method
    inputs = text_inputs(lengths)
    with kvweave.compress(model, method) as session:
        together, _ = decode(model, inputs, 5)
    caches = [session.cache]
    for row, length in enumerate(lengths):
        with kvweave.compress(model, method) as session:
            part = {name: x[row : row + 1, -length:] for name, x in inputs.items()}
            alone, _ = decode(model, part, 5)
        assert torch.equal(alone[0], together[row])
        for layer, whole in zip(session.cache.layers, caches[0].layers, strict=True):
            own, shared = layer.positions[0], whole.positions[row]
            for head in range(own.shape[0]):
                mine = own[head][own[head] >= 0] + max(lengths) - length
                assert torch.equal(mine, shared[head][shared[head] >= 0])


@pytest.mark.parametrize(
    "spelled", ["kvzip", "kvzip:allocation=layer", "match:rows=4", "residual:method=kvzip", "tova"]
)
def test_probes_say_what_stays(spelled):
    model, inputs = text_model(), text_inputs((26,))
    with kvweave.compress(model, method_of(spelled), probes=[[5, 6, 7], [9, 10]], probe_tokens=3) as session:
        decode(model, inputs, 4)
    unasked = method_of(f"{spelled}{',' if ':' in spelled else ':'}replay=false" if "kvzip" in spelled else spelled)
    plain = kvweave.CompressedCache(model.config, unasked)
    with attached(model):
        model(**inputs, past_key_values=plain)
    assert session.report["probes"]["count"] == 2
    mine = [layer.positions[..., : layer.positions.shape[-1] - 3] for layer in session.cache.layers]
    assert any(not torch.equal(a, b.positions) for a, b in zip(mine, plain.layers, strict=True))
    if spelled.startswith("kvzip"):
        assert session.report["rows"] == "probes"
        assert plain.report["rows"] == "prompt"


@pytest.mark.parametrize("spelled", ["kvzip", "tgv", *ENTRIES])
def test_a_later_turn_compresses_what_is_there(spelled):
    """15.1: masses go on adding up, biases stay with what stays."""
    model, inputs = text_model(), text_inputs((26, 19))
    cache = kvweave.CompressedCache(model.config, method_of(spelled))
    with attached(model):
        model(**inputs, past_key_values=cache)
        first = [layer.mass.sum(-1) for layer in cache.layers]
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 12, dtype=torch.long)], 1)
        more = torch.randint(5, 20, (2, 12), generator=torch.Generator().manual_seed(1))
        model(input_ids=more, attention_mask=mask, past_key_values=cache)
    for before, layer in zip(first, cache.layers, strict=True):
        assert (layer.mass.sum(-1) <= before + 12).all()
        assert layer.bias is None or layer.bias.isfinite().all()
        assert not layer.bias[layer.positions < 0].any() if layer.bias is not None else True
        assert not layer.keys.isnan().any()
        assert not layer.values.isnan().any()
    total = sum(kept_of(layer).sum(-1) for layer in cache.layers)
    heads = sum(layer.positions.shape[1] for layer in cache.layers)
    assert total.tolist() == [heads * int(0.3 * 38), heads * int(0.3 * 31)]


def test_critical_sees_the_output_projection():
    model, inputs = text_model(), text_inputs((26,))
    with kvweave.compress(model, method_of("critical:method=snapkv,window=4,first=0,offset=1e6")) as session:
        decode(model, inputs, 2)
    assert session.report["projected"] is True
    attention = model.model.layers[1].self_attn  # values of layer 0 are those of words, which repeat
    layer, whole = session.cache.layers[1], kvweave.CompressedCache(model.config, kvweave.Full())
    with attached(model):
        model(**inputs, past_key_values=whole)
    values, weight = whole.layers[1].values[0].double(), attention.o_proj.weight.double()
    dim, group = values.shape[-1], weight.shape[1] // values.shape[-1] // values.shape[0]
    for head in range(values.shape[0]):
        norms = torch.stack(
            [
                (values[head] @ weight[:, h * dim : (h + 1) * dim].T).abs().sum(-1)
                for h in range(head * group, (head + 1) * group)
            ]
        ).mean(0)
        recent = min(4, 7 // 2)
        best = norms[: 26 - recent].topk(7 - recent).indices.sort().values.tolist()
        mine = [p for p in layer.positions[0, head].tolist() if 0 <= p < 26 - recent]
        assert mine == best


@pytest.mark.parametrize("spelled", ["fold:method=snapkv", "match", "weave2", "residual:method=snapkv"])
def test_biases_are_refused_with_flash_attention(spelled):
    from kvweave.seam.filling import check_bias

    with pytest.raises(ValueError, match="flash"):
        check_bias(method_of(spelled), "flash_attention_2")
