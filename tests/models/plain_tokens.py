"""What SentencePiece's byte-pair encoding and the publishers' slow tokenizers do, one merge at a time."""

import itertools
import re

from published_folders import pieces


def sentencepiece_ids(text, *, prefix, collapse=False, unused=6):
    """Of all neighbours that make a piece those with the best score merge, the leftmost first, until none do."""
    table = pieces(unused)
    ids = {text: number for number, (text, _, _) in enumerate(table)}
    score = {text: score for text, score, kind in table if kind == 1}
    if collapse:
        text = re.sub(" +", " ", text).strip(" ")
    if not text:
        return []
    parts = list((" " + text if prefix else text).replace(" ", "▁"))
    while True:
        joined = [left + right for left, right in itertools.pairwise(parts)]
        known = [(-score[text], at) for at, text in enumerate(joined) if text in score]
        if not known:
            break
        at = min(known)[1]
        parts[at : at + 2] = [joined[at]]
    out = []
    for part in parts:
        out += [ids[part]] if part in score else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return out


def slow_ids(text, added, *, prefix, legacy=True, unused=6):
    """Text between added tokens is encoded by itself; without `legacy` a blank is put in front of the first alone.

    Args:
        added: id of each added token.
    """
    out = []
    split = re.split("(" + "|".join(map(re.escape, added)) + ")", text)
    for number, part in enumerate(split):
        if part in added:
            out.append(added[part])
        else:
            out += sentencepiece_ids(part, prefix=prefix and (legacy or number == 0), unused=unused)
    return out
