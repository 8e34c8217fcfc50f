"""A reply's text in pieces: together they are the text, whatever the tokenizer joins and wherever a stop falls."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvweave.serve.engine.reply import Reply
from kvweave.serve.engine.sampling import Sampler

_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
_BYTE_LEVEL = Tokenizer(models.BPE({letter: n for n, letter in enumerate(_BYTES)}, []))
_BYTE_LEVEL.decoder = decoders.ByteLevel()
_WORDS = Tokenizer(models.WordLevel({f"w{n}": n for n in range(256)}, "w0"))
_METASPACE = Tokenizer(models.WordLevel({f"▁w{n}" if n % 3 else f"w{n}": n for n in range(256)}, "w1"))
_METASPACE.decoder = decoders.Metaspace()
TOKENIZERS = {"bytes": _BYTE_LEVEL, "words": _WORDS, "metaspace": _METASPACE}


def said(tokenizer: Tokenizer, tokens: list[int], end: bool = False, **more: Any) -> tuple[list[str], Reply]:
    """Pieces of a reply whose tokens are these."""
    most = len(tokens) + end
    reply = Reply(0, Sampler(0), most, lambda ids: tokenizer.decode(list(ids)), ends=[999], **more)
    pieces = []
    for token in [*tokens, *[999] * end]:
        piece = reply.take(torch.zeros(1), token)
        pieces.append(piece.text)
        if piece.finish:
            break
    return pieces, reply


@given(tokens=st.lists(st.integers(0, 255), min_size=1, max_size=24), end=st.booleans())
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_together_are_the_text(kind: str, tokens: list[int], end: bool) -> None:
    pieces, reply = said(TOKENIZERS[kind], tokens, end)
    assert "".join(pieces) == TOKENIZERS[kind].decode(tokens)
    assert reply.finish == ("stop" if end else "length")


@given(text=st.text(min_size=1, max_size=12))
def test_no_character_comes_in_halves(text: str) -> None:
    tokens = [_BYTE_LEVEL.token_to_id(_of_byte(byte)) for byte in text.encode()]
    pieces, _ = said(_BYTE_LEVEL, tokens)
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def _of_byte(byte: int) -> str:
    """A byte as GPT-2 writes it."""
    return (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(chr(byte))[0][0][-1]
        if (byte < 128)
        else next(
            letter
            for letter in _BYTES
            if _BYTE_LEVEL.decoder.decode([letter]) == "\ufffd" and _byte_of(letter) == byte
        )
    )


def _byte_of(letter: str) -> int:
    """GPT-2's table, backwards: printable letters are themselves, the others follow from 256 on."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return ord(letter) if ord(letter) < 256 else others[ord(letter) - 256]


@given(
    letters=st.text("abc", min_size=1, max_size=20),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_stop_ends_the_text_where_it_first_occurs(letters: str, stops: list[str]) -> None:
    tokens = [_BYTE_LEVEL.token_to_id(letter) for letter in letters]
    pieces, reply = said(_BYTE_LEVEL, tokens, end=True, stops=stops)
    ends = [letters.find(stop) + len(stop) for stop in stops if stop in letters]
    if not ends:
        assert "".join(pieces) == letters
        return
    known = letters[: min(ends)]  # what was said when the first stop was complete
    assert "".join(pieces) == known[: min(known.find(stop) for stop in stops if stop in known)]
    assert reply.finish == "stop"
    assert len(reply.tokens) == min(ends)


@given(
    chances=st.lists(st.floats(0.01, 1), min_size=2, max_size=8),
    top_p=st.floats(0.05, 1),
    temperature=st.floats(0.1, 2),
    seed=st.integers(0, 1000),
)
def test_draws_are_among_the_likeliest(chances: list[float], top_p: float, temperature: float, seed: int) -> None:
    logits = torch.tensor(chances).log()
    drawn = Sampler(temperature, top_p, seed).draw(logits)
    spread = (logits / temperature).softmax(-1)
    before = float(spread[spread > spread[drawn]].sum())  # of those that are likelier
    assert before < top_p + 1e-6


def test_draws_follow_the_chances() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    sampler = Sampler(1.0, 1.0, 0)
    counts = torch.bincount(torch.tensor([sampler.draw(logits) for _ in range(4000)]), minlength=3) / 4000
    assert counts.tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    sharp = Sampler(0.5, 1.0, 0)
    counts = torch.bincount(torch.tensor([sharp.draw(logits) for _ in range(4000)]), minlength=3) / 4000
    assert counts.tolist() == pytest.approx([0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38], abs=0.03)
