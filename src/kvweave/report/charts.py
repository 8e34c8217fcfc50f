"""Figures of numbers: curves and dots with intervals, and grids; on light paper, which reads well in both themes.

Colours are Okabe and Ito's, told apart by colour-blind people too; marked curves also differ in marker.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvweave.report.picture import GROUND, INK, LINE, SOFT, Colour

_MARKED = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_QUIET = "#a9afb5"
_LIMIT = "#1d2125"
_NAME_SIZE = 7.5  # points


@dataclass(frozen=True)
class Curve:
    """A method's scores; `marked`: told apart; `limit`: what others are held against, dashed."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    marked: bool = False
    limit: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves by budget in %, and the full cache's score."""

    title: str
    curves: Sequence[Curve]
    full: float | None = None


@dataclass(frozen=True)
class Lines:
    """Any quantity by any other, both axes logarithmic."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]


@dataclass(frozen=True)
class Dots:
    """Means with intervals, by name."""

    title: str
    names: Sequence[str]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Grid:
    """Scores in [0, 1] by row and column; None: there is none."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[float | None]]


def curves(panels: Sequence[Panel], path: Path) -> None:
    """Score by share of the cache kept, panels side by side; the axis is logarithmic."""
    picture, axes = _figure(1, len(panels), (6.4 * len(panels), 5.0), share_y=True)
    for axis, panel in zip(axes, panels, strict=True):
        named = _lines(axis, panel.curves)
        ticks = sorted({x for curve in panel.curves for x in curve.x})
        if panel.full is not None:
            axis.axhline(panel.full, color=_LIMIT, linewidth=1, linestyle=":")
            axis.annotate(
                "full cache", (ticks[-1], panel.full), (0, 4), textcoords="offset points", ha="right", size=8
            )
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{tick:g} %" for tick in ticks])
        axis.minorticks_off()
        axis.set_ylim(-0.02, 1.06)
        axis.set_xlim(ticks[0] * 0.93, ticks[-1] * 1.05)
        axis.set_title(panel.title, loc="left", fontsize=11)
        axis.set_xlabel("share of the cache kept")
        _name_ends(axis, named)
    axes[0].set_ylabel("score, mean over tasks")
    _save(picture, path)


def lengths(lines: Sequence[Curve], path: Path) -> None:
    """Milliseconds by prompt length."""
    quantities([Lines("", "tokens of the prompt", "milliseconds added", lines)], path)


def quantities(panels: Sequence[Lines], path: Path) -> None:
    """Curves side by side, all axes logarithmic."""
    picture, axes = _figure(1, len(panels), (8 if len(panels) == 1 else 6.0 * len(panels), 5.2))
    for axis, panel in zip(axes, panels, strict=True):
        named = _lines(axis, panel.curves)
        ticks = sorted({x for line in panel.curves for x in line.x})
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xlim(ticks[0] * 0.95, ticks[-1] * 1.05)
        axis.set_title(panel.title, loc="left", fontsize=11)
        axis.set_xlabel(panel.x)
        axis.set_ylabel(panel.y)
        _name_ends(axis, named)
    _save(picture, path)


def dots(panels: Sequence[Dots], path: Path) -> None:
    """Means with intervals, one line each."""
    most = max(len(panel.names) for panel in panels)
    picture, axes = _figure(1, len(panels), (3.4 + 3.6 * len(panels), 1.3 + 0.3 * most), share_y=True)
    for axis, panel in zip(axes, panels, strict=True):
        _dots(axis, panel)
    _save(picture, path)


def grids(panels: Sequence[Grid], path: Path) -> None:
    """Scores as a table of shades with their numbers, panels side by side."""
    most = max(len(panel.rows) for panel in panels)
    wide = sum(1.6 + 0.85 * len(panel.columns) for panel in panels)
    picture, axes = _figure(1, len(panels), (wide, 1.6 + 0.27 * most))
    for axis, panel in zip(axes, panels, strict=True):
        cells = [[float("nan") if cell is None else cell for cell in row] for row in panel.cells]
        axis.imshow(cells, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(panel.cells):
            for x, cell in enumerate(row):
                if cell is not None:
                    ink = "white" if cell < 0.55 else "black"
                    axis.text(x, y, f"{cell:.2f}", ha="center", va="center", color=ink, fontsize=8)
        axis.set_xticks(range(len(panel.columns)), panel.columns, rotation=30, ha="right", fontsize=9)
        axis.set_yticks(range(len(panel.rows)), panel.rows, fontsize=9)
        axis.set_title(panel.title, loc="left", fontsize=11)
        axis.tick_params(length=0)
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
    _save(picture, path)


def pair(x: tuple[str, Sequence[float]], ys: Sequence[tuple[str, Sequence[float]]], path: Path) -> None:
    """Two quantities by a third, side by side."""
    picture, axes = _figure(1, len(ys), (4.6 * len(ys), 3.6))
    for axis, (name, y), colour in zip(axes, ys, _MARKED, strict=False):
        axis.plot(x[1], y, marker="o", color=colour)
        axis.set_ylim(0, 1.15 * max(y))
        axis.set_xlabel(x[0])
        axis.set_title(name, loc="left", fontsize=11)
    _save(picture, path)


def flow(lines: Sequence[Curve], theta: float, scores: Dots, path: Path) -> None:
    """Flow ratios by layer beside the scores of merging by them."""
    from matplotlib.ticker import MaxNLocator

    picture, (left, right) = _figure(1, 2, (11, 3.8))
    named = _lines(left, lines)
    left.axhline(theta, color=_unit(SOFT), linestyle="--", linewidth=1)
    left.annotate(f"theta {theta:g}", (left.get_xlim()[0], theta), (4, 4), textcoords="offset points", size=8)
    left.set_ylim(0, 1)
    left.set_xlabel("layer")
    left.set_title("flow ratio", loc="left", fontsize=11)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    _name_ends(left, named)
    _dots(right, scores)
    _save(picture, path)


def outliers(layers: Sequence[dict[str, Any]], visual: Sequence[bool], path: Path) -> None:
    """Deviation of each token, a row a layer; kept tokens stand out, stretches of visual tokens are shaded."""
    picture, axes = _figure(len(layers), 1, (11, 0.7 + 1.35 * len(layers)), share_x=True)
    edges = [n for n in range(1, len(visual)) if visual[n] != visual[n - 1]]
    stretches = list(zip([0, *edges], [*edges, len(visual)], strict=True))
    for axis, layer in zip(axes, layers, strict=True):
        for start, stop in stretches:
            if visual[start]:
                axis.axvspan(start - 0.5, stop - 0.5, color=_unit(LINE), alpha=0.7, linewidth=0)
        kept = set(layer["kept"])
        rest = [n for n in range(len(visual)) if n not in kept]
        for places, colour, name in ((rest, _QUIET, "evicted"), (sorted(kept), _MARKED[1], "kept")):
            axis.vlines(places, 0, [layer["deviation"][n] for n in places], color=colour, linewidth=1, label=name)
        axis.set_title(f"layer {layer['layer']}", loc="left", fontsize=9)
        axis.set_ylim(0)
    axes[0].legend(frameon=False, ncols=2, fontsize=8, loc="upper right", bbox_to_anchor=(1, 1.35))
    axes[-1].set_xlabel("token of the prompt; shaded: visual")
    _save(picture, path)


# -------------------------------------------------------------------- parts


def _lines(axis: Any, lines: Sequence[Curve]) -> list[tuple[Curve, str]]:
    """Marked ones in colour on top, the others quiet behind them; returns each with its colour."""
    ends = []
    for line in (line for line in lines if not line.marked and not line.limit):
        axis.plot(line.x, line.y, color=_QUIET, linewidth=0.9, zorder=2)
        ends.append((line, _QUIET))
    for line in (line for line in lines if line.limit):
        axis.plot(line.x, line.y, color=_LIMIT, linewidth=1.6, linestyle="--", zorder=4)
        ends.append((line, _LIMIT))
    marked = [line for line in lines if line.marked]
    for line, colour, marker in zip(marked, _MARKED, _MARKERS, strict=False):
        axis.plot(line.x, line.y, color=colour, marker=marker, markersize=5, linewidth=2, zorder=5)
        if line.low:
            axis.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0, zorder=3)
        ends.append((line, colour))
    return ends


def _name_ends(axis: Any, lines: Sequence[tuple[Curve, str]]) -> None:
    """Each curve's name at its right end, moved apart where they would lie on each other; limits are set before."""
    to_axis = axis.transData + axis.transAxes.inverted()
    gap = 1.2 * _NAME_SIZE / (axis.get_window_extent().height / axis.figure.dpi * 72)

    def height(line: Curve) -> float:
        x, y = max(zip(line.x, line.y, strict=True))
        return float(to_axis.transform((float(x), float(y)))[1])

    ends = sorted((height(line), line.name, colour) for line, colour in lines)
    places = _apart([place for place, _, _ in ends], gap)
    for (_, name, colour), place in zip(ends, places, strict=True):
        ink = _unit(SOFT) if colour == _QUIET else colour
        where = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
        axis.annotate(name, (1, place), (5, 0), color=ink, size=_NAME_SIZE, va="center", **where)


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """Rising places, moved as little as leaves `gap` between neighbours, the last not above 1 if there is room."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    roof = max(1.0, len(moved) * gap)
    for n in reversed(range(len(moved))):
        moved[n] = roof = min(moved[n], roof)
        roof -= gap
    return moved


def _dots(axis: Any, panel: Dots) -> None:
    places = range(len(panel.names))
    low = [y - a for y, a in zip(panel.y, panel.low, strict=True)]
    high = [b - y for y, b in zip(panel.y, panel.high, strict=True)]
    axis.errorbar(panel.y, places, xerr=[low, high], fmt="o", color=_MARKED[0], ecolor=_QUIET, markersize=5)
    axis.set_yticks(places, panel.names, fontsize=9)
    axis.set_ylim(len(panel.names) - 0.5, -0.5)
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel("score, mean over tasks")
    axis.set_title(panel.title, loc="left", fontsize=11)


def _figure(
    rows: int, columns: int, size: tuple[float, float], *, share_x: bool = False, share_y: bool = False
) -> Any:
    from matplotlib.figure import Figure

    picture = Figure(figsize=size, layout="constrained", facecolor=_unit(GROUND))
    axes = picture.subplots(rows, columns, squeeze=False, sharex=share_x, sharey=share_y).ravel()
    for axis in axes:
        axis.set_facecolor(_unit(GROUND))
        axis.grid(color=_unit(LINE), zorder=0)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(_unit(SOFT))
        axis.tick_params(colors=_unit(INK), labelsize=9)
    return picture, axes


def _save(picture: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=130)


def _unit(colour: Colour) -> tuple[float, float, float]:
    """For matplotlib, 0 to 1."""
    red, green, blue = colour
    return red / 255, green / 255, blue / 255
