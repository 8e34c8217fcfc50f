"""A model's profile: which heads want how much of a prompt, the mean over some prompts (SPEC 17.7).

Each prompt is read, and read again behind itself; entries are kept by kvzip's score, all layers' heads competing. How
many each head gets at a budget is nearly the same for every prompt: it belongs to the model.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from kvweave.evals.run.store import read_object, write_json
from kvweave.evals.tasks.sources import SOURCES
from kvweave.evals.tasks.text import readme
from kvweave.methods.allocation import Pool, Profile, share_out
from kvweave.methods.kvzip import KVzip
from kvweave.models.chat import Message, encode
from kvweave.ops.budget import entries
from kvweave.seam.entry import compress
from kvweave.seam.profiles import model_mark

BUDGETS = (0.5, 0.3, 0.2, 0.1, 0.05)
_DIGITS = 4
_LETTERS = 3  # of a token, at least, in a text that is long enough
_TOKENS = 800  # of a text's piece
_SEED = 20_250  # of albums: not one that evaluations start from

Table = list[list[list[float]]]  # shares [budgets][layers][kv_heads]


@dataclass(frozen=True)
class Prompt:
    """What a model is calibrated on: a name, which goes into the profile, and chat messages."""

    name: str
    messages: list[Message]


@dataclass(frozen=True)
class Counting(KVzip):
    """Notes what each head would get at every budget of a profile.

    Attributes:
        found: a table for each prompt.
    """

    found: list[Table] = field(default_factory=list, compare=False)

    def allocate(self, weights: list[Any], budget: int, length: int) -> list[Any]:
        self.found.append([self.shares_at(share, weights, length) for share in BUDGETS])
        return super().allocate(weights, budget, length)

    def shares_at(self, share: float, pools: Sequence[Pool], length: int) -> list[list[float]]:
        """The share of the prompt that each head gets: [layers][kv_heads]."""
        budget = entries(share, length, 0)
        quota = self.quota(budget, budget)
        rows = []
        for pool in (pool.row(0) for pool in pools):
            first = pool.valid & (pool.valid.cumsum(-1) <= quota.sinks)
            rows.append(replace(pool, forced=first, quota=quota))
        return [[count / length for count in counts] for counts in share_out(rows, self.floor)]


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
    if not files and model in SOURCES and SOURCES[model].unit == "images":
        if tokens is not None:
            raise ValueError(f"tokens={tokens} is of texts, and {model} is asked about albums: allowed is --text too")
        source = SOURCES[model]
        each = -(-count // len(source.tasks))
        examples = [task.examples(_SEED) for task in source.make(source.tasks, each, source.size)]
        return [Prompt(one.id, one.messages) for turn in zip(*examples, strict=True) for one in turn][:count]
    tokens = _TOKENS if tokens is None else tokens
    pieces = _pieces(_texts(files) if files else _installed(), processor, tokens)
    prompts = [
        Prompt(name, [{"role": "user", "content": [{"type": "text", "text": text}]}])
        for (name, text), _ in zip(pieces, range(count), strict=False)
    ]
    if not prompts:
        raise ValueError(f"tokens={tokens} is not allowed: no text here is so long; allowed is fewer, or other texts")
    return prompts


def _texts(files: Sequence[Path]) -> Iterator[tuple[str, str]]:
    for file in files:
        try:
            yield file.name, file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"text={str(file)!r} cannot be read ({error}): allowed is a text in UTF-8") from None


def _installed() -> Iterator[tuple[str, str]]:
    """READMEs and licences of installed packages, one after the other, in the order of names."""
    for name, package in sorted({one.metadata["Name"]: one for one in metadata.distributions()}.items()):
        yield f"{name} README", readme(package.metadata)
        for file in package.files or ():
            if file.name.upper().startswith("LICENSE") and "dist-info" in str(file):
                try:
                    yield f"{name} {file.name}", file.read_text(encoding="utf-8")
                except (OSError, ValueError):  # listed and gone, or in another encoding: others are there
                    continue


def _pieces(texts: Iterator[tuple[str, str]], processor: Any, tokens: int) -> Iterator[tuple[str, str]]:
    """The first piece of so many tokens of each different text, then the second of each, and so on."""
    tokenizer, seen = getattr(processor, "tokenizer", processor), set()
    long: list[tuple[str, list[int]]] = []
    for name, text in texts:
        if len(text) < tokens * _LETTERS or text in seen:
            continue
        seen.add(text)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= tokens:
            long.append((name, ids))
            yield name, tokenizer.decode(ids[:tokens])
    for start in range(tokens, max((len(ids) for _, ids in long), default=0), tokens):
        for name, ids in long:
            if len(ids) >= start + tokens:
                yield f"{name} from token {start}", tokenizer.decode(ids[start : start + tokens])


def calibrate(
    model: Any,
    processor: Any,
    prompts: Sequence[Prompt],
    out: Path,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Profile:
    """Make the profile, and write it to `out`; what was done before an interruption is not done again.

    Args:
        tell: told how many prompts are done, of how many.
    Raises:
        ValueError: the model has no layer that kvweave compresses.
    """
    mark = model_mark(model)
    begun = out.with_name(f".{out.name}.begun")
    done: dict[str, Table] = {}
    if begun.is_file():
        there = read_object(begun, fingerprint=str, prompts=dict)
        done = there["prompts"] if there["fingerprint"] == mark else {}
    tables = []
    for number, prompt in enumerate(prompts):
        tell(number, len(prompts))
        inputs = encode(processor, prompt.messages)
        key = hashlib.sha256(inputs["input_ids"].numpy().tobytes() + prompt.name.encode()).hexdigest()[:16]
        if key not in done:
            done[key] = shares_of(model, processor, dict(inputs))
            write_json(begun, {"fingerprint": mark, "prompts": done}, indent=None)
        tables.append(done[key])
    tell(len(prompts), len(prompts))
    mean = torch.tensor(tables, dtype=torch.float64).mean(0)
    shares = tuple(tuple(tuple(round(x, _DIGITS) for x in heads) for heads in table) for table in mean.tolist())
    profile = Profile(mark, BUDGETS, shares)
    profile.write(str(out), prompts=[prompt.name for prompt in prompts])
    begun.unlink(missing_ok=True)
    return profile


@torch.inference_mode()
def shares_of(model: Any, processor: Any, inputs: dict[str, Any]) -> Table:
    """What each head wants of one prompt at every budget."""
    method = Counting(budget=BUDGETS[0])
    with compress(model, method, probes="replay", processor=processor):
        model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}, use_cache=True)
    if not method.found:
        raise ValueError(f"{type(model).__name__} has no layer that kvweave compresses: allowed is one that has")
    return method.found[-1]
