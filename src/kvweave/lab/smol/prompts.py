"""How albums and questions are written for the model: a chat template, and the same in tokens, to train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvweave.lab.smol.albums import FAMILIES, Album, Question
from kvweave.lab.smol.scenes import PATCH, SIDE, Scenes

IMAGE = "<image>"
IMAGE_TOKENS = (SIDE // PATCH) ** 2
SYSTEM = "You look at the images of an album and answer in one sentence."
CHAT_TEMPLATE = (
    "{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\\n" + SYSTEM + "<|im_end|>\\n' -}}{%- endif -%}"
    """
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' -}}
  {%- set pieces = message.content -%}
  {%- if pieces is string -%}{%- set pieces = [{'type': 'text', 'text': pieces}] -%}{%- endif -%}
  {%- for piece in pieces -%}
    {%- if piece.type == 'image' -%}{{- '<image>' -}}
    {%- elif piece.type == 'text' -%}{{- piece.text -}}
    {%- else -%}{{- raise_exception('smol reads texts and images, not ' + piece.type) -}}
    {%- endif -%}
  {%- endfor -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
)
_OPENING = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
_ASK = "<|im_end|>\n<|im_start|>assistant\n"
_END = "<|im_end|>"


@dataclass(frozen=True)
class Packed:
    """Albums with questions behind each, which see their album and themselves, not one another.

    tokens, places (positions), groups [albums, length], a multiple of 64: group 0 is the album, 1, 2, ... its
    questions, -1 padding. What is to be learnt is flat over albums and lengths: `behind` [targets] says behind which
    tokens, `targets` which token follows, `owner` which question's answer it belongs to; `families` [questions].
    """

    scenes: Scenes
    tokens: Tensor
    places: Tensor
    groups: Tensor
    behind: Tensor
    targets: Tensor
    owner: Tensor
    families: Tensor

    def to(self, device: torch.device) -> Packed:
        """The same on another device."""
        return Packed(
            *(getattr(self, field.name).to(device) for field in fields(self)),
        )


def draw_questions(
    albums: Sequence[Album], count: int, shares: Mapping[str, float], rng: np.random.Generator
) -> list[list[Question]]:
    """Up to `count` questions an album, none twice, families as often as `shares` says."""
    weights = np.array([shares[family] for family in FAMILIES])
    questions = []
    for album in albums:
        drawn = [
            album.question(FAMILIES[n], rng) for n in rng.choice(len(FAMILIES), count, p=weights / weights.sum())
        ]
        questions.append(list({question.text: question for question in drawn if question}.values()))
    return questions


def pack(tokenizer: Any, albums: Sequence[Album], questions: Sequence[Sequence[Question]], scenes: Scenes) -> Packed:
    """Tokens of albums of the same number of images, their questions packed behind them."""
    ids = _Encoded(tokenizer, albums, questions)
    rows: list[tuple[list[int], list[int], list[int]]] = []
    behind: list[tuple[int, int]] = []
    targets: list[int] = []
    owner: list[int] = []
    families: list[int] = []
    for row, (album, own) in enumerate(zip(albums, questions, strict=True)):
        tokens = ids.context(album)
        start = len(tokens)
        places, groups = list(range(start)), [0] * start
        for group, question in enumerate(own, 1):
            ask, answer = ids.ask(question), ids.of(question.answer + _END)
            first = len(tokens) + len(ask) - 1  # the answer's first token follows this one
            behind += [(row, first + n) for n in range(len(answer))]
            targets += answer
            owner += [len(families)] * len(answer)
            families.append(FAMILIES.index(question.family))
            tokens = tokens + ask + answer[:-1]
            added = len(ask) + len(answer) - 1
            places += range(start, start + added)
            groups += [group] * added
        rows.append((tokens, places, groups))
    length = -(-max(len(tokens) for tokens, _, _ in rows) // 64) * 64
    filled = np.zeros((3, len(rows), length), np.int64)
    filled[2] = -1
    for row, parts in enumerate(rows):
        for n, part in enumerate(parts):
            filled[n, row, : len(part)] = part
    at = np.array(behind).reshape(-1, 2)
    flat = at[:, 0] * length + at[:, 1]
    tensors = [torch.from_numpy(part) for part in (*filled, flat)]
    return Packed(scenes, *tensors, *(torch.tensor(part, dtype=torch.long) for part in (targets, owner, families)))


class _Encoded:
    """Token ids of all pieces of some albums, by one call of the tokenizer."""

    def __init__(self, tokenizer: Any, albums: Sequence[Album], questions: Sequence[Sequence[Question]]) -> None:
        texts = {_OPENING, _ASK, "\n"}
        for album, own in zip(albums, questions, strict=True):
            texts.update(album.captions())
            texts.update(text for question in own for text in (question.text, question.answer + _END))
        ordered = sorted(texts)
        encoded = tokenizer(ordered, add_special_tokens=False)["input_ids"]
        self._ids = dict(zip(ordered, encoded, strict=True))
        self._image = [tokenizer.convert_tokens_to_ids(IMAGE)] * IMAGE_TOKENS + self._ids["\n"]

    def of(self, text: str) -> list[int]:
        return self._ids[text]

    def context(self, album: Album) -> list[int]:
        ids = list(self._ids[_OPENING])
        for caption in album.captions():
            ids += self._ids[caption] + self._image
        return ids

    def ask(self, question: Question) -> list[int]:
        return self._ids[question.text] + self._ids[_ASK]
