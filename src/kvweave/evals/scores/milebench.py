"""MileBench's metrics as its own scorer computes them, quirks included, so that numbers compare with published ones.

`kvweave.evals.scores.strict` has them without the quirks. Written from a description of MileBench's `evaluate.py`.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_PERIODS = 32  # its scorer hands a flag to `re.sub` where the count goes: only so many are removed


def normalised(text: str) -> str:
    """A text as its scorer compares it.

    A mark is deleted everywhere if it stands next to a space anywhere, or if some comma stands between digits; else
    it becomes a space. The first 32 periods go, but for those before a digit.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    thousands = re.search(r"\d,\d", text) is not None
    clean = text
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        clean = clean.replace(mark, "" if beside_space or thousands else " ")
    clean = re.sub(r"\.(?!\d)", "", clean, count=_PERIODS)
    return clean.strip("'").strip('"').strip().lower()


def rouge(prediction: str, answer: str, choices: Sequence[str] = ()) -> float:
    """ROUGE-L F1 of the package `rouge`, which counts distinct words; an empty prediction has 0.

    Raises:
        ValueError: the answer is empty.
    """
    from rouge import Rouge

    reply, right = normalised(prediction), normalised(answer)
    if not right.strip("."):
        raise ValueError(f"answer={answer!r} has no words to compare with")
    if not reply.strip("."):
        return 0.0
    with _recursion(2 * len(reply.split()) + 2 * len(right.split())):
        return float(Rouge().get_scores(reply, right)[0]["rouge-l"]["f"])


def contains(prediction: str, answer: str, choices: Sequence[str] = ()) -> float:
    """1 if the prediction has the answer in it, be it as part of a word (MMCoQA)."""
    return float(normalised(answer) in normalised(prediction))


def needle(prediction: str, answer: str, choices: Sequence[str] = ()) -> float:
    """1 if one word of the prediction is the answer: one of several words is never found."""
    return float(normalised(answer) in normalised(prediction).split())


def choice(prediction: str, answer: str, choices: Sequence[str]) -> float:
    """1 if the prediction is read as the answer's letter.

    Raises:
        ValueError: the answer is not among the choices.
    """
    texts = [normalised(text) for text in choices]
    right = normalised(answer)
    if right not in texts:
        raise ValueError(f"answer={answer!r} is not among its choices: {', '.join(choices)}")
    return float(_chosen(normalised(prediction), texts) == _letter(texts.index(right)))


def _letter(place: int) -> str:
    return chr(ord("A") + place)


def _chosen(reply: str, texts: Sequence[str]) -> str:
    """The letter that a prediction is read as, or several of them, which are never right.

    Nothing at all counts as C. Then the first place decides where a letter and its text stand together; then where a
    text stands, spaces aside (a text with a character that means something to `re` is found there but not
    recognised); then a letter alone; and at last every letter of the prediction that is one of the choices'.
    """
    if reply == "":
        return "C"
    letters = [_letter(place) for place in range(len(texts))]
    both = [re.escape(normalised(f"{letter} {text}")) for letter, text in zip(letters, texts, strict=True)]
    match = re.search("|".join(both), reply, re.DOTALL)
    if match:
        return match[0][:1].upper()
    bare = [normalised(text).replace(" ", "") for text in texts]
    match = re.search("|".join(map(re.escape, bare)), reply.replace(" ", ""), re.DOTALL)
    if match:
        for letter, text in zip(letters, bare, strict=True):
            if match[0] == text and not re.search(r"[\\.^$*+?{}\[\]|()]", text):
                return letter
    if len(reply) <= 2 and reply.upper() in letters:
        return reply.upper()
    return "".join(character.upper() for character in reply if character.upper() in letters)


@contextmanager
def _recursion(words: int) -> Iterator[None]:
    """Room for the package's recursion, which goes a level deeper with each word."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, limit + words))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
