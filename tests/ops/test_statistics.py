"""Streamed statistics against dense attention, and the fast ways of matching and merging against plain ones."""

import pytest
import torch

from kvweave.ops import match
from kvweave.ops.match import nearest, take, unit
from kvweave.ops.merge import merge
from kvweave.ops.statistics import AttentionRule, column_sums, flow_ratio, received, window_attention

BATCH, LENGTH, DIM = 2, 150, 16  # longer than a block of 128 rows


def tensors(heads=4, kv_heads=2, rows=LENGTH, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    queries = torch.randn(BATCH, heads, rows, DIM, generator=generator, dtype=torch.float64) * 2
    keys = torch.randn(BATCH, kv_heads, LENGTH, DIM, generator=generator, dtype=torch.float64)
    visual = torch.rand(BATCH, LENGTH, generator=generator) < 0.6
    return queries.to(dtype), keys.to(dtype), visual


def full_mask(kind, heads, rows):
    """A mask of [batch, 1 or heads, rows, length]; with "padded" some rows see nothing."""
    generator = torch.Generator().manual_seed(8)
    causal = torch.ones(rows, LENGTH, dtype=torch.bool).tril(LENGTH - rows)
    seen = (torch.rand(BATCH, heads if kind == "per head" else 1, rows, LENGTH, generator=generator) < 0.7) & causal
    if kind == "padded":
        seen = causal.expand(BATCH, 1, -1, -1).clone()
        seen[0, :, :, :40] = False  # left padding: in row 0 of the batch the first queries see nothing
    else:
        seen |= torch.eye(rows, LENGTH, dtype=torch.bool).roll(LENGTH - rows, 1)
    if kind != "additive":
        return seen
    bias = torch.randn(seen.shape, generator=generator)
    return bias.masked_fill(~seen, torch.finfo(torch.float32).min)


def dense(queries, keys, rule, mask):
    """Attention [batch, heads, rows, length] in float64, a row that sees nothing attends to nothing."""
    heads, rows = queries.shape[1:3]
    keys = keys.double().repeat_interleave(heads // keys.shape[1], 1)
    logits = queries.double() @ keys.mT * rule.scaling
    if rule.softcap is not None:
        logits = rule.softcap * torch.tanh(logits / rule.softcap)
    if mask is None:
        mask = torch.ones(rows, LENGTH, dtype=torch.bool).tril(LENGTH - rows)
    if mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, -torch.inf)
    else:
        logits = (logits + mask).masked_fill(mask == torch.finfo(mask.dtype).min, -torch.inf)
    if rule.sinks is not None:
        sinks = rule.sinks.double()[None, :, None, None].expand(BATCH, -1, rows, 1)
        return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1].nan_to_num(0)
    return logits.softmax(-1).nan_to_num(0)


CASES = {
    "causal": {},
    "float64": {"dtype": torch.float64},
    "one head a group": {"heads": 2},
    "one KV head": {"heads": 3, "kv_heads": 1},
    "boolean mask": {"mask": "boolean"},
    "additive mask": {"mask": "additive"},
    "mask per head": {"mask": "per head"},
    "padded rows": {"mask": "padded"},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "sinks, softcap, padded rows": {"sinks": True, "softcap": 3.0, "mask": "padded"},
    "last rows": {"rows": 37},
    "last rows, mask per head": {"rows": 37, "mask": "per head"},
    "last rows, sinks": {"rows": 131, "sinks": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16, "mask": "boolean"},
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    options = dict(request.param)
    kind, sinks, softcap = (options.pop(name, None) for name in ("mask", "sinks", "softcap"))
    queries, keys, visual = tensors(**options)
    heads, rows = queries.shape[1:3]
    mask = None if kind is None else full_mask(kind, heads, rows)
    rule = AttentionRule(
        0.3,
        None if mask is None else lambda start, stop: mask[:, :, start:stop],
        softcap,
        torch.linspace(-1, 4, heads) if sinks else None,
    )
    return queries, keys, visual, rule, dense(queries, keys, rule, mask)


def close(actual, expected, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert actual.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(
        actual.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()
    )


def test_column_sums_equal_dense_attention(case):
    queries, keys, visual, rule, attention = case
    row_visual = visual[:, LENGTH - queries.shape[2] :]
    kinds = torch.stack([~row_visual, row_visual], 1)
    sums = column_sums(queries, keys, rule, kinds)
    close(sums, kinds.double()[:, None] @ attention, keys.dtype)


@pytest.mark.parametrize("window", [1, 32, LENGTH + 5])
def test_window_attention_equals_dense_attention(case, window):
    queries, keys, _, rule, attention = case
    window = min(window, queries.shape[2])
    received = attention[:, :, attention.shape[2] - window :].sum(2)
    expected = received.unflatten(1, (keys.shape[1], -1)).mean(2)
    close(window_attention(queries, keys, rule, window), expected, keys.dtype)


@pytest.mark.parametrize("reach", [1, 40, LENGTH])
@pytest.mark.parametrize("reduction", [("max", "max"), ("mean", "mean")], ids="-".join)
def test_attention_that_reaches_back_equals_dense_attention(case, reach, reduction):
    """What is paid to tokens nearer than that is left out, in whatever blocks the rows come."""
    queries, keys, _, rule, attention = case
    rows_by, heads_by = reduction
    rows = torch.arange(LENGTH - queries.shape[2], LENGTH)
    far = attention * (rows[:, None] - torch.arange(LENGTH) >= reach)
    by_head = far.unflatten(1, (keys.shape[1], -1))
    by_row = by_head.amax(2) if heads_by == "max" else by_head.mean(2)
    expected = by_row.amax(2) if rows_by == "max" else by_row.sum(2)
    found = received(queries, keys, rule, rows_by, heads_by, reach=reach)
    close(found, expected, keys.dtype) if expected.any() else torch.testing.assert_close(found.double(), expected)


def test_flow_ratio_equals_dense_attention(case):
    queries, keys, visual, rule, attention = case
    row_visual = visual[:, LENGTH - queries.shape[2] :]
    kinds = torch.stack([~row_visual, row_visual], 1)
    sums = column_sums(queries, keys, rule, kinds)
    flow = flow_ratio(sums, visual[:, None].expand(-1, keys.shape[1], -1), row_visual)
    crosses = row_visual[:, None, :, None] != visual[:, None, None, :]
    expected = (attention * crosses).sum(-1).mean((1, 2))
    close(flow.literal, expected, keys.dtype)


def test_inputs_that_require_gradients():
    queries, keys, visual = tensors()
    kinds = torch.stack([~visual, visual], 1)
    rule = AttentionRule(0.3)
    expected = column_sums(queries, keys, rule, kinds)
    sums = column_sums(queries.requires_grad_(), keys.requires_grad_(), rule, kinds)
    assert not sums.requires_grad
    assert torch.equal(sums, expected)


def split(length=230, kept=90, kv_heads=3, seed=0):
    """A random cut: (keep, source), each ascending."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(BATCH, kv_heads, length, generator=generator).argsort(-1)
    return order[..., :kept].sort(-1).values, order[..., kept:].sort(-1).values


@pytest.mark.parametrize("block", [1 << 7, 1 << 12, 1 << 20])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("restricted", [False, True], ids=["any", "by label"])
def test_nearest_equals_the_plain_search(monkeypatch, block, ties, restricted):
    monkeypatch.setattr(match, "_SIMILARITIES", block)
    generator = torch.Generator().manual_seed(3)
    keep, source = split()
    keys = torch.randn(BATCH, 3, 230, DIM, generator=generator, dtype=torch.float64)
    if ties:  # few directions, so that many targets are equally near
        keys = torch.eye(DIM, dtype=torch.float64)[torch.randint(0, 3, (BATCH, 3, 230), generator=generator)]
    allowed = label = None
    similarity = unit(take(keys, source)) @ unit(take(keys, keep)).mT
    if restricted:
        allowed = torch.rand(BATCH, 3, 2, keep.shape[-1], generator=generator) < 0.3
        allowed[1, 2, 0] = False  # nothing for this label
        label = torch.randint(0, 2, source.shape, generator=generator)
        permitted = torch.stack(
            [torch.stack([a[x] for a, x in zip(*pair, strict=True)]) for pair in zip(allowed, label, strict=True)]
        )
        similarity = similarity.masked_fill(~permitted, -torch.inf)
    best, at = similarity.max(-1)
    index, cosine = nearest(keys, source, keep, allowed, label)
    assert torch.equal(index, at.masked_fill(best == -torch.inf, -1))
    torch.testing.assert_close(cosine, best.masked_fill(best == -torch.inf, 0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["contiguous", "heads behind tokens", "slice"])
def test_take_equals_gather(layout):
    x = torch.randn(BATCH, 3, 230, DIM)
    if layout == "heads behind tokens":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "slice":
        x = torch.randn(BATCH, 3, 260, 2 * DIM)[:, :, 10:240, ::2]
    for index in (*split(), split(kept=0)[0], split(kept=5)[0][..., [2, 2, 0]]):
        assert torch.equal(take(x, index), x.gather(2, index[..., None].expand(*index.shape, DIM)))


@pytest.mark.parametrize("block", [1, 7, 4096])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merge_equals_plain_loops(block, dtype):
    generator = torch.Generator().manual_seed(4)
    keep, source = split(length=40, kept=9)
    x = torch.randn(BATCH, 3, 40, DIM, generator=generator).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    target = torch.randint(-1, 6, source.shape, generator=generator)  # the last kept tokens stay alone
    weight = torch.rand(source.shape, generator=generator, dtype=wide)
    own = torch.rand(keep.shape, generator=generator, dtype=wide)
    merged = merge(x, keep, source, target, weight, own, block)
    assert merged.dtype == dtype
    for b in range(BATCH):
        for h in range(3):
            for n, slot in enumerate(keep[b, h].tolist()):
                members = (target[b, h] == n).nonzero().flatten()
                expected = x[b, h, slot].to(wide)
                if len(members):
                    rows = x[b, h, source[b, h, members]].to(wide)
                    expected = expected * own[b, h, n] + (rows * weight[b, h, members, None]).sum(0)
                torch.testing.assert_close(merged[b, h, n], expected.to(dtype))
                if not len(members):
                    assert torch.equal(merged[b, h, n], x[b, h, slot])
