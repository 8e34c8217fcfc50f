"""MileBench's questions scored without the quirks of its scorer.

A prediction is taken as words: lower case, compatibility forms of Unicode unified, everything that is neither a
letter nor a digit a gap, but for points and commas between digits, of which commas go (1,000 is 1000).
"""

import re
import unicodedata
from collections.abc import Sequence

from kvweave.evals.scores.words import rouge_l

_WORD = re.compile(r"\d+(?:\.\d+)+|[^\W_]+")
_LETTER = re.compile(r"\(?([A-Z])(?:[).:]|\s*$)|([a-z])\s*$")
_LEAD = re.compile(r"^(?:the\s+)?(?:correct\s+|best\s+)?(?:answer|option|choice)(?:\s+is)?\s*:?\s*", re.IGNORECASE)


def split(text: str) -> list[str]:
    """A text's words."""
    text = unicodedata.normalize("NFKC", text).lower()
    return _WORD.findall(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text))


def rouge(prediction: str, answer: str, choices: Sequence[str] = ()) -> float:
    """ROUGE-L F1 as it is defined: the longest common subsequence of words, each counted as often as it stands."""
    return rouge_l(" ".join(split(prediction)), " ".join(split(answer)))


def words(prediction: str, answer: str, choices: Sequence[str] = ()) -> float:
    """1 if the answer's words stand in the prediction, whole and side by side."""
    return float(_within(split(answer), split(prediction)))


def parts(prediction: str, answer: str, choices: Sequence[str] = ()) -> float:
    """Share of the answer's parts, commas between them, whose words stand in the prediction as in `words`."""
    pieces = answer.split(", ")
    return sum(words(prediction, part) for part in pieces) / len(pieces)


def choice(prediction: str, answer: str, choices: Sequence[str]) -> float:
    """1 if the prediction names the answer and no other choice.

    A letter at its beginning decides, after "Answer:" or the like where it says so; without one, the one choice
    whose words stand in it. Choices whose words are part of another's that stands there do not count. Nothing said,
    or several named, is wrong.

    Raises:
        ValueError: the answer is not among the choices.
    """
    if answer not in choices:
        raise ValueError(f"answer={answer!r} is not among its choices: {', '.join(choices)}")
    reply = _LEAD.sub("", prediction.strip())
    letter = _LETTER.match(reply)
    place = ord((letter[1] or letter[2]).upper()) - ord("A") if letter else len(choices)
    if place < len(choices):
        return float(choices[place] == answer)
    texts = {text: split(text) for text in choices}
    named = [text for text, pieces in texts.items() if pieces and _within(pieces, split(reply))]
    longest = [
        text
        for text in named
        if not any(texts[text] != texts[other] and _within(texts[text], texts[other]) for other in named)
    ]
    return float(longest == [answer])


def _within(part: Sequence[str], text: Sequence[str]) -> bool:
    return bool(part) and any(text[at : at + len(part)] == part for at in range(len(text) - len(part) + 1))
