"""Probes are answered: what they and their answers attend to decides what stays (SPEC 13.2 and 15.5).

After the prefill the model answers each probe from the whole context, or only reads it; the cache is cropped back.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvweave.cut.terms import Pending
from kvweave.seam.asides import aside
from kvweave.seam.cache import CompressedCache
from kvweave.seam.names import CACHE, Signature
from kvweave.seam.probes import Probes, read_probes
from kvweave.seam.surprise import surprise

if TYPE_CHECKING:
    from kvweave.seam.session import Session

_OVERLAP = 8  # tokens of the chunk before that are said again with a chunk


def answer_if_due(session: "Session", cache: CompressedCache) -> None:
    """A forward pass has left a prompt that waits for its cut: answer the probes, if any are asked before it."""
    if cache.shared.stream is not None:
        _look_before_cut(session, cache)
        return
    named = session.probes is not None or not cache.shared.hold  # else `cache.compress` asks
    if named and session.asks(cache.shared.needs) and cache.decoded >= 0:
        answer(session, cache, session.probes)


def _look_before_cut(session: "Session", cache: CompressedCache) -> None:
    """Let the model read the template behind all that a stream holds, and cut by what it looks at.

    So does StreamMem (2508.15717): the template stands for questions that are not known.
    """
    assert session.probes is not None
    assert cache.prompt is not None
    (template,), valid = session.probes.fed, cache.prompt.valid
    ids = _pad([template] * len(valid), valid.device)
    pending: list[Pending] = []
    with session.running.going_aside():
        step = _first(session.base, cache, ids)
        aside(session.base, cache, step, look=lambda: pending.extend(cache.ready(probing=len(template))))
    with torch.no_grad():
        cache.cut_stream(pending)


def answer(session: "Session", cache: CompressedCache, probes: Probes | None) -> None:
    """Ask the model, and cut the cache by what it looked at.

    Args:
        probes: None: what the cache's method asks by itself.
    """
    if cache.decoded:
        raise ValueError("probes: the prompt came with tokens behind it: allowed is a forward pass of the prompt")
    probe_set = probes or read_probes("replay", session.processor, Probes.most)
    shared, turn = cache.shared, cache.shared.turn
    method, requested = shared.method, turn.on_request
    turn.hold()
    shared.go_by(method.when_probed)
    try:
        with session.running.going_aside():
            answer_probes(session.base, cache, probe_set)
    finally:
        shared.go_by(method)
        if not requested:
            turn.release()


@dataclass(frozen=True)
class _Pass:
    """One forward pass behind the prompt, and the greedy answer to it.

    Attributes:
        tokens: int64 [batch, new], or embeddings [batch, new, hidden]; live: bool [batch, new], those that are real.
        most: tokens of the answer; the last one is not fed, so that 1 is none.
        weights: float [batch, new], what attention of the rows counts; None: all count alike.
    """

    tokens: Tensor
    live: Tensor
    most: int = 1
    weights: Tensor | None = None


def answer_probes(model: Any, cache: CompressedCache, probes: Probes) -> None:
    """Let the model answer the probes from the whole context, crop the cache back, and cut it by what they looked at.

    Args:
        cache: holds a prompt that waits for its cut.
    Raises:
        ValueError: the prompt is to be said again, and what it was is not known.
    """
    start, tokens = time.perf_counter(), 0
    passes = _passes(model, cache, probes)
    with _progress(len(passes)) as step:
        for probe in passes:
            tokens += _answer(model, cache, probe)
            step()
    seconds = round(time.perf_counter() - start, 3)
    facts: dict[str, Any] = {"count": len(passes), "tokens": tokens, "seconds": seconds}
    if probes.chunk:
        facts |= {"instructed": bool(probes.instruction), "images": _says_images(cache)}
    if cache.shared.method != cache.method:
        facts["works_as"] = cache.shared.method.spelling()
    cache.shared.turn.note_probes(facts)
    with torch.no_grad():
        cache.cut_waiting()


def _passes(model: Any, cache: CompressedCache, probes: Probes) -> list[_Pass]:
    prompt = cache.prompt
    assert prompt is not None
    rows, device = len(prompt.valid), prompt.valid.device
    again: list[_Pass] = []
    answered = probes.answered
    if probes.chunk:
        pictures = bool((prompt.visual & prompt.valid).any())
        images = pictures and _says_images(cache)
        answered = answered if pictures and not (images and probes.generic) else ()
        again = _replay(model, cache, probes, images)
    fed = [_pad([probe] * rows, device) for probe in probes.fed]
    asked = [_pad([probe] * rows, device, probes.most) for probe in answered]
    return again + fed + asked


def _pad(rows: Sequence[Sequence[int]], device: torch.device, most: int = 1) -> _Pass:
    """Rows of unequal lengths, padded behind, where nothing real sees it."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return _Pass(tokens, torch.arange(longest, device=device) < lengths[:, None], most)


def _says_images(cache: CompressedCache) -> bool:
    """The method wants images said again, and what the decoder was given for them is known."""
    known = cache.shared.turn.embeddings
    return cache.shared.needs.images and known is not None and known.shape[1] >= cache.get_seq_length()


def _replay(model: Any, cache: CompressedCache, probes: Probes, images: bool) -> list[_Pass]:
    """The prompts in chunks, each behind the instruction; a shorter prompt has nothing left in the end.

    Args:
        images: as what the decoder was given, images and all; else the texts' tokens.
    """
    prompt, length = cache.prompt, cache.get_seq_length()
    assert prompt is not None
    valid = prompt.valid[:, :length]
    said = valid if images else valid & ~prompt.visual[:, :length]
    inputs, instruction = _embedded(model, cache, probes, length) if images else _tokens(cache, probes, length)
    rows = [row[own] for row, own in zip(inputs, said.to(inputs.device), strict=True)]
    fed = _chunks(rows, instruction, probes.chunk)
    weights = _weights(model, cache, valid, said)
    return _weighed(fed, weights, len(instruction), probes.chunk) if weights else fed


def _tokens(cache: CompressedCache, probes: Probes, length: int) -> tuple[Tensor, Tensor]:
    """The prompts, int64 [batch, length], and the instruction, int64 [tokens]."""
    ids = cache.shared.turn.ids
    if ids is None or ids.shape[1] < length:
        raise ValueError(
            "probes='replay' needs the token ids of the whole prompt, and it came as embeddings, or with a reply "
            "that was decoded into fixed buffers: allowed is input_ids, other probes, or kvzip's replay=false"
        )
    return ids[:, :length], torch.tensor(probes.instruction, dtype=torch.int64, device=ids.device)


def _embedded(model: Any, cache: CompressedCache, probes: Probes, length: int) -> tuple[Tensor, Tensor]:
    """The same as the decoder is given them: [batch, length, width] and [tokens, width]."""
    embeddings = cache.shared.turn.embeddings
    assert embeddings is not None
    instruction = torch.tensor(probes.instruction, dtype=torch.int64, device=embeddings.device)
    return embeddings[:, :length], model.get_input_embeddings()(instruction).to(embeddings)


def _chunks(rows: Sequence[Tensor], instruction: Tensor, size: int) -> list[_Pass]:
    """`size` of each row's tokens a pass and the last few before them, behind the instruction."""
    passes = []
    for start in range(0, max(map(len, rows)), size):
        chunks = [row[max(0, start - _OVERLAP) : start + size] if start < len(row) else row[:0] for row in rows]
        fed = [torch.cat([instruction, chunk]) if len(chunk) else chunk for chunk in chunks]
        lengths = torch.tensor([len(row) for row in fed], device=instruction.device)
        tokens = pad_sequence(fed, batch_first=True)
        passes.append(_Pass(tokens, torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]))
    return passes


def _weighed(passes: Sequence[_Pass], weights: Sequence[Tensor], behind: int, size: int) -> list[_Pass]:
    """The chunks, each token counting as the one that it leads to.

    Args:
        weights: of each row float [tokens]; behind: tokens of the instruction.
    """
    weighed = []
    for number, chunk in enumerate(passes):
        first, end = max(0, number * size - _OVERLAP), (number + 1) * size
        leads = [F.pad(row[first : end + 1], (behind, 1))[1:] for row in weights]
        fed = [row[:count] for row, count in zip(leads, chunk.live.sum(-1).tolist(), strict=True)]
        weighed.append(replace(chunk, weights=pad_sequence(fed, batch_first=True)))
    return weighed


def _weights(model: Any, cache: CompressedCache, valid: Tensor, said: Tensor) -> list[Tensor]:
    """What attention that leads to each token that is `said` again counts, of each row, in [0, 1]; none: all alike.

    A token counts by its surprise where the method asks for that and the model tells it; an image's as text's in the
    mean, so that neither crowds the other out.
    """
    turn, most, length = cache.shared.turn, cache.shared.needs.surprise, valid.shape[1]
    known = turn.hidden is not None and turn.hidden.shape[1] >= length and turn.ids is not None
    if not most or not known or model.get_output_embeddings() is None:
        return []
    assert turn.ids is not None
    assert turn.hidden is not None
    assert turn.prompt is not None
    nats = surprise(model, turn.hidden[:, :length], turn.ids[:, :length], valid)
    shares, visual = (nats / most).clamp(max=1), turn.prompt.visual[:, :length].to(nats.device)
    text = valid.to(nats.device) & ~visual
    mean = (shares * text).sum(-1, keepdim=True) / text.sum(-1, keepdim=True).clamp(min=1)
    shares = torch.where(visual & text.any(-1, keepdim=True), mean, shares.masked_fill(visual, 1))
    return [row[own] for row, own in zip(shares, said.to(shares.device), strict=True)]


def _answer(model: Any, cache: CompressedCache, probe: _Pass) -> int:
    """One pass and the greedy answer to it, what they looked at noted; returns how many columns they had."""
    turn = cache.shared.turn
    turn.expect(probe.tokens.shape[1], probe.most)
    for layer in cache.compressed_layers:
        if layer.prompt_cut.waiting is not None:
            layer.prompt_cut.waiting.expect(probe.tokens.shape[1] + probe.most)

    def ended() -> bool:
        """In all rows."""
        return turn.counted is None or not bool(turn.counted[:, cache.decoded - 1].any())

    def look() -> None:
        assert turn.counted is not None
        for layer in cache.compressed_layers:
            layer.count_attention(turn.counted, probe.weights)

    columns = aside(model, cache, _first(model, cache, probe), probe.most, ended=ended, look=look)
    turn.expect(0, 0)
    return columns


def _first(model: Any, cache: CompressedCache, probe: _Pass) -> dict[str, Any]:
    """The inputs of the pass."""
    turn, last, tokens = cache.shared.turn, cache.shared.turn.places.last, probe.tokens
    assert turn.prompt is not None
    name = "input_ids" if tokens.dim() == 2 else "inputs_embeds"
    step: dict[str, Any] = {name: tokens, CACHE: cache, "use_cache": True, "return_dict": True}
    if "logits_to_keep" in Signature.of(model).parameters:
        step["logits_to_keep"] = 1
    mask = torch.cat([turn.prompt.valid[:, : cache.get_seq_length()], probe.live], 1)
    if last is not None or not bool(mask.all()):
        step["attention_mask"] = mask.long()
    if last is not None:
        step["position_ids"] = last + torch.arange(1, tokens.shape[1] + 1, device=last.device)
    return step


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar, on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("answering probes", total=total)
        yield lambda: bar.advance(task)
