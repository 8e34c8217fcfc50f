"""Answers of a model whose cache a method compresses, by the model's own `generate`, and what the cache then held.

Three protocols. *seen*: the prompt ends with the question, and the whole prompt is compressed. *unseen*: the context
alone is the prompt, compressed once; every question about it is read by the frozen cache, which is then cropped back.
*probed*: the same, and before it is compressed the context is asked the processor's own probes (SPEC 13.2).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvweave.evals.answer.fidelity import TOKENS, Fidelity, Reference, compared
from kvweave.evals.answer.oracle import Oracle, paid_attention
from kvweave.evals.answer.prefill import Prefill
from kvweave.evals.tasks.tasks import Example
from kvweave.methods import Method
from kvweave.methods.full import Full
from kvweave.models.chat import encode, written
from kvweave.seam.cache import CompressedCache
from kvweave.seam.entry import compress
from kvweave.seam.names import CACHE
from kvweave.seam.session import Session

_COLUMNS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")  # one entry a token


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
        turns = [min(turn, len(row) - 1) for row in rows.values()]
        rounds.append(
            Round(
                [row[at] for row, at in zip(rows.values(), turns, strict=True)],
                [tail[at] for tail, at in zip(tails, turns, strict=True)],
                frozenset(n for n, at in enumerate(turns) if at < turn),
            )
        )
    cut = _without(inputs, [len(tail[0]) for tail in tails], _tokenizer(processor).pad_token_id or 0)
    return Batch(examples, cut, rounds)


def _zip(rows: Any, inputs: dict[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    ids = inputs["input_ids"].tolist()
    return list(zip(rows, ids, strict=True))


def _tails(processor: Any, examples: Sequence[Example], ids: list[int]) -> list[list[int]]:
    """Tokens of prompts from their questions on, the template's end included.

    Args:
        examples: of one context.
        ids: of the first one's whole prompt; its end is its tail. A token that joins a question's beginning to the
            context is the question's, and so is what stands there in the prompts of the others.
    """
    contexts, texts = zip(*(_divided(processor, example) for example in examples), strict=True)
    for example, context in zip(examples, contexts, strict=True):
        if context != contexts[0]:
            raise ValueError(f"sample {example.id}: its context differs from that of {examples[0].id}")
    context, *prompts = (
        _tokenizer(processor)(text, add_special_tokens=False)["input_ids"] for text in (contexts[0], *texts)
    )
    columns = zip(context, *prompts, strict=False)
    start = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))  # alike in all
    tails = [prompt[start:] for prompt in prompts]
    if not tails[0] or ids[-len(tails[0]) :] != tails[0]:
        raise ValueError(f"sample {examples[0].id}: its prompt's tokens do not end with those of its question")
    return tails


def _divided(processor: Any, example: Example) -> tuple[str, str]:
    """A prompt's text before its question, and the whole of it."""
    text = written(processor, example.messages)
    start = text.rfind(example.question)
    if start < 0 or not example.question.strip():
        raise ValueError(f"sample {example.id}: its prompt does not hold its question {example.question!r}")
    return text[:start], text


def _tokenizer(processor: Any) -> Any:
    """A processor's tokenizer, or the tokenizer that stands in its place."""
    return getattr(processor, "tokenizer", processor)


def _without(inputs: dict[str, Tensor], counts: list[int], pad: int) -> dict[str, Tensor]:
    """Prompts without so many tokens at their ends, padded on the left again."""
    counts_of = torch.tensor(counts)
    columns = inputs["input_ids"].shape[1] - int(counts_of.min())
    source = torch.arange(columns) - (counts_of - counts_of.min())[:, None]  # [batch, columns]
    fills = {"input_ids": pad}
    return inputs | {
        name: inputs[name].gather(1, source.clamp(min=0)).masked_fill(source < 0, fills.get(name, 0))
        for name in _COLUMNS
        if name in inputs
    }


# -------------------------------------------------------------------- answers


def prefill(model: Any, batch: Batch, max_new_tokens: int, turn: int = 0) -> Prefill:
    """The batch's prefill with the full cache, and the answers that follow it, to be shared by many methods.

    Args:
        turn: number of the round whose questions are answered. Of what was fed, ends in a question are -1.
    """
    questions = batch.rounds[turn].questions

    def decode(past_key_values: CompressedCache) -> Tensor:
        talk = _Talk(model, batch, cache=past_key_values)
        if not any(questions):
            return talk.prompted(max_new_tokens)
        tokens = talk.after(questions, min(map(len, questions)), max_new_tokens).sequences
        is_question = torch.arange(tokens.shape[1], device=tokens.device) < talk.ends_of(questions)[:, None]
        return tokens.masked_fill(is_question & torch.isin(tokens, talk.ends), -1)

    with torch.inference_mode():
        return Prefill.recorded(model, decode)


def answer(
    model: Any,
    processor: Any,
    method: Method,
    batch: Batch,
    max_new_tokens: int,
    shared: Prefill | None = None,
    *,
    probed: bool = False,
    references: Sequence[Reference | None] = (),
    refer: bool = False,
) -> list[Answer]:
    """Greedy answers to a batch under `kvweave.compress`.

    A method that defers its cut decodes again what it drafted from the full cache: no token behind an answer's first
    comes from there. In `unseen` it cuts when the context ends.

    Args:
        shared: the batch's own prefill, which is then not computed again.
        probed: ask the context the processor's own probes first.
        references: what the full cache said to each example; none: no fidelity.
        refer: give references for others.
    """
    memory: list[Tensor] = []
    if isinstance(method, Oracle):
        shared = shared or prefill(model, batch, max_new_tokens)
        memory = _foreseen(model, batch, max_new_tokens, shared)
    if method.defer:
        method = replace(method, redecode=True)
    asks = probed and not isinstance(method, Full | Oracle)  # who goes by no attention asks nothing
    probing = {"probes": "default" if asks else None, "processor": processor}  # kvzip has instructions of its own
    results: dict[int, Answer] = {}
    with torch.inference_mode(), compress(model, method, **probing) as session:
        talk = _Talk(model, batch, session=session, shared=shared, memory=memory)
        for round_ in batch.rounds:
            replies = talk.replies(round_.questions, max_new_tokens)
            texts = [text.strip() for text in processor.batch_decode(replies, skip_special_tokens=True)]
            answers = [replace(blank, text=text) for blank, text in zip(talk.blanks, texts, strict=True)]
            if refer:
                first, logits = talk.expected(round_.questions, replies)
                baselines = [Reference.of(reply, first, rows) for reply, rows in zip(replies, logits, strict=True)]
                answers = [
                    replace(one, reference=reference) for one, reference in zip(answers, baselines, strict=True)
                ]
            elif any(references):
                goals = [references[n] for n in round_.examples]
                _, logits = talk.expected(round_.questions, [one.tokens if one else [] for one in goals])
                answers = [
                    one if reference is None else replace(one, fidelity=compared(reference, reply, rows))
                    for one, reference, reply, rows in zip(answers, goals, replies, logits, strict=True)
                ]
            results |= {n: answers[row] for row, n in enumerate(round_.examples) if row not in round_.again}
    return [results[n] for n in range(len(batch.examples))]


def _foreseen(model: Any, batch: Batch, max_new_tokens: int, first: Prefill) -> list[Tensor]:
    """What the answers of all rounds will pay most to each slot, by layer."""
    rounds = [first, *(prefill(model, batch, max_new_tokens, turn) for turn in range(1, len(batch.rounds)))]
    paid = [paid_attention(recorded, _ends(model)) for recorded in rounds]
    return [torch.stack(layers).amax(0) for layers in zip(*paid, strict=True)]


def _ends(model: Any) -> Tensor:
    """Tokens that end generation."""
    settings: Any = model.generation_config
    ends = settings.eos_token_id
    return torch.tensor([] if ends is None else ends, dtype=torch.int64, device=model.device).view(-1)


class _Talk:
    """A model that reads a batch's prompts, and is asked again and again.

    Attributes:
        blanks: for each row an answer without its text: what the cache held of the prompt.
    """

    def __init__(
        self,
        model: Any,
        batch: Batch,
        *,
        session: Session | None = None,
        cache: CompressedCache | None = None,
        shared: Prefill | None = None,
        memory: Sequence[Tensor] = (),
    ) -> None:
        """Args: cache: to be filled; None: the session makes one. memory: as in `Prefill.replayed`."""
        self.model, self.session, self.blank_cache, self.shared, self.memory = model, session, cache, shared, memory
        self.inputs = {name: tensor.to(model.device) for name, tensor in batch.inputs.items()}
        self.batch, self.start = self.inputs["input_ids"].shape
        self.ends = _ends(model)
        self.blanks: list[Answer] = []

    @property
    def cache(self) -> Any:
        return self.blank_cache if self.session is None else self.session.cache

    def prompted(self, max_new_tokens: int) -> Tensor:
        """Tokens of the prompts and what follows them."""
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens}
        if self.blank_cache is not None:
            settings[CACHE] = self.blank_cache
        if self.shared is None:
            tokens = self.model.generate(**self.inputs, **settings)
        else:
            text_inputs = {
                name: tensor for name, tensor in self.inputs.items() if not name.startswith("pixel_values")
            }
            with self.shared.replayed(self.model, self.memory):
                tokens = self.model.generate(**text_inputs, **settings)
        return tokens

    def replies(self, questions: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Tokens of the answers, ends included."""
        if not any(questions):
            tokens = self.prompted(max_new_tokens)
            self._note()
            return [self._cut(row) for row in tokens[:, self.start :]]
        tokens = self.after(questions, min(map(len, questions)), max_new_tokens).sequences
        begins = self.ends_of(questions).tolist()
        return [self._cut(row[at : at + max_new_tokens]) for row, at in zip(tokens, begins, strict=True)]

    def expected(self, questions: list[list[int]], answers: Sequence[list[int]]) -> tuple[int, list[Tensor]]:
        """The first token of an answer that comes from the cache, and logits from there on along given answers.

        The logits: for each row [tokens, vocabulary], at most `TOKENS` of them.
        """
        shared = min(map(len, questions)) or 1
        first = 0 if any(questions) else 1
        tails = [question + path[: first + TOKENS] for question, path in zip(questions, answers, strict=True)]
        if max(map(len, tails)) <= shared:
            return first, [torch.empty(0, 1)] * self.batch
        logits = torch.stack(self.after([tail or [0] for tail in tails], shared, 0).logits)
        ends = [len(tail) - shared for tail in tails]
        starts = [len(question) + first - shared for question in questions]
        return first, [logits[start:end, row] for row, (start, end) in enumerate(zip(starts, ends, strict=True))]

    def after(self, tails: list[list[int]], shared: int, free: int) -> Any:
        """Let the prompts be followed by `tails`, the first `shared` tokens at once, then by `free` of the model's.

        Returns:
            As `generate`: `sequences`, and where no token is free `logits`, [batch, vocabulary] a step.
        """
        cache = self._at_the_prompts_end()
        longest, start = max(map(len, tails)), self.start + shared
        prefix = torch.tensor([tail[:shared] for tail in tails], device=self.model.device)
        rest = [tail[shared:] + [-1] * (longest - len(tail)) for tail in tails]
        following = torch.tensor(rest, device=self.model.device, dtype=torch.long).reshape(self.batch, -1)
        ended = [_Ended(self.ends, self.ends_of(tails))]
        return self.model.generate(
            input_ids=torch.cat([self.inputs["input_ids"], prefix], 1),
            attention_mask=torch.cat([self.inputs["attention_mask"], torch.ones_like(prefix)], 1),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=longest - shared + free,
            eos_token_id=_NEVER,
            pad_token_id=0,
            logits_processor=[_Following(following, start)],
            stopping_criteria=ended if free else None,
            output_logits=not free,
            return_dict_in_generate=True,
        )

    def ends_of(self, tails: list[list[int]]) -> Tensor:
        """Columns behind the prompt and each row's tail: int64 [batch]."""
        return torch.tensor([self.start + len(tail) for tail in tails], device=self.model.device)

    def _at_the_prompts_end(self) -> CompressedCache:
        """The cache as the prompts left it, frozen: cropped back to there, or filled anew where it cannot be."""
        asked_before = bool(self.blanks)
        if not (asked_before and _rewound(self.cache, self.start)):
            self.prompted(1)
        self.cache.freeze()
        if not asked_before:
            self._note()
        return self.cache

    def _note(self) -> None:
        report = self.cache.report
        layers = [layer for layer in report["layers"] if layer["compressed"]]
        rows = [layer.get("rows", [layer]) for layer in layers]  # a batch of one is described by its layer
        size = report["totals"]["bytes"] / self.batch
        self.blanks = [
            Answer("", rows[0][n]["length"], [layer[n]["kept"] for layer in rows], size) for n in range(self.batch)
        ]

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


class _Following:
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


class _Ended:
    """A row is done when it has said an end of its own."""

    def __init__(self, ends: Tensor, free_from: Tensor) -> None:
        self.ends, self.free_from = ends, free_from

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        free = torch.arange(input_ids.shape[1], device=input_ids.device) >= self.free_from[:, None]
        return (torch.isin(input_ids, self.ends) & free).any(1)
