"""The first tokens of a stream, which no cut touches: taken apart before it, and put in front of what it left."""

from dataclasses import replace

import torch
from torch import Tensor

from kvweave.memory.slots import Slots
from kvweave.ops.match import take
from kvweave.ops.select import ragged_places
from kvweave.plan import Compacted


def first_apart(slots: Slots, valid: Tensor, count: int) -> tuple[Slots | None, Slots]:
    """The first `count` tokens of each row's heads, and the slots with those left empty.

    Args:
        slots: with positions written out; valid: bool [batch, columns].
    """
    if not count:
        return None, slots
    assert slots.positions is not None
    assert slots.mass is not None
    real = real_slots(slots.positions, valid)
    ours = real & (real.cumsum(-1) <= count)
    index = ragged_places(ours)  # rows that are shorter have -1 in front
    at, none = index.clamp(min=0), index < 0
    first = Slots(
        take(slots.keys, at),
        take(slots.values, at),
        slots.positions.gather(-1, at).masked_fill(none, -1),
        slots.mass.gather(-1, at).masked_fill(none, 0),
        None if slots.bias is None else slots.bias.gather(-1, at).masked_fill(none, 0),
        has_empty=index.shape[-1] < count or bool(none.any()),
    )
    rest = replace(
        slots,
        positions=slots.positions.masked_fill(ours, -1),
        mass=slots.mass.masked_fill(ours, 0),
        has_empty=True,
        room=None,
    )
    return first, rest


def behind(first: Slots, rest: Compacted) -> Compacted:
    """What was kept behind the first tokens, and these; empty slots first."""
    assert first.positions is not None
    assert first.mass is not None
    bias = None
    if first.bias is not None or rest.bias is not None:
        parts = (first.bias, first.mass), (rest.bias, rest.mass)
        bias = torch.cat([torch.zeros_like(mass) if own is None else own for own, mass in parts], -1)
    joint = Compacted(
        torch.cat([first.keys, rest.keys], 2),
        torch.cat([first.values, rest.values], 2),
        torch.cat([first.positions, rest.positions], -1),
        torch.cat([first.mass, rest.mass], -1),
        rest.flow,
        bias,
        rest.full and not first.has_empty,
    )
    if joint.full:
        return joint
    order = joint.positions.argsort(stable=True, dim=-1)
    return replace(
        joint,
        keys=take(joint.keys, order),
        values=take(joint.values, order),
        positions=joint.positions.gather(-1, order),
        mass=joint.mass.gather(-1, order),
        bias=None if joint.bias is None else joint.bias.gather(-1, order),
    )


def real_slots(positions: Tensor, valid: Tensor) -> Tensor:
    """Slots that hold a real token, bool [batch, kv_heads, slots].

    Args:
        positions: int64 [batch, kv_heads, slots], -1: empty; valid: bool [batch, columns].
    """
    real = valid.to(positions.device).gather(1, positions.clamp(min=0).flatten(1)).view_as(positions)
    return real & (positions >= 0)
