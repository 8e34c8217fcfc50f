"""What a model's passes mean for a cache that is bounded over endless input (SPEC 18)."""

from typing import TYPE_CHECKING

from kvweave.cut.stream import Stream
from kvweave.seam.request import Request

if TYPE_CHECKING:
    from kvweave.seam.cache import CompressedCache
    from kvweave.seam.session import Session


def begin_stream(session: "Session", stream: Stream, columns: int) -> None:
    """A pass of a stream comes, after which `columns` will have been seen."""
    stream.asks = session.probes is not None
    trained = getattr(session.base.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(trained, int) and columns > trained and not stream.warned:
        stream.warned = True
        session.warn(
            "positions",
            f"position {columns - 1} is beyond max_position_embeddings={trained}, what the model was trained on: "
            "positions keep growing over a stream, however little is kept",
        )


def may_be_narrow(session: "Session", cache: "CompressedCache", new: int) -> bool:
    """Whether the model may make a mask of a pass's `new` columns alone: all of a long stream's would be too many."""
    return new > 1 and "flash" not in session.implementation and cache.speaks_of_slots


def check_request(request: Request, stream: Stream | None) -> None:
    """Refuse a `generate` whose drafts would be cut with what they follow, or whose steps are compiled."""
    for name in ("assistant_model", "prompt_lookup_num_tokens", "compile_config"):
        if stream is not None and request.setting(name) is not None:
            compiled = name == "compile_config"
            why = "steps cut as they decode" if compiled else "drafts would be cut before they are verified"
            raise ValueError(f"{name} is not allowed with every={stream.every}: {why}; allowed is {name}=None")
