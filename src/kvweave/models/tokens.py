"""A SentencePiece tokenizer of byte-pair encoding, read from `tokenizer.model` itself, and the tokens added to it.

What transformers makes of such a folder differs from the publishers' slow tokenizers without a word: ids of added
tokens shift, or the first token is missing. The format is a protocol buffer of three messages' few fields.
"""

import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from kvweave.models.source import ModelError
from kvweave.models.weights import read_json

_SPACE = "▁"
_NORMAL, _USER_DEFINED, _BYTE = 1, 4, 6  # kinds of pieces
_BPE = 2  # a kind of model
_UNUSED = "[UNUSED_TOKEN"  # pieces that were left for tokens to come
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class Pieces:
    """What a `tokenizer.model` holds.

    Attributes:
        texts, scores, kinds: of each piece.
        prefix: a blank is put in front of a text.
        collapse: blanks at the ends are dropped, others made one.
        charsmap: how characters are normalised; empty: not at all.
    """

    texts: list[str]
    scores: list[float]
    kinds: list[int]
    prefix: bool = True
    collapse: bool = True
    charsmap: bytes = b""


def read_pieces(file: Path) -> Pieces:
    """The vocabulary and the normaliser of a SentencePiece model.

    Raises:
        ModelError: no such file, one cut short, or a model of another kind than byte-pair encoding.
    """
    texts, scores, kinds = [], [], []
    kind, suffix, normalizer = 1, 0, {}
    try:
        for number, value in _fields(file.read_bytes()):
            if number == 1:  # a piece: text, score, kind
                piece = dict(_fields(value))
                texts.append(piece[1].decode())
                scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
                kinds.append(piece.get(3, _NORMAL))
            elif number == 2:  # how it was trained: kind of model, blanks behind words
                trainer = dict(_fields(value))
                kind, suffix = trainer.get(3, 1), trainer.get(24, 0)
            elif number == 3:  # normaliser: its table, blank in front, blanks made one
                normalizer = dict(_fields(value))
    except (OSError, ValueError, KeyError, IndexError, struct.error, AttributeError, TypeError) as error:
        raise ModelError(f"{file} cannot be read as a SentencePiece model ({type(error).__name__})") from error
    if kind != _BPE or suffix or not texts:
        raise ModelError(f"{file} is a SentencePiece model of kind {kind}: allowed is byte-pair encoding, {_BPE}")
    flags = bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1))
    return Pieces(texts, scores, kinds, *flags, normalizer.get(2, b""))


def special_ids(folder: Path) -> dict[str, int]:
    """Ids of the tokens that a folder's tokenizer files add to its vocabulary; none where it has no such files.

    Raises:
        ModelError: two files disagree.
    """
    ids: dict[str, int] = {}
    config, added = folder / "tokenizer_config.json", folder / "added_tokens.json"
    if config.is_file():
        ids = {entry["content"]: int(n) for n, entry in read_json(config).get("added_tokens_decoder", {}).items()}
    for content, number in (read_json(added) if added.is_file() else {}).items():
        if ids.setdefault(content, number) != number:
            raise ModelError(
                f"{folder}: {content!r} has id {ids[content]} in {config.name}, {number} in {added.name}"
            )
    return ids


def sentencepiece_tokenizer(
    folder: Path, *, prefix_behind_specials: bool = True, appended: tuple[str, ...] = (), **options: Any
) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder with `tokenizer.model`: ids and text as the slow one's, the first token <s>.

    Args:
        prefix_behind_specials: whether a text goes on with a blank behind a special token, as at its beginning
            (where the model puts one there at all).
        appended: further special tokens behind the vocabulary.
        options: for the tokenizer's class, such as `extra_special_tokens`.
    Raises:
        ModelError: a file that is missing or of another kind, or tokens that do not come to the ids they should.
    """
    config = read_json(folder / "tokenizer_config.json")
    pieces = read_pieces(folder / "tokenizer.model")
    ids = special_ids(folder)
    renamed = {number: content for content, number in ids.items() if number < len(pieces.texts)}
    for number, content in renamed.items():
        piece = pieces.texts[number]
        if pieces.kinds[number] in (_NORMAL, _BYTE) and piece != content and not piece.startswith(_UNUSED):
            raise ModelError(f"{folder}: {content!r} should have id {number}, which is the piece {piece!r}")
    names = [renamed.get(number, text) for number, text in enumerate(pieces.texts)]
    named = _named(folder, config)
    tokenizer = _bpe(pieces, names, named["unk_token"], prefix_behind_specials)
    entries = {
        content: config.get("added_tokens_decoder", {}).get(str(number), {}) for content, number in ids.items()
    }
    for content in named.values():
        if content not in entries:
            entries[content] = {}
            ids[content] = names.index(content) if content in names else -1
    user = [AddedToken(text, normalized=False) for text, kind in zip(names, pieces.kinds, strict=True)
            if kind == _USER_DEFINED and text not in entries]  # fmt: skip
    tokenizer.add_tokens(user)
    specials = {*named.values(), *_additional(folder, config)}
    for content in sorted(entries, key=ids.__getitem__):
        flags = {flag: bool(entries[content].get(flag, False)) for flag in ("lstrip", "rstrip", "single_word")}
        special = content in specials or bool(entries[content].get("special", True))
        tokenizer.add_tokens([AddedToken(content, normalized=False, special=special, **flags)])
        if tokenizer.token_to_id(content) != ids[content]:
            raise ModelError(
                f"{folder}: {content!r} should have id {ids[content]}, after {len(names)} pieces and the tokens "
                f"before it {tokenizer.token_to_id(content)} is next"
            )
    tokenizer.add_special_tokens([AddedToken(content, normalized=False) for content in appended])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        add_bos_token=True,
        add_eos_token=False,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=config.get("model_max_length") or 2048,
        **named,
        **options,
    )


def _bpe(pieces: Pieces, names: list[str], unknown: str, prefix_behind_specials: bool) -> Tokenizer:
    """Pieces merge in the order of their scores; characters that are no piece become their bytes."""
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = []
    for number, name in enumerate(names):
        if pieces.kinds[number] == _NORMAL and name == pieces.texts[number]:
            for at in range(1, len(name)):
                left, right = vocabulary.get(name[:at]), vocabulary.get(name[at:])
                if left is not None and right is not None:
                    merges.append((-pieces.scores[number], left, right))
    pairs = [(names[left], names[right]) for _, left, right in sorted(merges)]
    tokenizer = Tokenizer(BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Precompiled(pieces.charsmap)] if pieces.charsmap else []
    if pieces.collapse:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    decoding: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if pieces.prefix and prefix_behind_specials:
        steps.append(normalizers.Prepend(_SPACE))
    elif (
        pieces.prefix
    ):  # blanks are gone by then: the first puts one at the very beginning, the second makes it a piece
        first = pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False)
        rest = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="never", split=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, rest])
    if pieces.prefix:
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def _named(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Beginning, end, unknown and padding, from a tokenizer's two configurations; unsaid, <unk> pads."""
    file = folder / "special_tokens_map.json"
    both = {**(read_json(file) if file.is_file() else {}), **{k: v for k, v in config.items() if v is not None}}
    contents = {name: _content(both[name]) for name in _NAMED if both.get(name)}
    unknown = contents.get("unk_token", "<unk>")
    return {"bos_token": "<s>", "eos_token": "</s>", "unk_token": unknown, "pad_token": unknown, **contents}


def _additional(folder: Path, config: dict[str, Any]) -> list[str]:
    file = folder / "special_tokens_map.json"
    maps = [config, read_json(file) if file.is_file() else {}]
    return [
        _content(token) for token in itertools.chain(*(each.get("additional_special_tokens", ()) for each in maps))
    ]


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffer's message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, at = _varint(data, at)
        if size is None or at + size > len(data):
            raise ValueError("not a message")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Seven bits a byte, the lowest first."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
