"""Answers of a model whose cache a method compresses, by the model's own `generate`, and what the cache then held.

Two protocols. *seen*: the prompt ends with the question, and the whole prompt is compressed. *unseen*: the context
alone is the prompt; the question comes afterwards, token by token where the model's own choice would stand, so that
it reads the compressed cache and is never compressed itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from kvweave.evals.oracle import Oracle, paid_attention
from kvweave.evals.prefill import Prefill
from kvweave.evals.tasks import Example
from kvweave.methods import Method
from kvweave.session import compress

_COLUMNS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")  # one entry a token


@dataclass(frozen=True)
class Batch:
    """Prompts ready for the model.

    Attributes:
        inputs: for `generate`, padded on the left.
        following: int64 [batch, longest], tokens that come after the prompt whatever the model says; -1: none.
    """

    examples: Sequence[Example]
    inputs: dict[str, Tensor]
    following: Tensor


@dataclass(frozen=True)
class Answer:
    """What the model said, and the cache behind it.

    Attributes:
        length: tokens of the prompt.
        kept: entries left of it, by compressed layer.
        bytes: of keys and values in all layers, the batch's padding shared out.
    """

    text: str
    length: int
    kept: list[int]
    bytes: float


def prepare(processor: Any, examples: Sequence[Example], protocol: str) -> Batch:
    """Read prompts with the model's processor and chat template."""
    inputs = dict(
        processor.apply_chat_template(
            [example.messages for example in examples],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
    )
    questions: list[list[int]] = [[] for _ in examples]
    if protocol == "unseen":
        questions = [_question(processor, example) for example in examples]
        inputs = _without(inputs, questions, processor.tokenizer.pad_token_id)
    longest = max(map(len, questions))
    following = torch.tensor([row + [-1] * (longest - len(row)) for row in questions]).long()
    return Batch(examples, inputs, following)


def _question(processor: Any, example: Example) -> list[int]:
    """Tokens of a prompt from its question on, the template's end included."""
    text = processor.apply_chat_template([example.messages], add_generation_prompt=True, tokenize=False)[0]
    start = text.rfind(example.question)
    if start < 0:
        raise ValueError(f"sample {example.id}: its prompt does not hold its question {example.question!r}")
    return processor.tokenizer(text[start:], add_special_tokens=False)["input_ids"]


def _without(inputs: dict[str, Tensor], questions: list[list[int]], pad: int) -> dict[str, Tensor]:
    """Prompts without the questions at their ends, padded on the left again."""
    ids = inputs["input_ids"]
    for row, question in zip(ids, questions, strict=True):
        if row[len(row) - len(question) :].tolist() != question:
            raise ValueError("protocol='unseen' is not allowed: the prompt's tokens do not end with its question's")
    gone = torch.tensor([len(question) for question in questions])
    source = torch.arange(ids.shape[1] - int(gone.min())) - (gone - gone.min())[:, None]  # [batch, columns]
    fills = {"input_ids": pad}
    return inputs | {
        name: inputs[name].gather(1, source.clamp(min=0)).masked_fill(source < 0, fills.get(name, 0))
        for name in _COLUMNS
        if name in inputs
    }


class _Following(LogitsProcessor):
    """Lets the given tokens come first, then the model choose."""

    def __init__(self, tokens: Tensor, start: int) -> None:
        self.tokens, self.start = tokens, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.start
        if step >= self.tokens.shape[1]:
            return scores
        token = self.tokens[:, step, None]  # [batch, 1]
        only = torch.full_like(scores, -torch.inf).scatter(1, token.clamp(min=0), 0)
        return torch.where(token < 0, scores, only)


def prefill(model: PreTrainedModel, batch: Batch, max_new_tokens: int) -> Prefill:
    """The batch's prefill with the full cache, and the answers that follow it, to be shared by many methods."""
    inputs = {name: tensor.to(model.device) for name, tensor in batch.inputs.items()}
    settings = _settings(model, batch, max_new_tokens)
    with torch.inference_mode():
        return Prefill.recorded(model, partial(model.generate, **inputs, **settings))


def answer(
    model: PreTrainedModel,
    processor: Any,
    method: Method,
    batch: Batch,
    max_new_tokens: int,
    shared: Prefill | None = None,
) -> list[Answer]:
    """Greedy answers to a batch under `kvweave.compress`.

    A method that defers its cut decodes again what it drafted from the full cache (`redecode`), unless that was the
    question: no token behind an answer's first comes from the full cache.

    Args:
        shared: the batch's own prefill, which is then not computed again.
    """
    if isinstance(method, Oracle) and shared is None:
        shared = prefill(model, batch, max_new_tokens)
    inputs = {name: tensor.to(model.device) for name, tensor in batch.inputs.items()}
    settings = _settings(model, batch, max_new_tokens)
    start = inputs["input_ids"].shape[1]
    if method.defer > batch.following.shape[1]:
        method = replace(method, redecode=True)
    with torch.inference_mode(), compress(model, method) as session:
        if shared is None:
            tokens = model.generate(**inputs, **settings)
        else:
            inputs = {name: tensor for name, tensor in inputs.items() if not name.startswith("pixel_values")}
            memory = paid_attention(shared, _ends(model)) if isinstance(method, Oracle) else []
            with shared.replayed(model, memory):
                tokens = model.generate(**inputs, **settings)
    lengths = (batch.following >= 0).sum(1).tolist()
    replies = [row[start + asked :][:max_new_tokens] for row, asked in zip(tokens, lengths, strict=True)]
    texts = [text.strip() for text in processor.batch_decode(replies, skip_special_tokens=True)]
    layers = [layer for layer in session.report["layers"] if layer["compressed"]]
    rows = [layer.get("rows", [layer]) for layer in layers]  # a batch of one is described by its layer
    size = session.report["totals"]["bytes"] / len(texts)
    return [
        Answer(text, rows[0][n]["length"], [layer[n]["kept"] for layer in rows], size) for n, text in enumerate(texts)
    ]


def _settings(model: PreTrainedModel, batch: Batch, max_new_tokens: int) -> dict[str, Any]:
    """What `generate` is told besides its inputs."""
    following = batch.following.to(model.device)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": following.shape[1] + max_new_tokens}
    if following.shape[1]:
        if bool(torch.isin(following, _ends(model)).any()):
            raise ValueError(
                "protocol='unseen' is not allowed: after the question this model's chat template writes a token that "
                "ends generation"
            )
        start = batch.inputs["input_ids"].shape[1]
        settings["logits_processor"] = LogitsProcessorList([_Following(following, start)])
    return settings


def _ends(model: PreTrainedModel) -> Tensor:
    """Tokens that end generation."""
    generation: Any = model.generation_config
    stops = generation.eos_token_id
    return torch.tensor([] if stops is None else stops, dtype=torch.int64, device=model.device).view(-1)
