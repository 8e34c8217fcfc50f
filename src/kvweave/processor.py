"""What the processors of kvweave's own have in common: texts and pictures in, no torchvision anywhere."""

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerFast, ProcessorMixin


class PictureProcessor(ProcessorMixin):
    """A tokenizer and an image processor.

    Attributes:
        pictures: class of the image processor: transformers would choose another one with torchvision than without.
        inputs: what the model takes.
        image_token: what stands for a picture in a prompt.
    """

    pictures: ClassVar[type]
    inputs: ClassVar[tuple[str, ...]]
    image_token: str

    def prompts_and_pictures(
        self, text: str | Sequence[str] | None, images: Any, options: dict[str, Any]
    ) -> tuple[list[str], list[Any]]:
        """The prompts, and their pictures in one list.

        Args:
            text: a prompt or several, with one `image_token` for each picture.
            images: a picture, a list, or a list for each prompt; None: there is none.
            options: of the call; those of other kinds of input are taken out.
        Raises:
            ValueError: no text, videos or sound, or another number of pictures than the prompts have places for.
        """
        for kind in ("videos", "audio"):
            if options.pop(kind, None) is not None:
                raise ValueError(f"{kind} are given: allowed are texts and images (of a video its frames)")
            options.pop(f"{kind}_kwargs", None)
        if text is None:
            raise ValueError("no text: allowed is a prompt, or several")
        prompts = [text] if isinstance(text, str) else list(text)
        pictures = _flat(images)
        places = sum(prompt.count(self.image_token) for prompt in prompts)
        if places != len(pictures):
            raise ValueError(
                f"{len(pictures)} images for {places} {self.image_token} in the text: allowed is one each"
            )
        return prompts, pictures

    @classmethod
    def _get_arguments_from_pretrained(cls, path: Any, processor_dict: Any = None, **kwargs: Any) -> list[Any]:
        """The two parts."""
        backend = kwargs.pop("backend", None)
        if backend not in (None, "pil"):
            raise ValueError(f"backend={backend!r} is not allowed: pictures are resized by Pillow, allowed is 'pil'")
        parts: tuple[Any, ...] = (cls.pictures, PreTrainedTokenizerFast)
        return [part.from_pretrained(path, **kwargs) for part in parts]

    @property
    def model_input_names(self) -> list[str]:
        """What the model takes from this processor."""
        return list(self.inputs)


def _flat(images: Any) -> list[Any]:
    """Pictures, singly, listed, or listed prompt by prompt, in one list."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [picture for part in images for picture in _flat(part)]
    return [images]
