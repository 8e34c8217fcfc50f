"""Probes: what a context is asked before it is cut, so that it keeps what questions may look at (SPEC 13.2).

After the prefill the model answers each probe from the whole context, and the cache is cropped back. What the probes
and their answers attended to decides what stays; KVzip (2505.23416) does so with the context's own reconstruction.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvweave.seam.cache import CompressedCache
from kvweave.seam.names import CACHE, show_window_alone

#: What a chat model is asked with `probes="default"`; a processor's own `default_probes` go before.
DEFAULT = ("Describe each image in detail, one after the other.", "Repeat all of the text above, word by word.")
ALLOWED = 'allowed is "default", or a list of texts or of token ids'


def read_probes(probes: Any, processor: Any, tokens: int) -> list[list[int]]:
    """Token ids of each probe: of a text as the end of a user's turn, by the processor's chat template.

    Args:
        probes: "default", texts, or lists of token ids.
        processor: the model's, or its tokenizer; for texts.
        tokens: most that a probe's answer may have.
    Raises:
        ValueError: no probe, an empty one, texts without a processor.
        TypeError: what is neither a text nor token ids.
    """
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"probe_tokens={tokens!r} is not allowed: allowed is an int >= 1")
    if isinstance(probes, str):
        if probes != "default":
            raise ValueError(f"probes={probes!r} is not allowed: {ALLOWED}")
        probes = getattr(processor, "default_probes", DEFAULT)
    if not isinstance(probes, (list, tuple)):
        raise TypeError(f"probes={probes!r} is not allowed: {ALLOWED}")
    if not probes:
        raise ValueError(f"probes={probes!r} is empty: {ALLOWED}")
    return [_ids(probe, processor) for probe in probes]


def _ids(probe: Any, processor: Any) -> list[int]:
    if isinstance(probe, str):
        if processor is None:
            raise ValueError(f"probes={probe!r} is a text, and processor=None: allowed is the model's processor")
        ids = _tokens_of(probe, processor)
    else:
        ids = probe.tolist() if isinstance(probe, Tensor) else probe
        if not isinstance(ids, (list, tuple)) or any(type(token) is not int for token in ids):
            raise TypeError(f"probes: {probe!r} is neither a text nor token ids: {ALLOWED}")
    if not ids:
        raise ValueError(f"probes: {probe!r} is empty: {ALLOWED}")
    return list(ids)


def _tokens_of(probe: str, processor: Any) -> list[int]:
    text = probe
    if getattr(processor, "chat_template", None):
        reads_images = hasattr(processor, "image_processor")
        content: Any = [{"type": "text", "text": probe}] if reads_images else probe
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        text = text[max(0, text.rfind(probe)) :]  # from the probe on, the template's end included
    return getattr(processor, "tokenizer", processor)(text, add_special_tokens=False)["input_ids"]


@contextmanager
def rewindable(cache: CompressedCache) -> Iterator[None]:
    """Layers of fixed size keep what they would drop, so that the cache may be cropped back."""
    record = getattr(cache, "activate_past_recording", None)
    if record is not None:
        record()
    undo = [show_window_alone(layer) for layer in cache.layers if hasattr(layer, "sliding_window")]
    try:
        yield
    finally:
        for put_back in undo:
            put_back()
        for layer in cache.layers:
            if getattr(layer, "record_past", False):
                layer.record_past = False


@torch.no_grad()
def answer_probes(model: nn.Module, cache: CompressedCache, probes: Sequence[Sequence[int]], most: int) -> None:
    """Let the model answer the probes from the whole context, crop the cache back, and cut it by what they looked at.

    Args:
        cache: holds a prompt that waits for its cut.
        most: tokens of an answer.
    """
    started, spent = time.perf_counter(), 0
    with rewindable(cache), _progress(len(probes)) as step:
        for probe in probes:
            fed = _answer(model, cache, probe, most)
            _take_back(cache, fed)
            spent += fed
            step()
    seconds = round(time.perf_counter() - started, 3)
    cache.shared.turn.note_probes({"count": len(probes), "tokens": spent, "seconds": seconds})
    cache.cut_waiting()


def _answer(model: nn.Module, cache: CompressedCache, probe: Sequence[int], most: int) -> int:
    """One probe and the greedy answer to it; returns how many tokens they have in the cache."""
    turn = cache.shared.turn
    assert turn.prompt is not None
    seen = cache.get_seq_length()
    valid = turn.prompt.valid[:, :seen]
    tokens = torch.tensor([list(probe)], device=valid.device).expand(len(valid), -1)
    turn.expect(len(probe), most)
    for layer in cache.compressed_layers:
        if layer.prompt_cut.waiting is not None:
            layer.prompt_cut.waiting.expect(len(probe) + most)
    padded = not bool(valid.all())
    last = turn.last_position
    for _ in range(most):
        seen = cache.get_seq_length()
        step: dict[str, Any] = {"input_ids": tokens, CACHE: cache, "use_cache": True, "return_dict": True}
        if padded or last is not None:
            new = torch.ones(len(valid), seen + tokens.shape[1] - valid.shape[1], device=valid.device)
            step["attention_mask"] = torch.cat([valid.long(), new.long()], 1)
        if last is not None:
            step["position_ids"] = last + torch.arange(1, tokens.shape[1] + 1, device=last.device)
            last = step["position_ids"][..., -1:]
        tokens = model(**step).logits[:, -1:].argmax(-1)
        if turn.counted is None or not bool(turn.counted[:, cache.decoded - 1].any()):
            break  # the answer has ended in all rows
    return cache.decoded


def _take_back(cache: CompressedCache, tokens: int) -> None:
    """Note what the probe and its answer looked at, and forget them, `tokens` together."""
    turn = cache.shared.turn
    assert turn.counted is not None
    for layer in cache.compressed_layers:
        layer.count_attention(turn.counted)
    cache.crop(-tokens)
    turn.expect(0, 0)


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
