"""From a request's messages to what the model reads, in a thread beside the engine's."""

from collections.abc import Sequence
from typing import Any

from kvweave.evals.one.collect import grids_of, tokens_of
from kvweave.models import PromptError, encode, reads_images
from kvweave.models.chat import written
from kvweave.prompt import visual_token_ids
from kvweave.report.grids import Grid
from kvweave.serve.errors import Refusal
from kvweave.serve.images import Album
from kvweave.serve.schema import ImagePart, Message

#: A word that stands for the question while the chat template writes a context.
_QUESTION = "KVWEAVE0QUESTION0HERE"


class Prompts:
    """What one model reads.

    Args:
        model, processor: as `kvweave.models.load` returns them.
        prompt_tokens: most tokens of a prompt; None: what the model has positions for.
    """

    def __init__(self, model: Any, processor: Any, prompt_tokens: int | None) -> None:
        self.config, self.processor = model.config, processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        decoder = model.config.get_text_config(decoder=True)
        self.vocabulary = int(decoder.vocab_size)
        positions = getattr(decoder, "max_position_embeddings", None) or 2**31
        self.most = min(prompt_tokens or positions, positions)
        self.positions = positions
        ids = visual_token_ids(model.config)
        self._placeholders = [word for word in self.tokenizer.convert_ids_to_tokens(ids) if word]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def word(self, token: int) -> str:
        """Text of one token, special or not."""
        return self.tokenizer.decode([token])

    def inputs(self, messages: Sequence[Message], album: Album) -> Any:
        """A conversation as the model reads it.

        Raises:
            Refusal: images for a model that reads none, too many tokens, or a template that takes no such turns.
        """
        turns = self._turns(messages, album)
        return self.fitting(self._refused(lambda: encode(self.processor, turns)))

    def context(self, messages: Sequence[Message], album: Album) -> tuple[Any, str, list[dict[str, Any]]]:
        """Messages that a question will follow: as the model reads them, as the chat template writes them, and as it
        takes them, without what is on the images."""
        turns = self._turns(messages, album)
        text = self._before_question(turns)
        images = [part["image"] for turn in turns for part in turn["content"] if part["type"] == "image"]
        if images:
            inputs = self._refused(lambda: self.processor(images=[images], text=[text], return_tensors="pt"))
        else:
            inputs = self._tokens(text)
        return self.fitting(inputs), text, self._bare(messages)

    def question(self, turns: list[dict[str, Any]], text: str, messages: Sequence[Message]) -> list[int]:
        """Tokens of messages behind a context of these turns, that the chat template wrote as `text`."""
        if any(isinstance(part, ImagePart) for message in messages for part in message.parts):
            raise Refusal(400, "messages: images are not allowed behind a context: it holds them", "messages")
        whole = self._written(_joined(turns, self._bare(messages)))
        if not whole.startswith(text):
            raise Refusal(400, "messages: the chat template does not write them behind the context", "messages")
        return self._tokens(whole[len(text) :])["input_ids"][0].tolist()

    def _tokens(self, text: str) -> Any:
        """Text that the chat template wrote, special tokens and all."""
        return self.tokenizer([text], add_special_tokens=False, return_tensors="pt")

    def _before_question(self, turns: list[dict[str, Any]]) -> str:
        asked = [{"role": "user", "content": [{"type": "text", "text": _QUESTION}]}]
        whole = self._written(_joined(turns, asked))
        text, found, _ = whole.partition(_QUESTION)
        if not found:
            raise Refusal(400, "messages: the chat template writes no question behind them", "messages")
        return text

    def _written(self, turns: list[dict[str, Any]]) -> str:
        if not getattr(self.processor, "chat_template", None):
            raise Refusal(400, "messages: contexts are not allowed, the model has no chat template", "messages")
        return self._refused(lambda: written(self.processor, turns))

    def fitting(self, inputs: Any) -> Any:
        """The inputs, if they are not too long."""
        self.check_length(int(inputs["input_ids"].shape[1]))
        return inputs

    def check_length(self, tokens: int, reply: int = 0) -> None:
        """Refuse a prompt that is too long, or has no positions left for its reply."""
        if tokens > self.most or tokens + reply > self.positions:
            allowed = min(self.most, self.positions - reply)
            both = f"{tokens} tokens and a reply of {reply}" if reply else f"{tokens} tokens"
            raise Refusal(
                400,
                f"messages: {both} are too many: allowed are at most {max(0, allowed)} tokens",
                "messages",
                code="context_length_exceeded",
            )

    def drawn(self, inputs: Any, messages: Sequence[Message]) -> tuple[list[str], list[Grid]]:
        """Texts of a prompt's tokens, and which of them are which cells of which image."""
        tokens = tokens_of(self.processor, self.config, inputs)
        images = sum(isinstance(part, ImagePart) for message in messages for part in message.parts)
        return [token.text for token in tokens], grids_of(self.processor, self.config, inputs, tokens, images)

    def _turns(self, messages: Sequence[Message], album: Album) -> list[dict[str, Any]]:
        """Messages with their images opened, their number looked at first."""
        images = [part for message in messages for part in message.parts if isinstance(part, ImagePart)]
        if len(images) > album.limits.images:
            raise Refusal(
                400, f"messages: {len(images)} images are too many: allowed are {album.limits.images}", "messages"
            )
        if images and not reads_images(self.processor):
            raise Refusal(400, "messages: images are not allowed, the model reads text only", "messages")
        turns = self._bare(messages)
        for at, (message, turn) in enumerate(zip(messages, turns, strict=True)):
            for place, part in enumerate(message.parts):
                if isinstance(part, ImagePart):
                    field = f"messages.{at}.content.{place}.image_url.url"
                    turn["content"][place]["image"] = album.add(part.image_url.url, field)
        return turns

    def _bare(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Messages as chat templates take them, images not opened."""
        turns = []
        for at, message in enumerate(messages):
            content: list[dict[str, Any]] = []
            for part in message.parts:
                if isinstance(part, ImagePart):
                    content.append({"type": "image"})
                    continue
                if any(word in part.text for word in self._placeholders):
                    field = f"messages.{at}.content"
                    raise Refusal(400, f"{field}: a placeholder of images is not allowed in text", field)
                content.append({"type": "text", "text": part.text})
            role = "system" if message.role == "developer" else message.role
            turns.append({"role": role, "content": content})
        return turns

    @staticmethod
    def _refused(make: Any) -> Any:
        """What `make` returns; what a chat template or a processor raises is the request's fault."""
        from jinja2.exceptions import TemplateError

        try:
            return make()
        except (PromptError, ValueError, TypeError, TemplateError) as error:
            said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise Refusal(400, f"messages: the model's template does not take them: {said}", "messages") from None


def _joined(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns one after the other; where one speaker goes on, it is one turn."""
    if first and second and first[-1]["role"] == second[0]["role"]:
        last = {**first[-1], "content": [*first[-1]["content"], *second[0]["content"]]}
        return [*first[:-1], last, *second[1:]]
    return [*first, *second]
