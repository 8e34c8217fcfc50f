"""A run as one picture: both answers, and what stayed of each image."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from kvweave.report.data import Answer, Run, Token, size, speed_text
from kvweave.report.grids import Grid

Colour = tuple[int, int, int]

GROUND, PANEL, INK, SOFT, LINE = (247, 247, 244), (255, 255, 255), (29, 33, 37), (93, 102, 111), (223, 224, 218)
KEPT, MERGED, EVICTED = (0, 135, 108), (138, 99, 210), (163, 168, 173)
GOOD, BAD = (0, 119, 79), (192, 57, 43)

_WIDTH, _MARGIN, _GAP = 1600, 48, 24
_MOST_WORDS = 16  # tokens of text shown before an image; the last ones
_MOST_AT_THE_END = 80
_SMALL = 200  # pixels: smaller images are enlarged with sharp edges


def png(run: Run) -> Image.Image:
    """The picture: shares of kept, merged and evicted are means over the compressed layers and KV heads."""
    canvas = _Canvas()
    y = canvas.title(run)
    y = canvas.answers(run, y)
    for answer in run.answers:
        y = canvas.board(run, answer, y)
    return canvas.image.crop((0, 0, _WIDTH, y + _MARGIN // 2))


@dataclass(frozen=True)
class Shares:
    """Of each token of the prompt: in what share of layers and heads it was kept, and merged; [tokens] each."""

    kept: NDArray[np.float64]
    merged: NDArray[np.float64]


def shares(answer: Answer, tokens: int) -> Shares:
    """What became of each token, on average."""
    own = np.arange(tokens)
    kept, merged = [], []
    for layer in answer.layers:
        if layer.compressed:
            fate = own[None] if layer.fate is None else np.asarray(layer.fate)  # [kv_heads, tokens]
            kept.append((fate == own).mean(0))
            merged.append(((fate != own) & (fate >= 0)).mean(0))
    return Shares(np.mean(kept, 0), np.mean(merged, 0))


@dataclass(frozen=True)
class Piece:
    """A stretch of the prompt: words (places of tokens), then an image or the prompt's end."""

    words: list[int]
    grid: Grid | None


def pieces(tokens: Sequence[Token], grids: Sequence[Grid]) -> Iterator[Piece]:
    """The prompt in its order."""
    starts = {grid.tokens[0]: grid for grid in grids}
    words: list[int] = []
    for place, token in enumerate(tokens):
        if place in starts:
            yield Piece(words, starts[place])
            words = []
        elif not token.visual:
            words.append(place)
    if words:
        yield Piece(words, None)


class _Canvas:
    """Paper that grows downwards."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (_WIDTH, 400), GROUND)
        self.draw = ImageDraw.Draw(self.image)

    def reach(self, y: int) -> None:
        """Make the paper at least `y` pixels high."""
        if y > self.image.height:
            taller = Image.new("RGB", (_WIDTH, max(y, 2 * self.image.height)), GROUND)
            taller.paste(self.image, (0, 0))
            self.image, self.draw = taller, ImageDraw.Draw(taller)

    def text(self, xy: tuple[int, int], words: str, points: int, colour: Colour = INK, bold: bool = False) -> int:
        """Write one line; the x where it ends."""
        font = _font(points, bold)
        self.draw.text(xy, words, fill=colour, font=font)
        return int(xy[0] + font.getlength(words))

    def title(self, run: Run) -> int:
        y = _MARGIN
        for line in _wrapped(run.question, 40, _WIDTH - 2 * _MARGIN, most=3):
            self.reach(y + 60)
            self.text((_MARGIN, y), line, 40, bold=True)
            y += 52
        images = f"{len(run.images)} image{'s' if len(run.images) != 1 else ''}"
        summary = f"{run.model} · {images} · {len(run.tokens)} prompt tokens, {run.visual} of them visual"
        self.text((_MARGIN, y), _cut(summary, 22, _WIDTH - 2 * _MARGIN), 22, SOFT)
        return y + 52

    def answers(self, run: Run, y: int) -> int:
        """A card for each answer, three in a row; of four, two."""
        answers = [run.full, *run.answers]
        columns = 2 if len(answers) == 4 else min(3, len(answers))
        wide = (_WIDTH - 2 * _MARGIN - (columns - 1) * _GAP) // columns
        for first in range(0, len(answers), columns):
            self.reach(y + 220)
            for n, answer in enumerate(answers[first : first + columns]):
                self.card(run, answer, _MARGIN + n * (wide + _GAP), y, wide)
            y += 180 + _GAP
        return y

    def card(self, run: Run, answer: Answer, x: int, y: int, wide: int) -> None:
        self.draw.rounded_rectangle((x, y, x + wide, y + 180), 16, PANEL, LINE, 2)
        x, wide = x + 24, wide - 48
        self.text((x, y + 16), _cut(answer.method, 22, wide), 22, SOFT)
        verdict, colour = _verdict(run, answer)
        room = wide - int(_font(22, True).getlength(verdict)) - 20
        end = self.text((x, y + 50), _cut(answer.text or "(nothing)", 36, room, bold=True), 36, bold=True)
        self.text((end + 20, y + 63), verdict, 22, colour, bold=True)
        share = answer.cache_bytes / run.full.cache_bytes
        self.draw.rounded_rectangle((x, y + 106, x + wide, y + 118), 6, LINE)
        end = x + max(12, int(share * wide))
        self.draw.rounded_rectangle((x, y + 106, end, y + 118), 6, SOFT if answer is run.full else KEPT)
        facts = f"KV cache {size(answer.cache_bytes)} ({share:.0%}) · {speed_text(answer.speed)} tokens/s"
        self.text((x, y + 136), _cut(facts, 19, wide), 19)

    def board(self, run: Run, answer: Answer, y: int) -> int:
        """The prompt, each token by what became of it."""
        self.reach(y + 100)
        parts = shares(answer, len(run.tokens))
        y = self.legend(answer, parts, y + 8)
        columns = {1: 2, 2: 2, 3: 3, 4: 4}.get(len(run.grids), 6 if len(run.grids) <= 24 else 8)
        wide = (_WIDTH - 2 * _MARGIN - (columns - 1) * _GAP) // columns
        row: list[Piece] = []
        for piece in pieces(run.tokens, run.grids):
            if piece.grid is None:
                y = self.row(run, row, parts, y, wide)
                row = []
                y = self.words(run, piece.words[-_MOST_AT_THE_END:], parts, _MARGIN, y, _WIDTH - 2 * _MARGIN) + _GAP
                continue
            row.append(piece)
            if len(row) == columns:
                y = self.row(run, row, parts, y, wide)
                row = []
        return self.row(run, row, parts, y, wide)

    def legend(self, answer: Answer, parts: Shares, y: int) -> int:
        x = self.text((_MARGIN, y), _cut(answer.method, 26, 800, bold=True), 26, bold=True) + 36
        kept, merged = float(parts.kept.mean()), float(parts.merged.mean())
        for name, colour, share in (
            ("kept", KEPT, kept),
            ("merged", _mix(GROUND, MERGED, 0.55), merged),
            ("evicted", _mix(GROUND, EVICTED, 0.45), 1 - kept - merged),
        ):
            self.draw.rounded_rectangle((x, y + 6, x + 22, y + 28), 5, colour)
            x = self.text((x + 32, y + 2), f"{name} {abs(share):.0%}", 22) + 32
        return y + 58

    def row(self, run: Run, row: Sequence[Piece], parts: Shares, y: int, wide: int) -> int:
        """Pieces side by side, images in line; y below them."""
        if not row:
            return y
        texts = [piece.words[-_MOST_WORDS:] for piece in row]
        above = max(self.words(run, words, parts, 0, 0, wide, measure=True) for words in texts)
        pictures = [_picture(run, piece.grid, parts, wide) for piece in row if piece.grid is not None]
        below = max(picture.height for picture in pictures)
        self.reach(y + above + below + 80)
        for n, (words, picture) in enumerate(zip(texts, pictures, strict=True)):
            x = _MARGIN + n * (wide + _GAP)
            high = self.words(run, words, parts, 0, 0, wide, measure=True)
            self.words(run, words, parts, x, y + above - high, wide)
            self.image.paste(picture, (x, y + above + 6))
        return y + above + below + 6 + _GAP

    def words(
        self, run: Run, places: Sequence[int], parts: Shares, x: int, y: int, wide: int, measure: bool = False
    ) -> int:
        """Tokens of text as chips, wrapped; y below them."""
        font, left, line = _font(17, False), x, 28
        if not measure:
            self.reach(y + line * (len(places) + 1))
        for place in places:
            token = run.tokens[place]
            word = _cut("▪" if token.special else token.text.strip() or "␣", 17, wide - 12)
            length = int(font.getlength(word)) + 10
            if x > left and x + length > left + wide:
                x, y = left, y + line
            if not measure:
                kept, merged = float(parts.kept[place]), float(parts.merged[place])
                paper = _mix(_mix(GROUND, MERGED, 0.3 * merged), KEPT, 0.38 * kept)
                self.draw.rounded_rectangle((x, y, x + length, y + 23), 5, paper)
                self.draw.line((x + 3, y + 23, x + length - 3, y + 23), _mix(paper, KEPT, kept), 2)
                self.draw.text((x + 5, y + 1), word, fill=_mix(paper, INK, 0.42 + 0.58 * kept), font=font)
            x += length + 5
        return y + line if places else y


def _picture(run: Run, grid: Grid, parts: Shares, wide: int) -> Image.Image:
    """An image with each visual token's cell drawn as it was treated."""
    source = None if grid.image is None else run.images[grid.image].convert("RGB")
    aspect = grid.rows / grid.columns if source is None else source.height / source.width
    high = max(1, round(wide * aspect))
    if source is None:
        image = Image.new("RGB", (wide, high), KEPT)
    else:
        image = source.resize((wide, high), Image.Resampling.NEAREST if source.width <= _SMALL else None)
    pen = ImageDraw.Draw(image, "RGBA")
    edges_x = [round(n * wide / grid.columns) for n in range(grid.columns + 1)]
    edges_y = [round(n * high / grid.rows) for n in range(grid.rows + 1)]
    boxes = []
    for n, place in enumerate(grid.tokens):
        row, column = divmod(n, grid.columns)
        box = (edges_x[column], edges_y[row], edges_x[column + 1] - 1, edges_y[row + 1] - 1)
        boxes.append((box, float(parts.kept[place])))
        evicted = 1 - parts.kept[place]
        pen.rectangle(box, (*GROUND, round(255 * 0.88 * evicted)))
        pen.rectangle(box, (*MERGED, round(255 * 0.42 * parts.merged[place])))
    line = max(1, round(min(4, wide / grid.columns / 12)))
    for box, kept in boxes:
        if wide / grid.columns > 12:
            pen.rectangle(box, None, (*GROUND, 128), 1)
        if kept:
            pen.rectangle(box, None, (*KEPT, round(255 * kept)), line)
    return image


def _verdict(run: Run, answer: Answer) -> tuple[str, Colour]:
    if run.right is not None:
        return ("✓ right", GOOD) if answer.text == run.right else ("✗ wrong", BAD)
    if answer is run.full:
        return "", SOFT
    return ("as full", GOOD) if answer.text == run.full.text else ("differs", BAD)


def _mix(below: Colour, above: Colour, share: float) -> Colour:
    red, green, blue = (round(b + (a - b) * share) for b, a in zip(below, above, strict=True))
    return red, green, blue


@cache
def _font(points: int, bold: bool) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    file = resources.files("matplotlib").joinpath("mpl-data", "fonts", "ttf", name)
    with resources.as_file(file) as path:
        return ImageFont.truetype(str(path), points)


def _cut(words: str, points: int, wide: int, bold: bool = False) -> str:
    """One line of at most `wide` pixels."""
    words, font = " ".join(words.split()), _font(points, bold)
    if font.getlength(words) <= wide:
        return words
    while words and font.getlength(words + "…") > wide:
        words = words[:-1]
    return words + "…"


def _wrapped(words: str, points: int, wide: int, most: int) -> list[str]:
    """Bold lines of at most `wide` pixels; what does not fit `most` of them is cut."""
    font, lines = _font(points, True), [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= wide or not lines[-1] or len(lines) == most:
            lines[-1] = longer
        else:
            lines.append(word)
    return [_cut(line, points, wide, bold=True) for line in lines]
