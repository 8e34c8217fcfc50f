"""The flow ratio of each layer, as a picture."""

from pathlib import Path
from typing import Any

from kvweave.report.picture import EVICTED, INK, KEPT, LINE, MERGED, SOFT, Colour

_SERIES = (
    ("literal", KEPT, "o", "literal (Eq. 7)"),
    ("balanced", MERGED, "s", "balanced"),
    ("nosink", EVICTED, "^", "without sinks"),
)


def figure(measures: dict[str, Any], path: Path) -> None:
    """Draw `kvweave flow`'s numbers to a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = measures["layers"]
    picture = Figure(figsize=(8, 4.2), layout="constrained")
    axes = picture.subplots()
    for name, colour, marker, label in _SERIES:
        points = [(layer["layer"], layer[name]) for layer in layers if layer[name] is not None]
        if points:
            x, y = zip(*points, strict=True)
            wide = 2.4 if name == "literal" else 1.4
            axes.plot(x, y, marker=marker, color=_unit(colour), linewidth=wide, label=label, zorder=3)
    theta = measures["theta"]
    axes.axhline(theta, color=_unit(SOFT), linestyle="--", linewidth=1)
    axes.annotate(
        f"theta {theta:g}: above it a layer is cross-modal", (0.01, theta), (0, 4), textcoords="offset points",
        xycoords=("axes fraction", "data"), color=_unit(SOFT), fontsize=9,
    )  # fmt: skip
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("layer")
    axes.set_ylabel("flow ratio")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    prompt = measures["prompt"]
    axes.set_title(
        f"{measures['model']}: {prompt['tokens']} tokens, {prompt['visual']} visual", loc="left", color=_unit(INK)
    )
    axes.grid(axis="y", color=_unit(LINE))
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines[1:]:
        axes.legend(frameon=False, loc="upper right", ncols=3)
    picture.savefig(path, dpi=150)


def _unit(colour: Colour) -> tuple[float, float, float]:
    """For matplotlib, 0 to 1."""
    red, green, blue = colour
    return red / 255, green / 255, blue / 255
