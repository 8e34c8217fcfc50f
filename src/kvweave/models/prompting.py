"""From messages to a model's inputs, for every model by its processor's chat template."""

from collections.abc import Sequence
from typing import Any

from kvweave.models.loading import reads_images


class PromptError(ValueError):
    """A prompt that this model cannot be given; the message says why."""


def encode(processor: Any, messages: Sequence[dict[str, Any]]) -> Any:
    """The inputs of one conversation, to be given to `model.generate`.

    A tokenizer without a chat template is given the text as it is.

    Args:
        messages: turns whose content is a list of {"type": "text", "text": ...} and {"type": "image", "image": ...}.
    Raises:
        PromptError: images for a model that reads text only, or a processor that has no chat template for them.
    """
    if reads_images(processor):
        turns: list[dict[str, Any]] = list(messages)
        if not getattr(processor, "chat_template", None):
            raise PromptError("the model's processor has no chat template: kvweave cannot tell where images go")
    else:
        turns = [{**turn, "content": _text_only(turn["content"])} for turn in messages]
        if not getattr(processor, "chat_template", None):
            return processor("\n".join(turn["content"] for turn in turns), return_tensors="pt")
    return processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def _text_only(pieces: Sequence[dict[str, Any]]) -> str:
    if any(piece["type"] != "text" for piece in pieces):
        raise PromptError("the model reads text only: it takes no images")
    return "\n".join(piece["text"] for piece in pieces)
