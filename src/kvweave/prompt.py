"""Which of the prompt's tokens are what: visual or text, real or padding."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
_FEW = 16  # least room for decoded tokens
_PICTURES = ("pixel_values", "image_embeds", "image_features", "video_embeds", "flattened_patches")
_IMAGE, _VIDEO = 1, 2  # values of a processor's mm_token_type_ids


@dataclass(frozen=True)
class Prompt:
    """Modalities and padding of everything a cache has seen.

    Attributes:
        visual: bool [batch, length], True for tokens whose embedding comes from the vision encoder.
        valid: bool [batch, length], False for padding.
        room: bool [2, batch, capacity], a buffer that begins with both, or None.
    """

    visual: Tensor
    valid: Tensor
    room: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, mask in (("visual", self.visual), ("valid", self.valid)):
            if mask.dtype != torch.bool or mask.dim() != 2:
                raise ValueError(
                    f"{name} must be bool [batch, length], got {mask.dtype} with shape {list(mask.shape)}"
                )
        if self.visual.shape != self.valid.shape:
            raise ValueError(
                f"visual {list(self.visual.shape)} and valid {list(self.valid.shape)} must have one shape"
            )

    def __getstate__(self) -> dict[str, Any]:
        """What is copied, saved and sent: the masks, and not the room behind them."""
        return {"visual": self.visual.clone(), "valid": self.valid.clone(), "room": None}

    @property
    def length(self) -> int:
        return self.valid.shape[1]

    @cached_property
    def lengths(self) -> list[int]:
        """Real tokens of each row (one host synchronisation, however often it is asked)."""
        return self.valid.sum(1).tolist()

    @cached_property
    def padded(self) -> bool:
        """Some column is padding."""
        return min(self.lengths) < self.length

    def extended(self, visual: Tensor, valid: Tensor, past: int | None = None) -> "Prompt":
        """This prompt followed by further columns, on their device; a decoded token's are written behind it, where
        room was made.

        Args:
            past: its first so many columns alone; None: all.
        """
        if (cut := self.cropped(past, visual.device)) is not self:
            return cut.extended(visual, valid)
        new = visual.shape[1]
        if new > 1:
            return Prompt(torch.cat([self.visual, visual], 1), torch.cat([self.valid, valid], 1))
        old, total, room = self.length, self.length + new, self.room
        if room is None or room.shape[2] < total:
            with torch.inference_mode(False):  # it is written to in inference mode or outside
                room = self.visual.new_zeros(2, self.visual.shape[0], total + max(_FEW, total // 4))
            room[0, :, :old] = self.visual
            room[1, :, :old] = self.valid
        room[0, :, old:total] = visual
        room[1, :, old:total] = valid
        return Prompt(room[0, :, :total], room[1, :, :total], room)

    def cropped(self, length: int | None, device: torch.device | None = None) -> "Prompt":
        """The first `length` columns, on `device` if it is named; itself if it has no more and is there."""
        all_columns = length is None or length >= self.length
        own = self if all_columns else Prompt(self.visual[:, :length], self.valid[:, :length])
        return own if device is None else own.to(device)

    def to(self, device: torch.device) -> "Prompt":
        """The prompt on that device; itself if it is there."""
        if self.visual.device == device and self.valid.device == device:
            return self
        return Prompt(self.visual.to(device), self.valid.to(device))

    def rows(self, index: Tensor) -> "Prompt":
        """The given rows, in that order."""
        return Prompt(self.visual[index.to(self.visual.device)], self.valid[index.to(self.valid.device)])


def visual_token_ids(config: Any) -> list[int]:
    """Ids of the placeholders that a model replaces by image or video embeddings, from its config."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    ids = (getattr(part, name, None) for part in parts for name in _PLACEHOLDERS)
    return sorted({value for value in ids if isinstance(value, int)})


def given_images(inputs: dict[str, Any]) -> list[str]:
    """Names of the keyword arguments of a forward pass that bring images or video."""
    names = [name for name in inputs if name in _PICTURES or name.startswith("pixel_values_")]
    return [name for name in names if inputs[name] is not None]


def visual_mask(config: Any, input_ids: Tensor | None, inputs: dict[str, Any]) -> Tensor | None:
    """Visual tokens of one forward pass, from what the model was given; None if nothing tells.

    Args:
        config: the model's.
        input_ids: [batch, length] or None where embeddings were passed.
        inputs: the other keyword arguments of the forward pass.
    Returns:
        bool [batch, length].
    """
    kinds = inputs.get("mm_token_type_ids")
    if kinds is not None:
        return (kinds == _IMAGE) | (kinds == _VIDEO)
    places = inputs.get("image_embeds_position_mask")  # Kosmos-2's own
    if places is not None:
        return places != 0
    if input_ids is not None:
        ids = visual_token_ids(config)
        if ids:
            return torch.isin(input_ids, torch.tensor(ids, device=input_ids.device))
        kinds = inputs.get("token_type_ids")
        return kinds != 0 if kinds is not None else torch.zeros_like(input_ids, dtype=torch.bool)
    return None
