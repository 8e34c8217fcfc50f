"""A `generate` that goes on from a cache: what the cache has read is not read again."""

from typing import TYPE_CHECKING

from torch import Tensor

from kvweave.prompt import given_images, visual_mask
from kvweave.seam import names
from kvweave.seam.cache import CompressedCache
from kvweave.seam.names import Request

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
    seen, turn = cache.get_seq_length(), cache.shared.turn
    if not seen or request.ids is None or request.length is None:
        return
    if request.length <= seen:
        raise ValueError(
            f"the cache has read {seen} tokens, and input_ids are {request.length}: allowed is the whole "
            "conversation, or inside `with cache.question(ids) as inputs:` those inputs"
        )
    names.set_offsets(session.keepers, turn.places.ahead)
    if request.ids.shape[1] == request.length:  # else it is what is new alone, with a mask of all
        _check_beginning(session, request.ids, turn.ids, cache.prompt.valid[:, :seen])
        _drop_what_was_read(session, request, seen)
    _repeat_rows(request, cache)


def _check_beginning(session: "Session", ids: Tensor, known: Tensor | None, valid: Tensor) -> None:
    """Warn where `ids` [batch, columns] do not begin with the tokens that are `known` of the cache."""
    if known is None or ids.shape[0] != known.shape[0]:
        return
    columns = min(known.shape[1], valid.shape[1])
    ours, theirs = known[:, :columns], ids[:, :columns].to(known.device)
    wrong = ((ours != theirs) & valid[:, :columns].to(known.device)).any(0)
    if bool(wrong.any()):
        session.warn(
            "beginning",
            f"input_ids differ from the tokens that the cache has read, from column {int(wrong.int().argmax())} on: "
            "the reply goes by what the cache has read",
        )


def _drop_what_was_read(session: "Session", request: Request, seen: int) -> None:
    """Pictures go whose tokens lie before column `seen`."""
    visual = visual_mask(session.base.config, request.ids, request.kwargs)
    if visual is None or not given_images(request.kwargs):
        return
    if not bool(visual[:, seen:].any()):
        request.kwargs = {name: x for name, x in request.kwargs.items() if name not in names.READ_ONCE}
    else:
        names.set_offsets(session.keepers, None)  # they are counted anew
        if bool(visual[:, :seen].any()):
            request.give_pictures_behind(session.base, seen, visual)


def _repeat_rows(request: Request, cache: CompressedCache) -> None:
    """Beams and samples of one conversation begin with the same cache."""
    assert cache.prompt is not None
    copies = max(request.setting("num_beams") or 1, request.setting("num_return_sequences") or 1)
    if copies > 1 and request.ids is not None and len(cache.prompt.valid) == len(request.ids):
        cache.batch_repeat_interleave(copies)
