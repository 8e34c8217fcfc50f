"""Attention of one decoded token over what memory holds, on a GPU, in Triton: the slots are split over the chip.

Torch's own kernels read a bias on the logits, and heads of different counts, with a thread block a head: a hundredth
of the chip at batch 1. Here each block reads a run of slots for all query heads of a KV head, and a second kernel
puts the runs together by their sums of exponentials (Flash-Decoding). Packed slots are unpacked in registers.
Imported where a CUDA tensor comes in; with TRITON_INTERPRET=1 the same code runs on a CPU.
"""

# Triton gives a kernel's arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvweave.ops.quantize import Packed

_LOG2_E = 1.4426950408889634
_SLOTS, _WARPS = 64, 4  # of a tile
_BLOCKS = 3  # thread blocks that a multiprocessor holds at a time: one more would wait for all others
_NUMBERS = ["slots", "run", "splits", "before", "tail"]  # that change from step to step: nothing is compiled anew


@triton.jit
def _query(queries, b, h, group, dim, sqb, sqh, rows: tl.constexpr, width: tl.constexpr):
    """The query heads of a KV head: [rows, width], zeros beyond."""
    row, channel = tl.arange(0, rows), tl.arange(0, width)
    inside = (row < group)[:, None] & (channel < dim)[None, :]
    return tl.load(queries + b * sqb + h * sqh + row[:, None] * dim + channel[None, :], mask=inside, other=0.0)


@triton.jit
def _running(best, total, out, logits, v, precision: tl.constexpr):
    """A softmax that goes on over a tile: largest logit, sum of weights, weighted sum of values."""
    larger = tl.maximum(best, tl.max(logits, 1))
    fades = tl.exp2(best - larger)
    weight = tl.exp2(logits - larger[:, None])
    total = total * fades + tl.sum(weight, 1)
    out = out * fades[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=precision)
    return larger, total, out


@triton.jit
def _store(sums, norms, at, best, total, out, rows: tl.constexpr, width: tl.constexpr):
    """A run's weighted mean, and the logarithm, base 2, of its weights' sum; -inf where it holds nothing."""
    goal = at * rows + tl.arange(0, rows)
    tl.store(norms + goal, best + tl.log2(total))
    tl.store(sums + goal[:, None] * width + tl.arange(0, width)[None, :], out / tl.maximum(total, 1e-30)[:, None])


@triton.jit(do_not_specialize=_NUMBERS)
def _part(
    queries, keys, values, bias, table, sums, norms, scaling, slots, tail, run, before, splits,
    dim, value_dim, kv_heads, group, sqb, sqh, skb, skh, skl, svb, svh, svl, sbb, sbh,
    biased: tl.constexpr, uneven: tl.constexpr, aligned: tl.constexpr,
    rows: tl.constexpr, width: tl.constexpr, value_width: tl.constexpr, tile: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """One run of slots of one KV head; where heads are `uneven`, a table says where each head's slots lie."""
    split, head = tl.program_id(0), tl.program_id(1)
    b, h = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    q = _query(queries, b, h, group, dim, sqb, sqh, rows, width)
    if uneven:
        entry = table + h * 5
        capacity = tl.load(entry + 4)
        key_base = tl.load(entry).to(tl.pointer_type(keys.dtype.element_ty)) + b * capacity * dim
        value_base = tl.load(entry + 1).to(tl.pointer_type(values.dtype.element_ty)) + b * capacity * value_dim
        bias_base = tl.load(entry + 2).to(tl.pointer_type(bias.dtype.element_ty)) + b * capacity
        slots = tl.load(entry + 3).to(tl.int32) + tail
        key_base, value_base = tl.multiple_of(key_base, aligned), tl.multiple_of(value_base, aligned)
    else:
        key_base, value_base = keys + b * skb + h * skh, values + b * svb + h * svh
        bias_base = bias + b * sbb + h * sbh
    channel, value_channel = tl.arange(0, width), tl.arange(0, value_width)
    best = tl.full((rows,), -1e30, tl.float32)  # finite: a run may hold nothing but empty slots
    total = tl.zeros((rows,), tl.float32)
    out = tl.zeros((rows, value_width), tl.float32)
    stop = tl.minimum(slots, (split + 1) * run)
    slot = split * run + tl.arange(0, tile)
    if biased:
        added = tl.load(bias_base + slot, mask=slot < stop, other=0.0)
    for start in range(split * run, stop, tile):
        slot = start + tl.arange(0, tile)
        inside = slot < stop
        at = slot.to(tl.int64)
        there = inside[None, :] & (channel < dim)[:, None]
        k = tl.load(key_base + at[None, :] * skl + channel[:, None], mask=there, other=0.0)
        logits = tl.dot(q, k, input_precision=precision) * scaling
        if biased:  # the next tile's is read while this one is computed
            logits += (added.to(tl.float32) * 1.4426950408889634)[None, :]
            added = tl.load(bias_base + slot + tile, mask=slot + tile < stop, other=0.0)
        logits = tl.where(inside[None, :], logits, float("-inf"))
        there = inside[:, None] & (value_channel < value_dim)[None, :]
        v = tl.load(value_base + at[:, None] * svl + value_channel[None, :], mask=there, other=0.0)
        best, total, out = _running(best, total, out, logits, v, precision)
    _store(sums, norms, head.to(tl.int64) * splits + before + split, best, total, out, rows, value_width)


@triton.jit
def _codes(base, at, stride, dim, inside, bits: tl.constexpr, width: tl.constexpr, dtype: tl.constexpr):
    """Rows `at` of packed numbers, 8 / bits to a byte: [tile, width] in `dtype`.

    Where a half precision has the digits, a code is written into those of a power of two, which is then taken off:
    converting an integer takes four times as long.
    """
    byte = tl.arange(0, width * bits // 8)
    there = inside[:, None] & (byte < dim * bits // 8)[None, :]
    read = tl.load(base + at[:, None] * stride + byte[None, :], mask=there, other=0)
    if bits == 8:
        codes = read
    elif bits == 4:
        codes = tl.interleave(read & 15, read >> 4)
    else:
        even = tl.interleave(read & 3, (read >> 4) & 3)
        codes = tl.interleave(even, tl.interleave((read >> 2) & 3, read >> 6))
    if dtype == tl.bfloat16 and bits < 8:
        numbers = (codes.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True) - 128.0
    elif dtype == tl.float16:
        numbers = (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1024.0
    else:
        numbers = codes.to(dtype)
    return numbers.to(dtype)


@triton.jit
def _by_part(base, at, parts, inside, tile: tl.constexpr, share: tl.constexpr, width: tl.constexpr):
    """A number for each part of a token's channels, at each of them: [tile, width]."""
    part = tl.arange(0, width // share)
    there = inside[:, None] & (part < parts)[None, :]
    own = tl.load(base + at[:, None] * parts + part[None, :], mask=there, other=0.0)
    return tl.reshape(tl.broadcast_to(own[:, :, None], (tile, width // share, share)), (tile, width))


@triton.jit(do_not_specialize=_NUMBERS)
def _packed_part(
    queries, keys, key_scale, key_zero, values, value_scale, value_zero, bias, sums, norms,
    scaling, slots, run, splits, dim, value_dim, parts, kv_heads, group, sqb, sqh, sbb, sbh,
    biased: tl.constexpr, bits: tl.constexpr, share: tl.constexpr,
    rows: tl.constexpr, width: tl.constexpr, value_width: tl.constexpr, tile: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """One run of packed slots of one KV head; a tile is a group of tokens, whose keys share scales."""
    split, head = tl.program_id(0), tl.program_id(1)
    b, h = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    row = head.to(tl.int64) * slots  # of the first slot, among all
    q = _query(queries, b, h, group, dim, sqb, sqh, rows, width)
    channel = tl.arange(0, width)
    best = tl.full((rows,), -1e30, tl.float32)
    total = tl.zeros((rows,), tl.float32)
    out = tl.zeros((rows, value_width), tl.float32)
    stop = tl.minimum(slots, (split + 1) * run)
    for start in range(split * run, stop, tile):
        inside = start + tl.arange(0, tile) < stop
        at = row + start + tl.arange(0, tile)
        shared = (row + start) // tile * dim + channel
        scale = tl.load(key_scale + shared, mask=channel < dim, other=0.0)
        zero = tl.load(key_zero + shared, mask=channel < dim, other=0.0)
        k = _codes(keys, at, dim * bits // 8, dim, inside, bits, width, q.dtype) * scale[None, :] + zero[None, :]
        logits = tl.dot(q, tl.trans(k), input_precision=precision) * scaling
        if biased:
            slot = (start + tl.arange(0, tile)).to(tl.int64)
            added = tl.load(bias + b * sbb + h * sbh + slot, mask=inside, other=0.0).to(tl.float32)
            logits += (added * 1.4426950408889634)[None, :]
        scales = _by_part(value_scale, at, parts, inside, tile, share, value_width)
        zeros = _by_part(value_zero, at, parts, inside, tile, share, value_width)
        v = _codes(values, at, value_dim * bits // 8, value_dim, inside, bits, value_width, q.dtype) * scales + zeros
        best, total, out = _running(best, total, out, logits, v, precision)
    _store(sums, norms, head.to(tl.int64) * splits + split, best, total, out, rows, value_width)


@triton.jit(do_not_specialize=["splits"])
def _together(
    sums, norms, out, splits, value_dim, group, rows: tl.constexpr, value_width: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """The runs of one query head as one."""
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, value_width)
    best = -1e30
    total = 0.0
    mean = tl.zeros((value_width,), tl.float32)
    for start in range(0, splits, tile):
        split = start + tl.arange(0, tile)
        at = (head * splits + split) * rows + row
        norm = tl.load(norms + at, mask=split < splits, other=float("-inf"))
        part = tl.load(sums + at[:, None] * value_width + channel[None, :], mask=(split < splits)[:, None], other=0.0)
        larger = tl.maximum(best, tl.max(norm, 0))
        fades, weight = tl.exp2(best - larger), tl.exp2(norm - larger)
        mean = mean * fades + tl.sum(part * weight[:, None], 0)
        total = total * fades + tl.sum(weight, 0)
        best = larger
    goal = out + (head * group + row) * value_dim + channel
    tl.store(goal, (mean / tl.maximum(total, 1e-30)).to(out.dtype.element_ty), mask=channel < value_dim)


# ------------------------------------------------------------------------------------------- launches


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _run(slots: int, heads: int, device: torch.device, tile: int) -> int:
    """Slots of a run, whole tiles, so that all heads' runs fill the chip once."""
    runs = max(1, min(_BLOCKS * _multiprocessors(device) // heads, slots // tile))
    return -(-slots // (runs * tile)) * tile


def _even(x: Tensor) -> Tensor:
    """`x` with its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


@dataclass
class _Runs:
    """What the runs of all heads come to, and how a kernel over them is launched.

    Attributes:
        queries: [batch, kv_heads, group, dim].
        sums: float32 [batch * kv_heads, splits, rows, width], weighted means; norms: alike, without the last.
    """

    queries: Tensor
    value_dim: int
    splits: int

    def __post_init__(self) -> None:
        batch, kv_heads, group, dim = self.queries.shape
        self.queries = self.queries.contiguous()
        self.heads, self.group = batch * kv_heads, group
        wide = self.queries.dtype == torch.float32
        self.rows, self.width = (
            max(16, triton.next_power_of_2(group)),
            max(16, triton.next_power_of_2(self.value_dim)),
        )
        self.shape = {
            "rows": self.rows,
            "width": max(16, triton.next_power_of_2(dim)),
            "value_width": self.width,
            "precision": "ieee" if wide else "tf32",
            "num_warps": _WARPS,
        }
        make = functools.partial(torch.empty, dtype=torch.float32, device=self.queries.device)
        self.norms = make(self.heads, self.splits, self.rows)
        self.sums = make(self.heads, self.splits, self.rows, self.width)

    def add(
        self,
        keys: Tensor,
        values: Tensor,
        bias: Tensor | None,
        scaling: float,
        run: int,
        before: int = 0,
        table: Tensor | None = None,
        slots: int = 0,
        tail: int = 0,
        aligned: int = 1,
    ) -> None:
        """Runs of slots in full precision, the first of them number `before`.

        Args:
            table, slots, tail: of uneven heads, with the most slots that one holds.
            aligned: bytes that divide the address of every row of the table's buffers.
        """
        _, kv_heads, _, dim = self.queries.shape
        slots = slots or values.shape[2]
        strides = (0, 0) if bias is None else bias.stride()[:2]
        _part[triton.cdiv(slots, run), self.heads](
            self.queries, keys, values, self.norms if bias is None else bias, self.norms if table is None else table,
            self.sums, self.norms, scaling * _LOG2_E, slots, tail, run, before, self.splits,
            dim, self.value_dim, kv_heads, self.group, *self.queries.stride()[:2],
            *keys.stride()[:3], *values.stride()[:3], *strides,
            biased=bias is not None, uneven=table is not None, aligned=aligned, tile=_SLOTS, **self.shape,
        )  # fmt: skip

    def together(self) -> Tensor:
        """[batch, kv_heads, group, value_dim]."""
        batch, kv_heads = self.queries.shape[:2]
        out = self.queries.new_empty(batch, kv_heads, self.group, self.value_dim)
        _together[self.heads, self.group](
            self.sums, self.norms, out, self.splits, self.value_dim, self.group,
            rows=self.rows, value_width=self.width, tile=16 if self.splits <= 16 else 64,
        )  # fmt: skip
        return out


def attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """Attention of one token.

    Args:
        queries: [batch, kv_heads, group, dim], the query heads of each KV head.
        keys: [batch, kv_heads, slots, dim]; values: [batch, kv_heads, slots, value_dim].
        bias: [batch, kv_heads, slots], added to the logits, or None.
        scaling: of the logits.
    Returns:
        [batch, kv_heads, group, value_dim].
    """
    keys, values, bias = _even(keys), _even(values), None if bias is None else _even(bias)
    slots, value_dim = values.shape[2:]
    run = _run(slots, keys.shape[0] * keys.shape[1], keys.device, _SLOTS)
    runs = _Runs(queries, value_dim, triton.cdiv(slots, run))
    runs.add(keys, values, bias, scaling, run)
    return runs.together()


@functools.lru_cache(maxsize=1024)
def _table(places: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Where each head's slots lie, on the device: an address comes again as long as the buffers stay."""
    return torch.tensor(places, dtype=torch.int64).to(device)


def attend_uneven(
    queries: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    scaling: float,
    tail: int = 0,
) -> Tensor:
    """Attention of one token where each KV head holds a count of its own, all heads in one launch.

    Args:
        queries: [batch, kv_heads, group, dim].
        keys: of each KV head [batch, 1, slots, dim], the first slots of a buffer whose rows lie side by side;
            values: alike, [batch, 1, slots, value_dim].
        biases: of each KV head [batch, 1, slots], in buffers of as many slots, or None.
        scaling: of the logits.
        tail: slots at the end that came one by one to all heads: counts without them stay what they were, so that
            the table on the device does.
    Returns:
        [batch, kv_heads, group, value_dim].
    """
    first, device = keys[0], keys[0].device
    dim, value_dim = first.shape[3], values[0].shape[3]
    places = []
    for head, (k, v) in enumerate(zip(keys, values, strict=True)):
        capacity = k.stride(0) // dim
        added = k.data_ptr() if biases is None else biases[head].data_ptr()
        places.append((k.data_ptr(), v.data_ptr(), added, k.shape[2] - tail, capacity))
    slots = max(k.shape[2] for k in keys)
    run = _run(slots, first.shape[0] * len(keys), device, _SLOTS)
    runs = _Runs(queries, value_dim, triton.cdiv(slots, run))
    bias = None if biases is None else biases[0]
    rows = [x.shape[3] * x.element_size() for x in (first, values[0])]
    aligned = 16 if all(x % 16 == 0 for x in (*rows, *(at for place in places for at in place[:2]))) else 1
    table = _table(tuple(places), device)
    runs.add(first, values[0], bias, scaling, run, table=table, slots=slots, tail=tail, aligned=aligned)
    return runs.together()


def attend_packed(
    queries: Tensor,
    keys: Packed,
    values: Packed,
    young: tuple[Tensor, Tensor],
    bias: Tensor | None,
    scaling: float,
) -> Tensor:
    """Attention of one token over slots in few bits, and young ones in full precision behind them.

    Args:
        queries: [batch, kv_heads, group, dim].
        keys: of [batch, kv_heads, groups, tokens, dim], one scale for a channel of a group of tokens, which are a
            power of two, 16 at least.
        values: of [batch, kv_heads, slots, parts, channels], one scale for a part of a token's channels, which are a
            power of two where there are several parts.
        young: keys and values [batch, kv_heads, young, dim]; may be none.
        bias: [batch, kv_heads, slots + young], added to the logits, or None.
        scaling: of the logits.
    Returns:
        [batch, kv_heads, group, value_dim].
    """
    batch, kv_heads, _, dim = queries.shape
    slots, tile, parts = values.codes.shape[2], keys.codes.shape[3], values.codes.shape[3]
    value_dim = parts * values.codes.shape[4] * 8 // values.bits
    bias = None if bias is None else _even(bias)
    run = _run(slots, batch * kv_heads, queries.device, tile)
    splits = triton.cdiv(slots, run)
    count = young[0].shape[2]
    rest = _run(count, batch * kv_heads, queries.device, _SLOTS) if count else 1
    runs = _Runs(queries, value_dim, splits + triton.cdiv(count, rest))
    parts_of = [x.contiguous() for of in (keys, values) for x in (of.codes, of.scale, of.zero)]
    strides = (0, 0) if bias is None else bias.stride()[:2]
    _packed_part[splits, runs.heads](
        runs.queries, *parts_of, runs.norms if bias is None else bias, runs.sums, runs.norms,
        scaling * _LOG2_E, slots, run, runs.splits, dim, value_dim, parts, kv_heads, runs.group,
        *runs.queries.stride()[:2], *strides, biased=bias is not None, bits=keys.bits, tile=tile,
        share=value_dim // parts if parts > 1 else runs.width, **runs.shape,
    )  # fmt: skip
    if count:
        behind = None if bias is None else bias[:, :, slots:]
        runs.add(_even(young[0]), _even(young[1]), behind, scaling, rest, before=splits)
    return runs.together()
