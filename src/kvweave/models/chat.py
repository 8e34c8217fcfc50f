"""From messages to a model's inputs, for every model by its processor's chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvweave.models.pictures import open_picture
from kvweave.ops.brief import brief

Message = dict[str, Any]


class PromptError(ValueError):
    """A prompt that this model cannot be given; the message says why."""


def reads_images(processor: Any) -> bool:
    """Whether this is a processor that takes images, not only a tokenizer."""
    return hasattr(processor, "image_processor")


def encode(processor: Any, *conversations: Sequence[Message]) -> Any:
    """The inputs of one conversation or several, padded on the left, to be given to `model.generate`.

    A tokenizer without a chat template is given the text as it is.

    Args:
        conversations: turns whose content is a text, or a list of {"type": "text", "text": ...} and {"type": "image",
            "image": a picture or a file's name}.
    Raises:
        PictureError: a file that is no picture, or one too large.
        PromptError: no conversation, or what is no list of turns; images for a model that reads text only, or a
            processor that has no chat template for them.
    """
    _check(conversations)
    chats = [_opened(_turns(processor, messages)) for messages in conversations]
    padding = {"padding": True, "padding_side": "left"} if len(chats) > 1 else {}
    if not getattr(processor, "chat_template", None):
        return processor([_plain(turns) for turns in chats], return_tensors="pt", **padding)
    options: dict[str, Any] = {"processor_kwargs": padding}
    if not reads_images(processor):
        options = {"padding": bool(padding), "tokenizer_kwargs": {"padding_side": "left"}}
    return processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
    )


def _check(conversations: Sequence[Sequence[Message]]) -> None:
    """Refuse what is no conversation."""
    example = '[{"role": "user", "content": "what is this?"}]'
    if not conversations:
        raise PromptError(f"no conversation is given: allowed is one or several, such as {example}")
    for turns in conversations:
        listed = isinstance(turns, Sequence) and not isinstance(turns, str) and len(turns)
        if not listed or not all(isinstance(turn, Mapping) and "content" in turn for turn in turns):
            raise PromptError(f"{brief(turns)} is no conversation: allowed is a list of turns, such as {example}")


def written(processor: Any, messages: Sequence[Message]) -> str:
    """A conversation as the chat template writes it, a placeholder where each image goes; without one, its text."""
    turns = _turns(processor, messages)
    if not getattr(processor, "chat_template", None):
        return _plain(turns)
    return processor.apply_chat_template([turns], add_generation_prompt=True, tokenize=False)[0]


def _turns(processor: Any, messages: Sequence[Message]) -> list[Message]:
    """Messages as this processor takes them."""
    if not reads_images(processor):
        return [{**turn, "content": _text_only(turn["content"])} for turn in messages]
    if not getattr(processor, "chat_template", None):
        raise PromptError("the model's processor has no chat template: kvweave cannot tell where images go")
    return list(messages)


def _plain(turns: Sequence[Message]) -> str:
    return "\n".join(turn["content"] for turn in turns)


def _opened(turns: list[Message]) -> list[Message]:
    """Turns whose pictures are read here, where their size is looked at first, and not by the processor."""

    def opened(piece: dict[str, Any]) -> dict[str, Any]:
        image = piece.get("image")
        return {**piece, "image": open_picture(image)} if isinstance(image, str) else piece

    return [
        {**turn, "content": [*map(opened, turn["content"])]} if isinstance(turn["content"], list) else turn
        for turn in turns
    ]


def _text_only(pieces: str | Sequence[dict[str, Any]]) -> str:
    if isinstance(pieces, str):
        return pieces
    if any(piece["type"] != "text" for piece in pieces):
        raise PromptError("the model reads text only: it takes no images")
    return "\n".join(piece["text"] for piece in pieces)
