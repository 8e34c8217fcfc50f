"""Seven kinds of questions about long texts, for `smol-text` and any other model that reads text.

*needle*: two codes somewhere in prose, each behind its name, one asked for. *reversed*: two phone numbers, each
before its name. *records*: three prices, alike but for their names, one asked for. *several*: two phone numbers, each
behind its name, both asked for. *copy*: the long sentence on a sign, to be said again. *prose*: the README of an
installed package goes on; what the model makes of it is held against the full cache's continuation token by token
(fidelity), and against the file's own. *many*: ten unlike facts, asked about one after the other; `unseen` cuts once
for all ten.

Answers are sentences whose first words give nothing away: a value is read from the cache while it is said. Questions
are worded so that SmolLM2-135M can answer them with its full cache (docs/EVALUATION.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np

from kvweave.evals.tasks.tasks import Example

KINDS = ("needle", "reversed", "records", "several", "copy", "prose", "many")
DEFAULT_KINDS = KINDS[:-1]  # where none are named
TOGETHER = 10  # questions about one text, of *many*
FEWEST, MOST = 200, 6_000  # tokens
_PER_SENTENCE = 14  # tokens of a sentence of prose, roughly
_WORDS_PER_TOKEN = 0.35  # of a README

_PLACES = (
    "boat house", "north gate", "clock tower", "wine cellar", "bird tower", "salt store", "grain loft", "tool shed",
    "music room", "west wing", "lamp room", "map room", "rose garden", "ice house", "rope walk", "toll house",
)  # fmt: skip
_NAMES = ("Anna", "Boris", "Carla", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Louis",
          "Maria", "Nadia", "Oscar", "Paula")  # fmt: skip
_WHO = ("the baker", "a young teacher", "the mayor", "an old sailor", "the doctor", "a painter", "the gardener",
        "a tall farmer", "the librarian", "a tired postman", "the carpenter", "a visiting singer")  # fmt: skip
_DID = ("walked slowly past", "talked for an hour about", "bought new paint for", "forgot an umbrella near",
        "wrote a short letter about", "took two photographs of", "repaired a broken window of", "waited in front of",
        "read an old story about", "planted a small tree beside", "asked everyone about", "dreamed of")  # fmt: skip
_WHAT = ("the stone bridge", "the fish market", "the village school", "the train station", "the little chapel",
         "the town hall", "the football field", "the green park", "the coffee shop", "the museum",
         "the river bank", "the main road")  # fmt: skip
_WHEN = ("on Monday", "after lunch", "before sunrise", "during the storm", "in early spring", "last winter",
         "on the first warm day", "late in the evening", "while it rained", "at the end of the week",
         "for the third time", "without any reason")  # fmt: skip
_FACTS = (  # what a number is of, and of whom
    ("code of the {}", _PLACES),
    ("phone number of {}", _NAMES),
    ("price of the {}", ("red bicycle", "old piano", "silver lamp", "wooden boat")),
    ("height of the {}", ("oak tree", "church tower", "water mill", "north wall")),
    ("weight of the {}", ("brown horse", "iron anchor", "marble table", "copper bell")),
    ("number of books in the {}", ("public library", "monastery", "castle", "hospital")),
    ("distance to the {}", ("lighthouse", "border", "waterfall", "desert")),
    ("depth of the {}", ("blue lake", "old well", "salt mine", "harbour")),
    ("age of the {}", ("stone statue", "sunken ship", "giant turtle", "royal crown")),
    ("size of the {}", ("wheat field", "forest", "island", "vineyard")),
)
#: Packages whose READMEs *prose* goes on with.
READMES = ("hypothesis", "numpy", "rich", "typer", "safetensors", "pre_commit", "regex", "tqdm", "click", "Jinja2",
            "pydantic", "networkx", "matplotlib", "attrs", "filelock", "fsspec")  # fmt: skip


@dataclass(frozen=True)
class TextTask:
    """One kind, on texts of about `tokens` tokens, as SmolLM2 counts them."""

    name: str
    count: int = 100
    tokens: int = 600

    @property
    def max_new_tokens(self) -> int:
        return {"copy": 80, "several": 64, "prose": 64}.get(self.name, 32)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Values: whether all of them, and only whole, are said; texts: the words' overlap."""
        return ("rouge_l",) if self.name in ("copy", "prose") else ("strict_parts",)

    def examples(self, seed: int) -> list[Example]:
        """`count` questions, each about a text of its own; of *many* ten about each."""
        if self.name == "many":
            texts = range(-(-self.count // TOGETHER))
            return [one for n in texts for one in self._about_one(seed, n)][: self.count]
        return [self._example(seed, n) for n in range(self.count)]

    def to_dict(self) -> dict[str, Any]:
        readmes = {"readmes": _installed()} if self.name == "prose" else {}
        return {"source": "text", **asdict(self), **readmes}

    def _rng(self, seed: int, number: int) -> np.random.Generator:
        return np.random.default_rng([seed, KINDS.index(self.name), self.tokens, number])

    def _example(self, seed: int, number: int) -> Example:
        context, question, answer = _MAKERS[self.name](self.tokens, self._rng(seed, number))
        return Example(f"{self.name}/{self.tokens}/{seed}/{number}", _asking(context, question), question, answer)

    def _about_one(self, seed: int, number: int) -> list[Example]:
        """All questions about one text."""
        context, questions = _many(self.tokens, self._rng(seed, number))
        name = f"{self.name}/{self.tokens}/{seed}/{number}"
        return [
            Example(f"{name}/{n}", _asking(context, question), question, answer, context=name)
            for n, (question, answer) in enumerate(questions)
        ]


def text_tasks(names: Sequence[str] = DEFAULT_KINDS, count: int = 100, tokens: int = 600) -> tuple[TextTask, ...]:
    """Tasks by name.

    Raises:
        ValueError: a name, a count or a number of tokens that is not allowed.
    """
    if count < 1:
        raise ValueError(f"count={count} is not allowed: allowed is an int >= 1")
    if not FEWEST <= tokens <= MOST:
        raise ValueError(f"tokens={tokens} is not allowed: allowed is {FEWEST} to {MOST}")
    if not names:
        raise ValueError(f"tasks is empty: allowed is at least one of {', '.join(KINDS)}")
    for name in names:
        if name not in KINDS:
            raise ValueError(f"tasks={name!r} is unknown: allowed is one of {', '.join(KINDS)}")
    return tuple(TextTask(name, count, tokens) for name in dict.fromkeys(names))


def _asking(context: str, question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": text} for text in (context, question)]}]


_Task = tuple[str, str, str]  # context, question, answer


def _needle(tokens: int, rng: np.random.Generator) -> _Task:
    places, codes = _some(_PLACES, 2, rng), _numbers(2, 5, rng)
    facts = [f"The code of the {place} is {code}." for place, code in zip(places, codes, strict=True)]
    return _strewn(facts, tokens, rng), f"What is the code of the {places[0]}?", codes[0]


def _reversed(tokens: int, rng: np.random.Generator) -> _Task:
    names, numbers = _some(_NAMES, 2, rng), _numbers(2, 5, rng)
    facts = [f"The phone number {number} belongs to {name}." for name, number in zip(names, numbers, strict=True)]
    return _strewn(facts, tokens, rng), f"Which phone number belongs to {names[0]}?", numbers[0]


def _records(tokens: int, rng: np.random.Generator) -> _Task:
    places, prices = _some(_PLACES, 3, rng), _numbers(3, 4, rng)
    rows = [f"The price of the {place} is {price} crowns." for place, price in zip(places, prices, strict=True)]
    return _strewn(rows, tokens, rng), f"What is the price of the {places[0]}?", prices[0]


def _several(tokens: int, rng: np.random.Generator) -> _Task:
    names, numbers = _some(_NAMES, 2, rng), _numbers(2, 5, rng)
    facts = [f"The phone number of {name} is {number}." for name, number in zip(names, numbers, strict=True)]
    question = f"What are the phone numbers of {names[0]} and {names[1]}?"
    return _strewn(facts, tokens, rng), question, ", ".join(numbers)


def _copy(tokens: int, rng: np.random.Generator) -> _Task:
    first, second = (f"{_pick(_WHO, rng)} {_pick(_DID, rng)} {_pick(_WHAT, rng)}" for _ in range(2))
    sign = f'The sign on the old door says: "{first.capitalize()} and {second}."'
    return _strewn([sign], tokens, rng), "What does the sign on the old door say?", sign


def _prose(tokens: int, rng: np.random.Generator) -> _Task:
    texts = [text for name in _installed() if len(text := _readme(name)) > 8 * tokens]
    if not texts:
        raise ValueError(f"tokens={tokens} is not allowed: no installed package has so long a README")
    words = _pick(texts, rng).split(" ")
    length = int(tokens * _WORDS_PER_TOKEN)
    first = int(rng.integers(max(1, len(words) - length - 100)))
    context = " ".join(words[first : first + length])
    return context, "Continue this text.", " ".join(words[first + length : first + length + 40])


def _many(tokens: int, rng: np.random.Generator) -> tuple[str, list[tuple[str, str]]]:
    """The text; its questions with their answers."""
    of = [fact.format(_pick(whose, rng)) for fact, whose in _FACTS]
    numbers = _numbers(len(of), 4, rng)
    context = _strewn([f"The {what} is {number}." for what, number in zip(of, numbers, strict=True)], tokens, rng)
    return context, [(f"What is the {what}?", number) for what, number in zip(of, numbers, strict=True)]


_MAKERS: dict[str, Callable[[int, np.random.Generator], _Task]] = {
    "needle": _needle,
    "reversed": _reversed,
    "records": _records,
    "several": _several,
    "copy": _copy,
    "prose": _prose,
}


def _strewn(facts: Sequence[str], tokens: int, rng: np.random.Generator) -> str:
    """Prose of about so many tokens, the facts anywhere in it, in a random order."""
    sentences = [
        f"{_pick(_WHO, rng)} {_pick(_DID, rng)} {_pick(_WHAT, rng)} {_pick(_WHEN, rng)}.".capitalize()
        for _ in range(tokens // _PER_SENTENCE - len(facts))
    ]
    for fact in facts:
        sentences.insert(int(rng.integers(len(sentences) + 1)), fact)
    return " ".join(sentences)


def _some(items: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """So many of them, all different."""
    return [items[n] for n in rng.choice(len(items), count, replace=False)]


def _numbers(count: int, digits: int, rng: np.random.Generator) -> list[str]:
    """Unlike numbers of so many digits."""
    return [str(number) for number in rng.choice(np.arange(10 ** (digits - 1), 10**digits), count, replace=False)]


def _pick(items: Sequence[str], rng: np.random.Generator) -> str:
    return items[int(rng.integers(len(items)))]


def _installed() -> list[str]:
    """Packages with a README that are here, with their versions."""
    here = []
    for name in READMES:
        try:
            here.append(f"{name}=={metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return here


def _readme(package: str) -> str:
    return readme(metadata.metadata(package.split("==")[0]))


def readme(package: Any) -> str:
    """What a package's metadata, an e-mail's headers and text, describe it as."""
    return package.get("Description") or str(package.get_payload() or "")
