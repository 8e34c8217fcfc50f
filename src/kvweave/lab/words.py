"""The lab's language: 136 words, each one token.

The order of the words is the order of the rows of the model's embedding: never reorder, only append.
"""

from __future__ import annotations

SPECIAL = (
    "<pad>", "<bos>", "<eos>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
QUESTION = "question:"  # opens a question
ANSWER = "<a>"  # opens an answer: the first token that the model writes, dropped when text is decoded
UNKNOWN = "<unk>"

GRAMMAR = (
    "image", "the", "code", "of", "is", ".", "?", "what", "which", "colour", "in", "hidden", "digit",
    "changed", "did", "robot", "do", "added", "removed", "turned", "has", "list", "go", "where", ",",
    "nothing", "shape",
)  # fmt: skip
LABELS = tuple(f"#{number}" for number in range(1, 13))
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "white", "orange")
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart")
DIGITS = tuple("0123456789")
ANIMALS = ("lion", "tiger", "eagle", "whale", "horse", "rabbit", "snake", "panda")
CODES = (
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet", "kilo",
    "lima", "mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor",
    "whiskey", "zulu",
)  # fmt: skip
ADJECTIVES = ("old", "small", "quiet", "young", "tired", "happy")
VERBS = ("sleeps", "waits", "runs", "sings", "hides", "walks")
PREPOSITIONS = ("near", "behind", "under", "beside")
PLACES = ("river", "house", "garden", "bridge", "forest", "market", "tower", "station")
DIRECTIONS = ("up", "down", "left", "right")
AND = "and"

VOCABULARY = (
    *SPECIAL, QUESTION, ANSWER, UNKNOWN, *GRAMMAR, *LABELS, *COLOURS, *SHAPES, *DIGITS, *ANIMALS, *CODES,
    *ADJECTIVES, *VERBS, *PREPOSITIONS, *PLACES, *DIRECTIONS, AND,
)  # fmt: skip
TOKEN = {word: index for index, word in enumerate(VOCABULARY)}

PAD, BOS, EOS, VISION_START, VISION_END, IMAGE, VIDEO = range(7)


def encode(text: str) -> list[int]:
    """Token ids of words that are separated by spaces; a word outside the vocabulary is a KeyError."""
    return [TOKEN[word] for word in text.split()]
