"""Answers of a model whose cache a method compresses, by the model's own `generate`, and what the cache then held.

Two protocols. *seen*: the prompt ends with the question, and the whole prompt is compressed. *unseen*: the context
alone is the prompt, compressed once; every question about it is read by the frozen cache, which is then cropped back.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from kvweave.cache import CompressedCache
from kvweave.chat import encode, written
from kvweave.evals.fidelity import TOKENS, Fidelity, Reference, compared
from kvweave.evals.oracle import Oracle, paid_attention
from kvweave.evals.prefill import Prefill, Whole, recording
from kvweave.evals.tasks import Example
from kvweave.methods import Method
from kvweave.session import Session, compress

_COLUMNS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")  # one entry a token
_STRADDLING = 2  # tokens at most that a question shares with its context's end


@dataclass(frozen=True)
class Round:
    """One question to each prompt of a batch.

    Attributes:
        examples: for each row of the batch, number of the example that is asked.
        questions: tokens that come after each row's prompt; empty where the prompt ends with the question.
        again: rows that have no further question and repeat an earlier one.
    """

    examples: list[int]
    questions: list[list[int]]
    again: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Batch:
    """Prompts ready for the model.

    Attributes:
        inputs: for `generate`, padded on the left; a row for each context.
        rounds: what is asked one after the other.
    """

    examples: Sequence[Example]
    inputs: dict[str, Tensor]
    rounds: list[Round]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.inputs.values())


@dataclass(frozen=True)
class Answer:
    """What the model said, and the cache behind it.

    Attributes:
        length: tokens of the prompt.
        kept: entries left of it, by compressed layer.
        bytes: of keys and values in all layers, the batch's padding shared out.
        fidelity: to the full cache, where there was a reference.
        reference: for other caches, where the full cache was asked for one.
    """

    text: str
    length: int
    kept: list[int]
    bytes: float
    fidelity: Fidelity | None = None
    reference: Reference | None = None


# -------------------------------------------------------------------- prompts


def prepare(processor: Any, examples: Sequence[Example], protocol: str) -> Batch:
    """Read prompts with the model's processor and chat template.

    Raises:
        ValueError: an example that cannot be asked in this protocol; the message says why.
    """
    for example in examples:
        if example.error:
            raise ValueError(f"sample {example.id}: {example.error}")
    if protocol == "seen":
        inputs = dict(encode(processor, *(example.messages for example in examples)))
        return Batch(examples, inputs, [Round(list(range(len(examples))), [[] for _ in examples])])
    rows: dict[str, list[int]] = {}
    for n, example in enumerate(examples):
        rows.setdefault(example.context or f"{n}", []).append(n)
    inputs = dict(encode(processor, *(examples[row[0]].messages for row in rows.values())))
    tails = [_tails(processor, [examples[n] for n in row], ids) for row, ids in _zip(rows.values(), inputs)]
    rounds = []
    for turn in range(max(map(len, rows.values()))):
        asked = [min(turn, len(row) - 1) for row in rows.values()]
        rounds.append(
            Round(
                [row[at] for row, at in zip(rows.values(), asked, strict=True)],
                [tail[at] for tail, at in zip(tails, asked, strict=True)],
                frozenset(n for n, at in enumerate(asked) if at < turn),
            )
        )
    cut = _without(inputs, [len(tail[0]) for tail in tails], processor.tokenizer.pad_token_id or 0)
    return Batch(examples, cut, rounds)


def _zip(rows: Any, inputs: dict[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    ids = inputs["input_ids"].tolist()
    return list(zip(rows, ids, strict=True))


def _tails(processor: Any, examples: Sequence[Example], ids: list[int]) -> list[list[int]]:
    """Tokens of prompts from their questions on, the template's end included.

    Args:
        examples: of one context.
        ids: of the first one's whole prompt; its end is its tail. Tokens that a question's beginning shares with the
            context stay with the context.
    """
    contexts, tails = zip(*(_divided(processor, example) for example in examples), strict=True)
    for example, context in zip(examples, contexts, strict=True):
        if context != contexts[0]:
            raise ValueError(f"sample {example.id}: its context differs from that of {examples[0].id}")
    for shared in range(_STRADDLING + 1):
        end = tails[0][shared:]
        if end and ids[-len(end) :] == end and all(tail[:shared] == tails[0][:shared] for tail in tails):
            return [tail[shared:] for tail in tails]
    raise ValueError(f"sample {examples[0].id}: its prompt's tokens do not end with those of its question")


def _divided(processor: Any, example: Example) -> tuple[str, list[int]]:
    """A prompt's text before its question, and the tokens from there on."""
    text = written(processor, example.messages)
    start = text.rfind(example.question)
    if start < 0 or not example.question.strip():
        raise ValueError(f"sample {example.id}: its prompt does not hold its question {example.question!r}")
    return text[:start], processor.tokenizer(text[start:], add_special_tokens=False)["input_ids"]


def _without(inputs: dict[str, Tensor], counts: list[int], pad: int) -> dict[str, Tensor]:
    """Prompts without so many tokens at their ends, padded on the left again."""
    gone = torch.tensor(counts)
    columns = inputs["input_ids"].shape[1] - int(gone.min())
    source = torch.arange(columns) - (gone - gone.min())[:, None]  # [batch, columns]
    fills = {"input_ids": pad}
    return inputs | {
        name: inputs[name].gather(1, source.clamp(min=0)).masked_fill(source < 0, fills.get(name, 0))
        for name in _COLUMNS
        if name in inputs
    }


# -------------------------------------------------------------------- answers


def answer(
    model: PreTrainedModel,
    processor: Any,
    method: Method,
    batch: Batch,
    max_new_tokens: int,
    *,
    references: Sequence[Reference | None] = (),
    refer: bool = False,
    shared: Prefill | None = None,
) -> list[Answer]:
    """Greedy answers to a batch under `kvweave.compress`.

    Args:
        references: what the full cache said to each example; none: no fidelity.
        refer: give references for others.
        shared: the batch's own prefill, which is then not computed again.
    """
    if isinstance(method, Oracle) and shared is None:
        shared = prefill(model, batch, max_new_tokens)
    inputs = batch.inputs
    if shared is not None:
        inputs = {name: tensor for name, tensor in inputs.items() if not name.startswith("pixel_values")}
    paid = shared.paid if shared is not None and isinstance(method, Oracle) else []
    found: dict[int, Answer] = {}
    with (
        torch.inference_mode(),
        compress(model, method) as session,
        shared.replayed(model, paid) if shared is not None else nullcontext(),
    ):
        talk = _Talk(model, session, inputs)
        for round_ in batch.rounds:
            replies = talk.replies(round_.questions, max_new_tokens)
            texts = [text.strip() for text in processor.batch_decode(replies, skip_special_tokens=True)]
            said = [replace(held, text=text) for held, text in zip(talk.held, texts, strict=True)]
            if refer:
                made = [Reference(reply, 0, torch.empty(0), torch.empty(0)) for reply in replies]
                first, logits = talk.expected(round_.questions, made)
                made = [Reference.of(r.tokens, first, rows) for r, rows in zip(made, logits, strict=True)]
                said = [replace(one, reference=reference) for one, reference in zip(said, made, strict=True)]
            elif any(references):
                given = [references[n] for n in round_.examples]
                _, logits = talk.expected(round_.questions, given)
                said = [
                    one if reference is None else replace(one, fidelity=compared(reference, reply, rows))
                    for one, reference, reply, rows in zip(said, given, replies, logits, strict=True)
                ]
            found |= {n: said[row] for row, n in enumerate(round_.examples) if row not in round_.again}
    return [found[n] for n in range(len(batch.examples))]


def prefill(model: PreTrainedModel, batch: Batch, max_new_tokens: int) -> Prefill:
    """The batch's prefill with the full cache, and what the questions and their answers then looked at."""
    with torch.inference_mode(), compress(model, Whole()) as session, recording(model) as recorder:
        talk = _Talk(model, session, batch.inputs, recorder.cache)
        for round_ in batch.rounds:
            replies = talk.replies(round_.questions, max_new_tokens)
            made = recorder.made
            ends = set(talk.ends.tolist())
            said = [[token for token in reply if token not in ends] for reply in replies]
            counts = [len(question) + len(reply) for question, reply in zip(round_.questions, said, strict=True)]
            paid = [paid_attention(layer, made.start, counts) for layer in made.recorded_layers]
            made.paid[:] = map(torch.maximum, made.paid, paid) if made.paid else paid
            for layer in made.recorded_layers:
                layer.later.clear()
    return recorder.made


class _Talk:
    """A model that reads a batch's prompts, and is asked again and again.

    Args:
        cache: an empty one that the prompts are read into; None: the session's own.

    Attributes:
        held: for each row an answer without its text: what the cache held of the prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        session: Session,
        inputs: dict[str, Tensor],
        cache: CompressedCache | None = None,
    ) -> None:
        self.model, self.session = model, session
        self.inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        self.cache = {} if cache is None else {"past_key_values": cache}
        self.batch, self.start = self.inputs["input_ids"].shape
        self.held: list[Answer] = []
        settings: Any = model.generation_config
        ends = settings.eos_token_id
        self.ends = torch.tensor([] if ends is None else ends, device=model.device, dtype=torch.long).reshape(-1)
        self._read = False

    def replies(self, questions: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Tokens of the answers, ends included."""
        if any(questions):
            return self._after(questions, min(map(len, questions)), max_new_tokens)[0]
        tokens = self._read_prompts(max_new_tokens)
        return [self._cut(row) for row in tokens[:, self.start :]]

    def expected(
        self, questions: list[list[int]], references: Sequence[Reference | None]
    ) -> tuple[int, list[Tensor]]:
        """The first token of an answer that comes from the cache, and logits from there on along the references.

        The logits: for each row [tokens, vocabulary], at most `TOKENS` of them.
        """
        shared = min(map(len, questions)) or 1
        first = 0 if any(questions) else 1
        paths = [[] if r is None else r.tokens[: first + TOKENS] for r in references]
        tails = [question + path for question, path in zip(questions, paths, strict=True)]
        longest = max(map(len, tails))
        if longest == shared:
            return first, [torch.empty(0, 1)] * self.batch
        filled = [tail or [0] for tail in tails]
        _, logits = self._after(filled, shared, 0)
        ends = [len(tail) - shared for tail in tails]
        starts = [len(question) + first - shared for question in questions]
        return first, [logits[start:end, row] for row, (start, end) in enumerate(zip(starts, ends, strict=True))]

    def _after(self, tails: list[list[int]], shared: int, free: int) -> tuple[list[list[int]], Tensor]:
        """Let the prompts be followed by `tails`, the first `shared` tokens at once, then by `free` of the model's.

        Returns:
            The free tokens of each row; and where there are none the logits [steps, batch, vocabulary].
        """
        cache = self._at_the_prompts_end()
        steps = max(map(len, tails)) - shared + free
        start = self.start + shared
        whole = torch.tensor([tail[:shared] for tail in tails], device=self.model.device)
        longest = max(map(len, tails))
        rest = [tail[shared:] + [-1] * (longest - len(tail)) for tail in tails]
        following = torch.tensor(rest, device=self.model.device, dtype=torch.long).reshape(self.batch, -1)
        free_from = torch.tensor([self.start + len(tail) for tail in tails], device=self.model.device)
        out: Any = self.model.generate(
            input_ids=torch.cat([self.inputs["input_ids"], whole], 1),
            attention_mask=torch.cat([self.inputs["attention_mask"], torch.ones_like(whole)], 1),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=steps,
            eos_token_id=_NEVER,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([_Following(following, start)]),
            stopping_criteria=StoppingCriteriaList([_Ended(self.ends, free_from)]) if free else None,
            output_logits=not free,
            return_dict_in_generate=True,
        )
        replies = [
            self._cut(row[begin : begin + free]) for row, begin in zip(out.sequences, free_from.tolist(), strict=True)
        ]
        return replies, torch.empty(0) if free else torch.stack(out.logits)

    def _at_the_prompts_end(self) -> Any:
        """The cache as the prompts left it, frozen: cropped back to there, or filled anew where it cannot be."""
        if not (self._read and _rewound(self.session.cache, self.start)):
            self._read_prompts(1)
        assert self.session.cache is not None
        self.session.cache.freeze()
        return self.session.cache

    def _read_prompts(self, max_new_tokens: int) -> Tensor:
        """Prompts and answers, int64 [batch, columns]; notes what the cache holds."""
        if self._read and self.cache:
            raise ValueError("this model's cache cannot be cropped: allowed is one question a context")
        tokens: Any = self.model.generate(**self.inputs, **self.cache, do_sample=False, max_new_tokens=max_new_tokens)
        self._read = True
        report = self.session.report
        layers = [layer for layer in report["layers"] if layer["compressed"]]
        rows = [layer.get("rows", [layer]) for layer in layers]  # a batch of one is described by its layer
        size = report["totals"]["bytes"] / self.batch
        self.held = [
            Answer("", rows[0][n]["length"], [layer[n]["kept"] for layer in rows], size) for n in range(self.batch)
        ]
        return tokens

    def _cut(self, row: Tensor) -> list[int]:
        """A row's tokens up to the first that ends it."""
        ends = torch.isin(row, self.ends).nonzero()
        return row[: int(ends[0]) + 1 if len(ends) else len(row)].tolist()


_NEVER = 2**31 - 1  # no vocabulary's: a token that was given ends nothing


def _rewound(cache: Any, length: int) -> bool:
    """Whether the cache could be cropped back to `length`; some layers keep no past (sliding windows, states)."""
    try:
        cache.crop(length - cache.get_seq_length())
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return True


class _Following(LogitsProcessor):
    """Lets the given tokens, [batch, steps], -1 where there is none, come first, then the model choose."""

    def __init__(self, tokens: Tensor, start: int) -> None:
        self.tokens, self.start = tokens, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.start
        if step >= self.tokens.shape[1]:
            return scores
        token = self.tokens[:, step, None]  # [batch, 1]
        only = torch.full_like(scores, -torch.inf).scatter(1, token.clamp(min=0), 0)
        return torch.where(token < 0, scores, only)


class _Ended(StoppingCriteria):
    """A row is done when it has said an end of its own."""

    def __init__(self, ends: Tensor, free_from: Tensor) -> None:
        self.ends, self.free_from = ends, free_from

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        free = torch.arange(input_ids.shape[1], device=input_ids.device) >= self.free_from[:, None]
        return (torch.isin(input_ids, self.ends) & free).any(1)
