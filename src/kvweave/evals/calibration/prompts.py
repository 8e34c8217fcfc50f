"""What a model is calibrated on: texts of the user, or of the packages installed here; questions; albums."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from kvweave.evals.tasks.sources import SOURCES
from kvweave.evals.tasks.text import DEFAULT_KINDS, FEWEST, MOST, READMES, readme, text_tasks
from kvweave.models.chat import Message, reads_images

_LETTERS = 3  # of a token, at least, in a text that is long enough
_TOKENS = 800  # of a text's piece
_SEED = 20_250  # of albums and questions: not one that evaluations start from
_ASIDE = {name.lower().replace("_", "-") for name in READMES}  # whose READMEs evaluations go on with
_PARTS = (1 / 3, 2 / 3, 1)  # of the tokens: a fit is to serve short prompts and long ones
_WANTED = ("Continue this text.", "Summarize this text.", "List the most important points.")


@dataclass(frozen=True)
class Prompt:
    """A name, which goes into the profile, and chat messages."""

    name: str
    messages: list[Message]


def prompts_of(
    model: str, processor: Any, count: int, tokens: int | None, files: Sequence[Path] = ()
) -> list[Prompt]:
    """Prompts of about so many tokens: of the user's files; else of the embedded models what they are asked about
    albums; else READMEs and licences of the packages that are installed here.

    Args:
        tokens: None: 800.
    Raises:
        ValueError: a file that cannot be read, no text that is long enough, or tokens where albums are asked about.
    """
    if not files and _sees_albums(model):
        if tokens is not None:
            raise ValueError(f"tokens={tokens} is of texts, and {model} is asked about albums: allowed is --text too")
        return _albums(model, count)
    return _texts_alone(processor, count, _TOKENS if tokens is None else tokens, files)


def lessons_of(
    model: str, processor: Any, count: int, tokens: int | None, files: Sequence[Path] = ()
) -> list[Prompt]:
    """Prompts that a fit learns from, kinds in turn: what to do with a text, questions about facts in one, and,
    where the model sees, questions about albums. The toys are asked about albums alone.

    Args:
        count, tokens, files: as in `prompts_of`; texts of a third of the tokens and of two thirds are among them.
    Raises:
        ValueError: as in `prompts_of`.
    """
    if _sees_albums(model) and model != "smol":
        return _albums(model, count)
    tokens = _TOKENS if tokens is None else tokens
    kinds = [_tasks_with_texts(processor, count, tokens, files), _questions(count, tokens)]
    if reads_images(processor):
        kinds.append(_albums("smol", count))
    return [one for turn in itertools.zip_longest(*kinds) for one in turn if one is not None][:count]


def _sees_albums(model: str) -> bool:
    return model in SOURCES and SOURCES[model].unit == "images"


def _albums(model: str, count: int) -> list[Prompt]:
    source = SOURCES[model]
    each = -(-count // len(source.tasks))
    examples = [task.examples(_SEED) for task in source.make(source.tasks, each, source.size)]
    return [Prompt(one.id, one.messages) for turn in zip(*examples, strict=True) for one in turn][:count]


def _texts_alone(processor: Any, count: int, tokens: int, files: Sequence[Path]) -> list[Prompt]:
    tokenizer = getattr(processor, "tokenizer", processor)
    pieces = itertools.islice(_pieces(files, tokenizer, tokens), count)
    return [Prompt(name, _asking(tokenizer.decode(ids))) for name, ids in pieces]


def _tasks_with_texts(processor: Any, count: int, tokens: int, files: Sequence[Path]) -> list[Prompt]:
    """Texts of unlike lengths, and what to do with each."""
    tokenizer, found = getattr(processor, "tokenizer", processor), []
    ways = itertools.cycle(itertools.product(_PARTS, _WANTED))
    for (name, ids), (part, wanted) in zip(
        _pieces(files, tokenizer, tokens), itertools.islice(ways, count), strict=False
    ):
        some = ids[: int(part * len(ids))]
        found.append(Prompt(f"{name}, {len(some)} tokens", _asking(tokenizer.decode(some), wanted)))
    return found


def _questions(count: int, tokens: int) -> list[Prompt]:
    """About facts strewn into prose of unlike lengths."""
    kinds = [kind for kind in DEFAULT_KINDS if kind != "prose"]
    each = -(-count // (len(_PARTS) * len(kinds)))
    tasks = [task for part in _PARTS for task in text_tasks(kinds, each, max(FEWEST, min(MOST, int(part * tokens))))]
    examples = zip(*(task.examples(_SEED) for task in tasks), strict=True)
    return [Prompt(one.id, one.messages) for turn in examples for one in turn][:count]


def _asking(*texts: str) -> list[Message]:
    return [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]


def _pieces(files: Sequence[Path], tokenizer: Any, tokens: int) -> Iterator[tuple[str, list[int]]]:
    """The first piece of so many tokens of each different text, then the second of each, and so on.

    Raises:
        ValueError: a file that cannot be read; no text is so long.
    """
    seen: set[str] = set()
    long: list[tuple[str, list[int]]] = []
    for name, text in _texts(files) if files else _installed():
        if len(text) < tokens * _LETTERS or text in seen:
            continue
        seen.add(text)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= tokens:
            long.append((name, ids))
            yield name, ids[:tokens]
    if not long:
        raise ValueError(f"tokens={tokens} is not allowed: no text here is so long; allowed is fewer, or other texts")
    for start in range(tokens, max(len(ids) for _, ids in long), tokens):
        for name, ids in long:
            if len(ids) >= start + tokens:
                yield f"{name} from token {start}", ids[start : start + tokens]


def _texts(files: Sequence[Path]) -> Iterator[tuple[str, str]]:
    for file in files:
        try:
            yield file.name, file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"text={str(file)!r} cannot be read ({error}): allowed is a text in UTF-8") from None


def _installed() -> Iterator[tuple[str, str]]:
    """READMEs and licences of installed packages, one after the other, in the order of names; not of those that
    evaluations take their texts from."""
    for name, package in sorted({one.metadata["Name"]: one for one in metadata.distributions()}.items()):
        if name.lower().replace("_", "-") in _ASIDE:
            continue
        yield f"{name} README", readme(package.metadata)
        for file in package.files or ():
            if file.name.upper().startswith("LICENSE") and "dist-info" in str(file):
                try:
                    yield f"{name} {file.name}", file.read_text(encoding="utf-8")
                except (OSError, ValueError):  # listed and gone, or in another encoding: others are there
                    continue
