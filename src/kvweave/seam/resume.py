"""A `generate` that goes on from a cache: what the cache has read is not read again."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvweave.prompt import given_images, visual_mask
from kvweave.seam import lookup
from kvweave.seam.cache import CompressedCache
from kvweave.seam.request import Request

if TYPE_CHECKING:
    from kvweave.seam.session import Session


def resume(session: "Session", request: Request) -> None:
    """Make a request whose cache has read some of its tokens ready to go on behind them.

    Pictures that the cache has read are dropped from it; positions go on where the cache's own left off; beams and
    samples repeat the cache's rows.

    Raises:
        ValueError: there are no more tokens than the cache has read, or pictures of both kinds are given.
    """
    cache = request.cache
    if not isinstance(cache, CompressedCache) or cache.prompt is None:
        return
    cache.settle()
    past, turn = cache.get_seq_length(), cache.shared.turn
    if not past or request.ids is None or request.length is None:
        return
    if request.length <= past:
        raise ValueError(
            f"the cache has read {past} tokens, and input_ids are {request.length}: allowed is the whole "
            "conversation, or inside `with cache.question(ids) as inputs:` those inputs"
        )
    lookup.set_offsets(session.keepers, turn.places.ahead)
    if request.ids.shape[1] == request.length:  # else it is what is new alone, with a mask of all
        _check_beginning(session, request.ids, turn.ids, cache.prompt.valid[:, :past])
        _drop_what_was_read(session, request, past)
    _repeat_rows(request, cache)


def _check_beginning(session: "Session", ids: Tensor, past_ids: Tensor | None, valid: Tensor) -> None:
    """Warn where `ids` [batch, columns] do not begin with the tokens that are `past_ids` of the cache."""
    if past_ids is None or ids.shape[0] != past_ids.shape[0]:
        return
    columns = min(past_ids.shape[1], valid.shape[1])
    ours, theirs = past_ids[:, :columns], ids[:, :columns].to(past_ids.device)
    wrong = ((ours != theirs) & valid[:, :columns].to(past_ids.device)).any(0)
    if bool(wrong.any()):
        session.warn(
            "beginning",
            f"input_ids differ from the tokens that the cache has read, from column {int(wrong.int().argmax())} on: "
            "the reply goes by what the cache has read",
        )


def _drop_what_was_read(session: "Session", request: Request, past: int) -> None:
    """Pictures go whose tokens lie before column `past`."""
    visual = visual_mask(session.base.config, request.ids, request.kwargs)
    if visual is None or not given_images(request.kwargs):
        return
    if not bool(visual[:, past:].any()):
        request.kwargs = {name: x for name, x in request.kwargs.items() if name not in lookup.READ_ONCE}
    else:
        lookup.set_offsets(session.keepers, None)  # they are counted anew
        if bool(visual[:, :past].any()):
            _drop_pictures_before(past, visual, session, request)


def _drop_pictures_before(start: int, visual: Tensor, session: "Session", request: Request) -> None:
    """Leave out pictures whose tokens lie before column `start`; positions are still those of the whole.

    Args:
        visual: bool [batch, length]; a run of them is a picture.
    Raises:
        ValueError: nothing tells which are which.
    """
    inputs = request.kwargs
    pixels, grids = inputs.get("pixel_values"), inputs.get("image_grid_thw")
    old, new = _runs(visual[:, :start]), _runs(visual[:, start:])  # pictures, by row of the batch
    pictures = len(pixels if grids is None else grids) if isinstance(pixels, Tensor) else 0
    if pictures == sum(new):
        return
    if pictures != sum(old) + sum(new) or inputs.get("pixel_values_videos") is not None:
        raise ValueError(
            f"{pictures} pictures are given, and of {sum(old) + sum(new)} in the conversation the cache has read "
            f"{sum(old)}: allowed is all, or the new ones"
        )
    is_new = torch.cat([torch.arange(a + b) >= a for a, b in zip(old, new, strict=True)])
    of_pixels = is_new
    if isinstance(grids, Tensor):
        if session.keepers:
            inputs["position_ids"] = session.base._prepare_position_ids_for_generation(
                request.ids, request.arguments()
            )
        inputs["image_grid_thw"] = grids[is_new.to(grids.device)]
        of_pixels = is_new.repeat_interleave(grids.prod(-1).cpu())
    assert isinstance(pixels, Tensor)
    inputs["pixel_values"] = pixels[of_pixels.to(pixels.device)]


def _runs(mask: Tensor) -> list[int]:
    """Runs of True in each row of bool [batch, columns]."""
    begins = mask.clone()
    begins[:, 1:] &= ~mask[:, :-1]
    return begins.sum(1).tolist()


def _repeat_rows(request: Request, cache: CompressedCache) -> None:
    """Beams and samples of one conversation begin with the same cache."""
    assert cache.prompt is not None
    copies = max(request.setting("num_beams") or 1, request.setting("num_return_sequences") or 1)
    if copies > 1 and request.ids is not None and len(cache.prompt.valid) == len(request.ids):
        cache.batch_repeat_interleave(copies)
