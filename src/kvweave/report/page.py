"""A run as one page of HTML that loads nothing."""

import base64
import html as escaping
import io
import json
import re
from importlib import resources
from typing import TYPE_CHECKING, Any

from kvweave.report.data import Answer, Layer, Run, size, speed_text

if TYPE_CHECKING:
    from PIL.Image import Image

_LONGEST_SIDE = 720  # pixels of an embedded image
_LONG = 80  # characters: longer answers are set as text, not as a headline
_SMALL = 200 * 200  # pixels up to which an image is embedded without loss


def html(run: Run) -> str:
    """The page."""
    template = resources.files("kvweave.report").joinpath("page.html").read_text(encoding="utf-8")
    parts = {
        "title": text(run.question),
        "summary": text(_summary(run)),
        "answers": _answers(run),
        "notes": "".join(f"<p class=note>{text(note)}</p>" for note in run.notes),
        "layers": "".join(_layer_table(answer) for answer in run.answers),
        "measured": text(_measured(run)),
        "command": text(run.command),
        "versions": text(" · ".join(f"{name} {version}" for name, version in run.versions.items())),
        "machine": text(run.machine),
        "data": script_json(_drawing(run)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def text(words: str) -> str:
    return escaping.escape(words)


def script_json(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _summary(run: Run) -> str:
    images = f"{len(run.images)} image{'s' if len(run.images) != 1 else ''}"
    return f"{run.model} · {images} · {len(run.tokens)} prompt tokens, {run.visual} of them visual"


def _measured(run: Run) -> str:
    speed = run.full.speed
    return (
        "The peak is the most of them held at once while the prompt is read and cut: a method that cuts layer by "
        "layer never holds the full cache, one that waits for all layers or for decoded tokens does. "
        "heaviest: how many tokens the heaviest entry of a layer stands for. "
        "tokens/s is 1 / the median time between two tokens, prefill and image encoder apart "
        f"({speed.steps} steps in {speed.repeats} generation{'s' if speed.repeats != 1 else ''} of the full cache). "
        "Cache sizes are the bytes that keys and values of the prompt occupy in the layers that are compressed."
    )


def _answers(run: Run) -> str:
    return "".join(_answer(answer, run) for answer in (run.full, *run.answers))


def _answer(answer: Answer, run: Run) -> str:
    share = answer.cache_bytes / run.full.cache_bytes
    facts = [
        ("KV cache", f"{size(answer.cache_bytes)} <small>({share:.1%})</small>"),
        ("at its peak", size(answer.peak_bytes)),
        ("tokens/s", speed_text(answer.speed)),
        ("prefill", f"{answer.speed.prefill_seconds * 1000:.0f} ms"),
    ]
    if run.long is not None:
        behind = run.long.speeds[(run.full, *run.answers).index(answer)]
        facts.append((f"tokens/s behind {run.long.length:,} tokens", speed_text(behind)))
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return (
        f'<article class="answer{" full" if answer is run.full else ""}">'
        f"<h2>{text(answer.method)}</h2>"
        f'<p class="said{" long" if len(answer.text) > _LONG else ""}">'
        f"{text(answer.text) or '<i>nothing</i>'}{_verdict(answer, run)}</p>"
        f'<div class=meter role=img aria-label="{share:.1%} of the full cache">'
        f'<i style="width:{share:.2%}"></i></div>'
        f"<dl>{listed}</dl></article>"
    )


def _verdict(answer: Answer, run: Run) -> str:
    if run.right is not None:
        right = answer.text == run.right
        return f"<span class={'good' if right else 'bad'}>{'✓ right' if right else '✗ wrong'}</span>"
    if answer is run.full:
        return ""
    same = answer.text == run.full.text
    return f"<span class={'good' if same else 'bad'}>{'as with the full cache' if same else 'differs'}</span>"


def _layer_table(answer: Answer) -> str:
    head = "".join(f"<th>{name}" for name in answer.columns)
    rows = "".join(_layer_row(place, layer, answer.columns) for place, layer in answer.runs)
    return (
        f"<h3>{text(answer.method)}</h3><div class=scroll><table><thead><tr><th>layer<th class=wide>tokens{head}</tr>"
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def _layer_row(place: str, layer: Layer, columns: list[str]) -> str:
    if not layer.compressed:
        return f"<tr><td>{place}<td colspan={len(columns) + 1} class=left>not compressed: {text(layer.kind)}</tr>"
    bar = "".join(
        f'<i class={name} style="width:{count / layer.length:.2%}"></i>'
        for name, count in (("kept", layer.kept), ("merged", layer.merged), ("evicted", layer.evicted))
        if count
    )
    cells = "".join(f"<td>{text(layer.cells[name]) or '–'}" for name in columns)
    return f"<tr><td>{place}<td class=wide><div class=bar>{bar}</div>{cells}</tr>"


def _drawing(run: Run) -> dict[str, Any]:
    """What the page's script draws."""
    return {
        "tokens": [None if token.visual else [token.text, int(token.special)] for token in run.tokens],
        "images": [{"src": data_uri(image), "size": image.size} for image in run.images],
        "grids": [vars(grid) for grid in run.grids],
        "methods": [
            {
                "name": answer.method,
                "text": answer.text,
                "layers": [{"index": layer.index, "fate": layer.fate} for layer in answer.layers if layer.compressed],
            }
            for answer in run.answers
        ],
    }


def data_uri(image: "Image") -> str:
    """The image itself, small enough for a page."""
    shown = image.convert("RGB")
    shown.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    kind = "PNG" if image.width * image.height <= _SMALL else "JPEG"
    buffer = io.BytesIO()
    shown.save(buffer, kind, quality=85)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
