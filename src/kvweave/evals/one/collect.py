"""From a model and a prompt to what a page shows."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvweave.evals.one.generating import Generation, check_compressible, generate
from kvweave.evals.run import store
from kvweave.methods import Method
from kvweave.models import LABS
from kvweave.prompt import visual_mask
from kvweave.report.data import Answer, Long, Run, Speed, Token, layers_of
from kvweave.report.grids import Grid, grids
from kvweave.seam.profiles import working

if TYPE_CHECKING:
    from PIL.Image import Image

_LONG_STEPS = 16  # tokens decoded behind a long text

#: Said where the embedded model is asked about something of the user's own.
OWN_WORLD = (
    "The embedded model knows only the world it was trained in, drawn shapes and a few words: what it says of other "
    "pictures and words means nothing. Any other --model reads them."
)


@dataclass(frozen=True)
class Subject:
    """A loaded model with a prompt.

    Attributes:
        inputs: the prompt, as `kvweave.models.encode` gives it; images: the pictures in it, in order.
        question, right: for people; right is the right answer, where there is one.
    """

    name: str
    model: Any
    processor: Any
    inputs: Any
    images: "list[Image]"
    question: str
    right: str | None = None


def compare(
    subject: Subject,
    methods: Sequence[Method],
    max_new_tokens: int,
    repeats: int,
    command: str,
    on_answer: Callable[[str], None] = lambda what: None,
    long: int = 0,
) -> Run:
    """Answer with the full cache and with each method by turns, `repeats` times each.

    Args:
        long: tokens of a text behind which decoding is timed as well; 0: not. A prompt without `words` has none.
    Raises:
        ModelError: kvweave cannot compress the model.
    """
    check_compressible(subject.model, methods[0])
    all_methods = [None, *methods]
    generations_of: list[list[Generation]] = [[] for _ in all_methods]
    for _ in range(repeats):
        for method, generations in zip(all_methods, generations_of, strict=True):
            parts = subject.model, subject.processor, subject.inputs
            generations.append(generate(*parts, method, max_new_tokens))
            on_answer(_named(method))
    behind = _decode_behind(subject, all_methods, long, on_answer) if long else None
    config = subject.model.config
    tokens = tokens_of(subject.processor, config, subject.inputs)
    grids = grids_of(subject.processor, config, subject.inputs, tokens, len(subject.images))
    return Run(
        model=subject.name,
        question=subject.question,
        right=subject.right,
        images=subject.images,
        tokens=tokens,
        grids=grids,
        full=answer_of(generations_of[0], "full cache", "", generations_of[1][-1].report["totals"]["bytes_before"]),
        answers=[
            answer_of(generations, method.spelling(), method.name)
            for method, generations in zip(methods, generations_of[1:], strict=True)
        ],
        command=command,
        machine=machine(str(subject.model.device)),
        versions=store.versions(),
        notes=_notes(subject, grids, methods, [generations[-1] for generations in generations_of[1:]]),
        long=behind,
    )


def _named(method: Method | None) -> str:
    return "full cache" if method is None else method.spelling()


def words(subject: Subject) -> torch.Tensor:
    """Token ids of the prompt's words, int64 [words]: neither visual nor special."""
    tokenizer = getattr(subject.processor, "tokenizer", subject.processor)
    ids = subject.inputs["input_ids"]
    visual = visual_mask(subject.model.config, ids, dict(subject.inputs))
    text = ids[0] if visual is None else ids[0][~visual[0]]
    return text[[number not in tokenizer.all_special_ids for number in text.tolist()]]


def _decode_behind(
    subject: Subject, methods: Sequence[Method | None], length: int, on_answer: Callable[[str], None]
) -> Long:
    """Time decoding behind the prompt's own words, repeated: what they say matters to no speed."""
    text = words(subject)
    text = text.repeat(-(-length // len(text)))[:length][None]
    inputs = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    speeds = []
    for method in methods:
        run = generate(subject.model, subject.processor, inputs, method, _LONG_STEPS, _LONG_STEPS)
        speeds.append(_speed([run]))
        on_answer(f"{_named(method)}, behind {length:,} tokens")
    return Long(length, speeds)


def _notes(
    subject: Subject, grids: Sequence[Grid], methods: Sequence[Method], answers: Sequence[Generation]
) -> list[str]:
    """What a reader should know.

    Args:
        answers: one by each method.
    """
    works = [working(method, subject.model) for method in methods]
    notes = [_deferred(method, answer) for method, answer in zip(works, answers, strict=True) if method.defer]
    unknown = unknown_words(subject.processor, subject.inputs)
    if subject.name in LABS and subject.right is None:
        notes.insert(0, OWN_WORLD)
    if unknown:
        notes.append(
            f"{unknown} token{'s' if unknown > 1 else ''} of the prompt are not in the model's vocabulary: "
            "it cannot read them."
        )
    if any(grid.image is None for grid in grids):
        notes.append(
            "Which image a visual token belongs to is not known for this model: its runs of visual tokens are drawn "
            "as grids without a picture."
        )
    elif not all(grid.known for grid in grids):
        notes.append(
            "This model's processor does not tell how visual tokens lie on an image: they are drawn row by row on a "
            "grid as near to a square as can be, so a cell may be off."
        )
    return notes


def _deferred(method: Method, answer: Generation) -> str:
    """Where the first tokens of an answer come from."""
    first = f"{method.name} cuts once {method.defer} tokens are decoded from the full cache"
    if answer.report["deferred"] is None:
        over = f"this answer, of {answer.tokens}, was over before, and nothing was cut"
        return f"{first}: {over}; with redecode=True it is decoded again, from what is kept."
    return f"{first}, then decodes them again." if method.redecode else f"{first}; they stay in the answer."


def answer_of(generations: Sequence[Generation], method: str, name: str, cache_bytes: int | None = None) -> Answer:
    """One method's answer; speeds are medians over repeated generations, all else is the last one's.

    Args:
        cache_bytes: of the full cache, which is its peak too; None: as the report says.
    """
    last = generations[-1]
    layers = layers_of(last.report, last.fates) if last.report else []
    return Answer(
        method=method,
        name=name,
        text=last.text,
        tokens=last.tokens,
        speed=_speed(generations),
        cache_bytes=last.report["totals"]["bytes"] if cache_bytes is None else cache_bytes,
        peak_bytes=last.report["totals"]["peak_bytes"] if cache_bytes is None else cache_bytes,
        layers=layers,
    )


def _speed(generations: Sequence[Generation]) -> Speed:
    steps = [second for generation in generations for second in generation.step_seconds]
    return Speed(
        tokens_per_second=1 / statistics.median(steps) if steps else None,
        prefill_seconds=statistics.median(generation.prefill_seconds for generation in generations),
        steps=len(steps),
        repeats=len(generations),
    )


def tokens_of(processor: Any, config: Any, inputs: Any) -> list[Token]:
    """The prompt's tokens as text, and which of them are visual."""
    tokenizer = getattr(processor, "tokenizer", processor)
    special = set(tokenizer.all_special_ids)
    ids = inputs["input_ids"]
    mask = visual_mask(config, ids, dict(inputs))
    visual = mask[0].tolist() if mask is not None else [False] * ids.shape[1]
    return [
        Token("", visual=True) if is_visual else Token(tokenizer.decode([number]), special=number in special)
        for number, is_visual in zip(ids[0].tolist(), visual, strict=True)
    ]


def grids_of(processor: Any, config: Any, inputs: Any, tokens: Sequence[Token], images: int) -> list[Grid]:
    """Which cell of which image each visual token is, from what the processor tells."""
    shapes = inputs.get("image_grid_thw")
    vision = getattr(config, "vision_config", None)
    merge = getattr(getattr(processor, "image_processor", None), "merge_size", None)
    merge = merge or getattr(vision, "spatial_merge_size", None) or 1
    sizes = None if shapes is None else [(t, h, w) for t, h, w in shapes.tolist()]
    pixels, patch = inputs.get("pixel_values"), getattr(processor, "patch_size", None)
    if sizes is None and patch and pixels is not None and pixels.ndim == 4:  # LLaVA's: a token for each patch
        sizes, merge = [(1, pixels.shape[-2] // patch, pixels.shape[-1] // patch)] * len(pixels), 1
    return grids([token.visual for token in tokens], images, sizes, merge)


def unknown_words(processor: Any, inputs: Any) -> int:
    """Tokens of the prompt that the tokenizer has no word for."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.unk_token_id is None:
        return 0
    return int((inputs["input_ids"] == tokenizer.unk_token_id).sum())


def machine(device: str) -> str:
    """The processor that the model ran on, by name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{store.cpu()}, {threads} thread{'s' if threads > 1 else ''}"
