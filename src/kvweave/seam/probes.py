"""What a context is asked before it is cut, so that it keeps what questions may look at (SPEC 13.2 and 15.5).

Texts that the model answers; with "replay" (KVzip, 2505.23416) the prompt itself, said again; with "template" the
tokens that end a user's turn, as StreamMem (2508.15717) lets them stand for a question.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

#: What a chat model is asked with `probes="default"`; a processor's own `default_probes` go before.
DEFAULT = ("Describe each image in detail, one after the other.", "Repeat all of the text above, word by word.")
INSTRUCTION = "Repeat the text above, word by word."  # before each chunk that is said again
CHUNK = 2048  # tokens of it
ALLOWED = 'allowed is "default", "replay", "template", or a list of texts or of token ids'

_CONTENT = "kvweave"  # of a turn, to find where a template goes on behind it


@dataclass(frozen=True)
class Probes:
    """What is asked, in token ids.

    Attributes:
        answered: probes that the model answers greedily.
        most: tokens of an answer.
        fed: probes that it reads only.
        chunk: the prompt is said again, so many tokens at once; 0: it is not.
        instruction: comes before each chunk; then `answered` is about pictures, and asked where there are some.
        generic: what is asked about pictures is no processor's own, and idle where they are said again too.
    """

    answered: Sequence[list[int]] = ()
    most: int = 32
    fed: Sequence[list[int]] = ()
    chunk: int = 0
    instruction: list[int] = field(default_factory=list)
    generic: bool = False


def read_probes(probes: Any, processor: Any, tokens: int, chunk: int = CHUNK) -> Probes:
    """Probes as they are spelled: a text is the end of a user's turn, by the processor's chat template.

    Without a processor "replay" has neither instruction nor questions about pictures.

    Args:
        probes: "default", "replay", "template", texts, or lists of token ids.
        processor: the model's, or its tokenizer; for texts.
        tokens: most that a probe's answer may have.
        chunk: tokens of the prompt that "replay" says at once.
    Raises:
        ValueError: no probe, an empty one, texts without a processor, a template that ends a turn with nothing.
        TypeError: what is neither a text nor token ids.
    """
    for name, value in (("probe_tokens", tokens), ("replay_chunk", chunk)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} is not allowed: allowed is an int >= 1")
    match probes:
        case "template":
            return Probes(fed=[_end_of_turn(processor)])
        case "replay":
            if processor is None:
                return Probes(chunk=chunk)
            own = getattr(processor, "default_probes", None)
            ids = [_ids(probe, processor) for probe in own or DEFAULT[:1]]
            return Probes(ids, tokens, chunk=chunk, instruction=_ids(INSTRUCTION, processor), generic=own is None)
        case "default":
            probes = getattr(processor, "default_probes", DEFAULT)
        case str():
            raise ValueError(f"probes={probes!r} is not allowed: {ALLOWED}")
    if not isinstance(probes, (list, tuple)):
        raise TypeError(f"probes={probes!r} is not allowed: {ALLOWED}")
    if not probes:
        raise ValueError(f"probes={probes!r} is empty: {ALLOWED}")
    return Probes([_ids(probe, processor) for probe in probes], tokens)


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
        text = _turn(probe, processor)
        text = text[max(0, text.rfind(probe)) :]  # from the probe on, the template's end included
    return _tokenized(text, processor)


def _end_of_turn(processor: Any) -> list[int]:
    """What the chat template puts between the end of a user's content and the answer."""
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            f"probes='template' is not allowed with processor={type(processor).__name__}, which has no chat "
            "template: allowed is the model's processor, or other probes"
        )
    text = _turn(_CONTENT, processor)
    ids = _tokenized(text[text.rfind(_CONTENT) + len(_CONTENT) :], processor)
    if not ids:
        raise ValueError("probes='template' is empty: the chat template ends a user's turn with nothing")
    return ids


def _turn(text: str, processor: Any) -> str:
    """A user's turn of this text, and the beginning of the answer, as the chat template writes them."""
    content: Any = [{"type": "text", "text": text}] if hasattr(processor, "image_processor") else text
    turn = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))


def _tokenized(text: str, processor: Any) -> list[int]:
    return list(getattr(processor, "tokenizer", processor)(text, add_special_tokens=False)["input_ids"])
