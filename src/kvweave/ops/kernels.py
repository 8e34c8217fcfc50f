"""Column sums, matching and merging on a GPU, in Triton: what `statistics`, `match` and `merge` do in torch, fused.

Imported only where a CUDA tensor comes in and Triton is installed. With TRITON_INTERPRET=1 the same code runs on a
CPU, which is how it is tested there. Half-precision numbers are multiplied as they are and summed in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 64, 64  # of a tile of logits


@triton.jit
def _tile(base, at, row_stride, dim, width: tl.constexpr, there):  # type: ignore[no-untyped-def]
    """Rows `at` of a matrix of `dim` columns, zeros where not `there`: [rows, width]."""
    channel = tl.arange(0, width)
    inside = there[:, None] & (channel < dim)[None, :]
    return tl.load(base + at.to(tl.int64)[:, None] * row_stride + channel[None, :], mask=inside, other=0.0)


@triton.jit
def _logits(q, k, column, position, scaling, seen, precision: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scaled products, -inf where a row does not see a column."""
    products = tl.dot(q, tl.trans(k), input_precision=precision) * scaling
    visible = (column[None, :] <= position[:, None]) & seen
    return tl.where(visible, products, float("-inf"))


@triton.jit
def _log_sum_exp(  # type: ignore[no-untyped-def]
    queries, keys, out, scaling, rows, length, dim, heads, group, sqb, sqh, sqr, skb, skh, skl,
    width: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Logarithm of each row's sum of exponentials, float32 [batch, heads, rows]."""
    head = tl.program_id(1)
    b, h = head // heads, head % heads
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    position = length - rows + row
    q = _tile(queries + b.to(tl.int64) * sqb + h.to(tl.int64) * sqh, row, sqr, dim, width, row < rows)
    base = keys + b.to(tl.int64) * skb + (h // group).to(tl.int64) * skh
    best = tl.full((block_rows,), -1e30, tl.float32)
    total = tl.zeros((block_rows,), tl.float32)
    for start in range(0, tl.minimum(length, length - rows + (tl.program_id(0) + 1) * block_rows), block_columns):
        column = start + tl.arange(0, block_columns)
        k = _tile(base, column, skl, dim, width, column < length)
        logits = _logits(q, k, column, position, scaling, (column < length)[None, :], precision)
        larger = tl.maximum(best, tl.max(logits, 1))
        total = total * tl.exp(best - larger) + tl.sum(tl.exp(logits - larger[:, None]), 1)
        best = larger
    tl.store(out + head.to(tl.int64) * rows + row, best + tl.log(total), mask=row < rows)


@triton.jit
def _column_sums(  # type: ignore[no-untyped-def]
    queries, keys, normal, weights, out, scaling, rows, length, dim, heads, group, kinds,
    sqb, sqh, sqr, skb, skh, skl,
    width: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """What a block of columns receives from all rows that see it, for two kinds of rows: no atomic additions."""
    head = tl.program_id(1)
    b, h = head // heads, head % heads
    first = tl.program_id(0) * block_columns
    column = first + tl.arange(0, block_columns)
    k = _tile(keys + b.to(tl.int64) * skb + (h // group).to(tl.int64) * skh, column, skl, dim, width, column < length)
    base = queries + b.to(tl.int64) * sqb + h.to(tl.int64) * sqh
    one = tl.zeros((block_columns,), tl.float32)
    two = tl.zeros((block_columns,), tl.float32)
    begin = tl.maximum(0, first - (length - rows)) // block_rows * block_rows  # rows before do not see the block
    for start in range(begin, rows, block_rows):
        row = start + tl.arange(0, block_rows)
        q = _tile(base, row, sqr, dim, width, row < rows)
        logits = _logits(q, k, column, length - rows + row, scaling, (row < rows)[:, None], precision)
        weight = tl.exp(
            logits - tl.load(normal + head.to(tl.int64) * rows + row, mask=row < rows, other=0.0)[:, None]
        )
        kind = weights + b.to(tl.int64) * kinds * rows + row
        one += tl.sum(weight * tl.load(kind, mask=row < rows, other=0.0)[:, None], 0)
        two += tl.sum(weight * tl.load(kind + (kinds - 1) * rows, mask=row < rows, other=0.0)[:, None], 0)
    goal = out + head.to(tl.int64) * kinds * length + column
    tl.store(goal, one, mask=column < length)
    tl.store(goal + (kinds - 1) * length, two, mask=column < length)


def _shape(x: Tensor) -> dict[str, object]:
    """What a kernel is compiled for: channels up to a power of two, and how float32 is multiplied."""
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    return {"width": max(16, triton.next_power_of_2(x.shape[-1])), "precision": precision}


def _rows_apart(x: Tensor) -> Tensor:
    """`x` with its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def column_sums(queries: Tensor, keys: Tensor, scaling: float, row_weights: Tensor) -> Tensor:
    """As `statistics.column_sums`, causal, one or two kinds of rows: each row's log-sum-exp, then the sums."""
    batch, heads, rows, dim = queries.shape
    kv_heads, length = keys.shape[1:3]
    kinds = row_weights.shape[1]
    queries, keys = _rows_apart(queries), _rows_apart(keys)
    weights = row_weights.to(torch.float32).contiguous()
    normal = torch.empty(batch, heads, rows, dtype=torch.float32, device=keys.device)
    out = torch.empty(batch, heads, kinds, length, dtype=torch.float32, device=keys.device)
    strides = *queries.stride()[:3], *keys.stride()[:3]
    blocks = {"block_rows": _ROWS, "block_columns": _COLUMNS, **_shape(keys)}
    sizes = rows, length, dim, heads, heads // kv_heads
    _log_sum_exp[triton.cdiv(rows, _ROWS), batch * heads](queries, keys, normal, scaling, *sizes, *strides, **blocks)
    _column_sums[triton.cdiv(length, _COLUMNS), batch * heads](
        queries, keys, normal, weights, out, scaling, *sizes, kinds, *strides, **blocks
    )
    return out


@triton.jit
def _nearest(  # type: ignore[no-untyped-def]
    keys, source, target, norm, allowed, label, index, cosine, sources, targets, length, dim, heads, labels,
    skb, skh, skl, restricted: tl.constexpr,
    width: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """For a block of sources the best target so far, over one block of targets after the other."""
    head = tl.program_id(1).to(tl.int64)
    base = keys + head // heads * skb + head % heads * skh
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    at = tl.load(source + head * sources + row, mask=row < sources, other=0)
    mine = _tile(base, at, skl, dim, width, row < sources)
    best = tl.full((block_rows,), float("-inf"), tl.float32)
    where = tl.full((block_rows,), -1, tl.int32)
    for start in range(0, targets, block_columns):
        column = start + tl.arange(0, block_columns)
        inside = column < targets
        goal = tl.load(target + head * targets + column, mask=inside, other=0)
        goals = _tile(base, goal, skl, dim, width, inside)
        length_of = tl.load(norm + head * length + goal, mask=inside, other=1.0)
        similarity = tl.dot(mine, tl.trans(goals), input_precision=precision) / length_of[None, :]
        open_ = (row < sources)[:, None] & inside[None, :]
        if restricted:
            kind = tl.load(label + head * sources + row, mask=row < sources, other=0)
            choices = allowed + (head * labels + kind)[:, None] * targets + column[None, :]
            open_ = tl.load(choices, mask=open_, other=0) != 0
        similarity = tl.where(open_, similarity, float("-inf"))
        here, place = tl.max(similarity, 1, return_indices=True, return_indices_tie_break_left=True)
        where = tl.where(here > best, start + place, where)
        best = tl.maximum(best, here)
    own = tl.load(norm + head * length + at, mask=row < sources, other=1.0)
    tl.store(index + head * sources + row, where.to(tl.int64), mask=row < sources)
    tl.store(cosine + head * sources + row, tl.where(where < 0, 0.0, best / own), mask=row < sources)


def nearest(
    keys: Tensor, source: Tensor, target: Tensor, allowed: Tensor | None, label: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `match.nearest`: no [sources, targets] tensor, only the best so far."""
    batch, kv_heads, length, dim = keys.shape
    sources, targets = source.shape[-1], target.shape[-1]
    keys = _rows_apart(keys)
    norm = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32).clamp(min=1e-12).contiguous()
    index = torch.empty_like(source, memory_format=torch.contiguous_format)
    cosine = torch.empty(source.shape, dtype=torch.float32, device=keys.device)
    if sources:
        restricted = allowed is not None
        _nearest[triton.cdiv(sources, _ROWS), batch * kv_heads](
            keys, source.contiguous(), target.contiguous(), norm,
            allowed.to(torch.uint8).contiguous() if allowed is not None else norm,
            label.contiguous() if label is not None else norm,
            index, cosine, sources, targets, length, dim, kv_heads, allowed.shape[2] if allowed is not None else 0,
            *keys.stride()[:3], restricted=restricted, block_rows=_ROWS, block_columns=_COLUMNS, **_shape(keys),
        )  # fmt: skip
    return index, cosine


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    x, keep, member, start, weight, own, out, kept, members, dim, heads, sxb, sxh, sxl,
    width: tl.constexpr, block_rows: tl.constexpr,
):  # fmt: skip
    """One entry: its own row and, a block after the other, those of its members, which lie side by side."""
    head = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0)
    channel = tl.arange(0, width)
    base = x + head // heads * sxb + head % heads * sxh
    at = tl.load(keep + head * kept + entry)
    original = tl.load(base + at * sxl + channel, mask=channel < dim, other=0.0)
    first, stop = tl.load(start + head * (kept + 1) + entry), tl.load(start + head * (kept + 1) + entry + 1)
    total = original.to(tl.float32) * tl.load(own + head * kept + entry)
    for begin in range(first, stop, block_rows):
        row = begin + tl.arange(0, block_rows)
        source = tl.load(member + head * members + row, mask=row < stop, other=0)
        rows = _tile(base, source, sxl, dim, width, row < stop).to(tl.float32)
        total += tl.sum(rows * tl.load(weight + head * members + row, mask=row < stop, other=0.0)[:, None], 0)
    merged = tl.where(stop > first, total.to(original.dtype), original)  # one without members is a copy
    tl.store(out + (head * kept + entry) * dim + channel, merged, mask=channel < dim)


def merge(x: Tensor, keep: Tensor, source: Tensor, target: Tensor, weight: Tensor, own: Tensor) -> Tensor:
    """As `merge.merge`, a segment at a time: members are sorted by target, so that no addition is atomic."""
    batch, kv_heads, kept = keep.shape
    x = _rows_apart(x)
    segment, order = target.sort(dim=-1, stable=True)
    ends = torch.arange(kept + 1, device=x.device).expand(batch, kv_heads, -1).contiguous()
    start = torch.searchsorted(segment.contiguous(), ends)
    out = torch.empty(batch, kv_heads, kept, x.shape[-1], dtype=x.dtype, device=x.device)
    _merge[kept, batch * kv_heads](
        x, keep.contiguous(), source.gather(-1, order), start, weight.gather(-1, order), own.contiguous(), out,
        kept, source.shape[-1], x.shape[-1], kv_heads, *x.stride()[:3], block_rows=16, width=_shape(x)["width"],
    )  # fmt: skip
    return out
