"""Column sums, matching and merging on a GPU, in Triton: what `statistics`, `match` and `merge` do in torch, fused.

Imported only where a CUDA tensor comes in and Triton is installed. With TRITON_INTERPRET=1 the same code runs on a
CPU, which is how it is tested there. Half-precision numbers are multiplied as they are and summed in float32.
"""

# Triton gives a kernel's arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = 1.4426950408889634
_SIZES = ["rows", "length", "sources", "targets", "kept", "members"]  # a number that changes compiles nothing anew


@triton.jit
def _tile(base, at, row_stride, dim, width: tl.constexpr, there):
    """Rows `at` of a matrix of `dim` columns, zeros where not `there`: [rows, width]."""
    channel = tl.arange(0, width)
    inside = there[:, None] & (channel < dim)[None, :]
    return tl.load(base + at.to(tl.int64)[:, None] * row_stride + channel[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=_SIZES)
def _log_sum_exp(
    queries, keys, out, scaling, rows, length, dim, heads, group, sqb, sqh, sqr, skb, skh, skl,
    width: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Logarithm, base 2, of each row's sum of exponentials: float32 [batch, heads, rows]."""
    head = tl.program_id(1)
    b, h = (head // heads).to(tl.int64), head % heads
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    row = block * block_rows + tl.arange(0, block_rows)
    first = length - rows + block * block_rows  # what the first row sees last
    q = _tile(queries + b * sqb + h.to(tl.int64) * sqh, row, sqr, dim, width, row < rows)
    base = keys + b * skb + (h // group).to(tl.int64) * skh
    best = tl.full((block_rows,), -1e30, tl.float32)
    total = tl.zeros((block_rows,), tl.float32)
    seen_by_all = (first + 1) // block_columns * block_columns
    for start in range(0, seen_by_all, block_columns):
        column = start + tl.arange(0, block_columns)
        k = _tile(base, column, skl, dim, width, column < length)
        products = tl.dot(q, tl.trans(k), input_precision=precision)
        larger = tl.maximum(best, tl.max(products, 1) * scaling)
        weight = tl.exp2(products * scaling - larger[:, None])
        total = total * tl.exp2(best - larger) + tl.sum(weight, 1)
        best = larger
    for start in range(seen_by_all, tl.minimum(length, first + block_rows), block_columns):
        column = start + tl.arange(0, block_columns)
        k = _tile(base, column, skl, dim, width, column < length)
        products = tl.dot(q, tl.trans(k), input_precision=precision)
        visible = column[None, :] <= (length - rows + row)[:, None]
        logits = tl.where(visible & (column < length)[None, :], products * scaling, float("-inf"))
        larger = tl.maximum(best, tl.max(logits, 1))
        total = total * tl.exp2(best - larger) + tl.sum(tl.exp2(logits - larger[:, None]), 1)
        best = larger
    tl.store(out + head.to(tl.int64) * rows + row, best + tl.log2(total), mask=row < rows)


@triton.jit
def _weights(
    k, base, normal, kind, start, scaling, rows, dim, sqr, kinds,
    width: tl.constexpr, block_rows: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Of a block of rows: the exponent of each weight, [columns, rows], and what the rows count for in each kind."""
    row = start + tl.arange(0, block_rows)
    q = _tile(base, row, sqr, dim, width, row < rows)
    norm = tl.load(normal + row, mask=row < rows, other=0.0)
    exponent = tl.dot(k, tl.trans(q), input_precision=precision) * scaling - norm[None, :]
    one = tl.load(kind + row, mask=row < rows, other=0.0)
    two = tl.load(kind + (kinds - 1) * rows + row, mask=row < rows, other=0.0)
    return row, exponent, one[None, :], two[None, :]


@triton.jit(do_not_specialize=_SIZES)
def _column_sums(
    queries, keys, normal, weights, out, scaling, rows, length, dim, heads, group, kinds,
    sqb, sqh, sqr, skb, skh, skl,
    width: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """What a block of columns receives from all rows that see it, for two kinds of rows: no atomic additions."""
    head = tl.program_id(1)
    b, h = (head // heads).to(tl.int64), head % heads
    first = tl.program_id(0) * block_columns
    column = first + tl.arange(0, block_columns)
    k = _tile(keys + b * skb + (h // group).to(tl.int64) * skh, column, skl, dim, width, column < length)
    base = queries + b * sqb + h.to(tl.int64) * sqh
    norms, kind = normal + head.to(tl.int64) * rows, weights + b * kinds * rows
    one = tl.zeros((block_columns,), tl.float32)
    two = tl.zeros((block_columns,), tl.float32)
    ahead = length - rows  # columns before the first row's own
    begin = tl.maximum(0, first - ahead) // block_rows * block_rows  # rows before do not see the block
    see_all = tl.cdiv(tl.maximum(0, first + block_columns - 1 - ahead), block_rows) * block_rows
    for start in range(begin, tl.minimum(see_all, rows), block_rows):
        row, exponent, of_one, of_two = _weights(
            k, base, norms, kind, start, scaling, rows, dim, sqr, kinds, width, block_rows, precision
        )
        weight = tl.where(column[:, None] <= (ahead + row)[None, :], tl.exp2(exponent), 0.0)
        one += tl.sum(weight * of_one, 1)
        two += tl.sum(weight * of_two, 1)
    for start in range(see_all, rows, block_rows):
        _, exponent, of_one, of_two = _weights(
            k, base, norms, kind, start, scaling, rows, dim, sqr, kinds, width, block_rows, precision
        )
        weight = tl.exp2(exponent)
        one += tl.sum(weight * of_one, 1)
        two += tl.sum(weight * of_two, 1)
    goal = out + head.to(tl.int64) * kinds * length + column
    tl.store(goal, one, mask=column < length)
    tl.store(goal + (kinds - 1) * length, two, mask=column < length)


#: Rows and columns of a tile of logits, and warps: measured on an H200, one and the other pass of column sums.
_NORMS = {"block_rows": 128, "block_columns": 64, "num_warps": 4}
_SUMS = {"block_rows": 64, "block_columns": 128, "num_warps": 8}
_MATCH = {"block_rows": 64, "block_columns": 64}
_WIDE = {"block_rows": 32, "block_columns": 32}  # float32, which is not multiplied by tensor cores


def _shape(x: Tensor) -> dict[str, object]:
    """What a kernel is compiled for: channels up to a power of two, and how float32 is multiplied."""
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    return {"width": max(16, triton.next_power_of_2(x.shape[-1])), "precision": precision}


def _blocks(x: Tensor, blocks: dict[str, int]) -> dict[str, int]:
    return _WIDE if x.dtype == torch.float32 else blocks


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
    sizes = rows, length, dim, heads, heads // kv_heads
    scaling = scaling * _LOG2_E
    blocks = _blocks(keys, _NORMS)
    grid = triton.cdiv(rows, blocks["block_rows"]), batch * heads
    _log_sum_exp[grid](queries, keys, normal, scaling, *sizes, *strides, **blocks, **_shape(keys))
    blocks = _blocks(keys, _SUMS)
    grid = triton.cdiv(length, blocks["block_columns"]), batch * heads
    _column_sums[grid](
        queries, keys, normal, weights, out, scaling, *sizes, kinds, *strides, **blocks, **_shape(keys)
    )
    return out


@triton.jit(do_not_specialize=_SIZES)
def _nearest(
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
    if restricted:
        kind = tl.load(label + head * sources + row, mask=row < sources, other=0)
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
            for choice in range(labels):
                may = tl.load(allowed + (head * labels + choice) * targets + column, mask=inside, other=0)
                open_ &= (kind != choice)[:, None] | (may != 0)[None, :]
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
        blocks = _blocks(keys, _MATCH)
        _nearest[triton.cdiv(sources, blocks["block_rows"]), batch * kv_heads](
            keys, source.contiguous(), target.contiguous(), norm,
            allowed.to(torch.uint8).contiguous() if allowed is not None else norm,
            label.contiguous() if label is not None else norm,
            index, cosine, sources, targets, length, dim, kv_heads, allowed.shape[2] if allowed is not None else 0,
            *keys.stride()[:3], restricted=restricted, **blocks, **_shape(keys),
        )  # fmt: skip
    return index, cosine


@triton.jit(do_not_specialize=_SIZES)
def _merge(
    x, keep, member, start, weight, own, out, entries, members, dim, heads, sxb, sxh, sxl,
    width: tl.constexpr, block_rows: tl.constexpr,
):  # fmt: skip
    """One entry: its own row and, a block after the other, those of its members, which lie side by side."""
    head = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0)
    channel = tl.arange(0, width)
    base = x + head // heads * sxb + head % heads * sxh
    at = tl.load(keep + head * entries + entry)
    original = tl.load(base + at * sxl + channel, mask=channel < dim, other=0.0)
    first, stop = tl.load(start + head * (entries + 1) + entry), tl.load(start + head * (entries + 1) + entry + 1)
    total = original.to(tl.float32) * tl.load(own + head * entries + entry)
    for begin in range(first, stop, block_rows):
        row = begin + tl.arange(0, block_rows)
        source = tl.load(member + head * members + row, mask=row < stop, other=0)
        rows = _tile(base, source, sxl, dim, width, row < stop).to(tl.float32)
        total += tl.sum(rows * tl.load(weight + head * members + row, mask=row < stop, other=0.0)[:, None], 0)
    merged = tl.where(stop > first, total.to(original.dtype), original)  # one without members is a copy
    tl.store(out + (head * entries + entry) * dim + channel, merged, mask=channel < dim)


def merge(x: Tensor, keep: Tensor, source: Tensor, target: Tensor, weight: Tensor, own: Tensor) -> Tensor:
    """As `merge.merge`, a segment at a time: members are sorted by target, so that no addition is atomic."""
    batch, kv_heads, entries = keep.shape
    x = _rows_apart(x)
    segment, order = target.sort(dim=-1, stable=True)
    ends = torch.arange(entries + 1, device=x.device).expand(batch, kv_heads, -1).contiguous()
    start = torch.searchsorted(segment.contiguous(), ends)
    out = torch.empty(batch, kv_heads, entries, x.shape[-1], dtype=x.dtype, device=x.device)
    _merge[entries, batch * kv_heads](
        x, keep.contiguous(), source.gather(-1, order), start, weight.gather(-1, order), own.contiguous(), out,
        entries, source.shape[-1], x.shape[-1], kv_heads, *x.stride()[:3], block_rows=16, width=_shape(x)["width"],
    )  # fmt: skip
    return out
