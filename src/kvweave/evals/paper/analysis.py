"""What happens inside: cross-modal flow by layer, and the outliers of keys and values."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvweave import models
from kvweave.evals.answer.answering import Batch, prefill, prepare
from kvweave.evals.answer.prefill import Prefill, RecordedLayer
from kvweave.evals.paper import scores
from kvweave.evals.paper.recipe import Recipe
from kvweave.evals.paper.sheet import Sheet, Table
from kvweave.evals.paper.subject import Subject
from kvweave.evals.tasks.tasks import Task
from kvweave.methods import Method
from kvweave.methods.flashcache import FlashCache
from kvweave.methods.flowmm import FlowMM
from kvweave.ops.budget import LEAST
from kvweave.prompt import visual_mask
from kvweave.report import charts
from kvweave.seam.entry import compress
from kvweave.view import LayerView

_PROMPTS = 8  # of each task
_KEPT = 0.2  # share that the picture of outliers marks
_DRAWN = 6  # layers in it, at most
_RATIOS = {"flow": "literal", "flow_balanced": "balanced", "flow_nosink": "without sinks"}


def flow(subject: Subject, tasks: Sequence[Task], methods: Sequence[str]) -> dict[str, Any]:
    """FlowMM's three flow ratios of each layer, means over prompts."""
    model, processor = subject.load()
    if not models.reads_images(processor):
        raise ValueError(
            f"model={subject.model!r} reads text only, and flow crosses between words and images: allowed for "
            "flowmm:fig3 is a model that reads images"
        )
    examples = [example for task in tasks for example in task.examples(0)[:_PROMPTS]]
    sums: dict[int, dict[str, float]] = {}
    for example in examples:
        batch = prepare(processor, [example], "seen")
        report = _cut(model, batch, prefill(model, batch, 1), FlowMM(budget=LEAST, flow_rows=0))  # every layer is cut
        for layer in report["layers"]:
            if layer["compressed"]:
                total = sums.setdefault(layer["layer"], dict.fromkeys(_RATIOS, 0.0))
                for name in _RATIOS:
                    total[name] += (layer.get(name) or 0.0) / len(examples)
    return {"layers": [{"layer": n, **ratios} for n, ratios in sums.items()], "prompts": len(examples)}


def _cut(model: Any, batch: Batch, shared: Prefill, method: Method) -> dict[str, Any]:
    """The session's report of a prefill that `method` cuts."""
    inputs = {name: x.to(model.device) for name, x in batch.inputs.items() if not name.startswith("pixel_values")}
    with torch.inference_mode(), compress(model, method) as session, shared.replayed(model):
        model(**inputs, logits_to_keep=1, use_cache=True)
    return session.report


def flow_sheet(recipe: Recipe, subject: Subject, measured: dict[str, Any], summary: dict[str, Any]) -> Sheet:
    """Flow by layer, and the scores of merging with it, against it, and without it."""
    layers = measured["layers"]
    theta = FlowMM().theta
    table = Table(
        f"Flow ratio by layer, mean over {measured['prompts']} prompts",
        ["layer", *_RATIOS.values(), f"at theta {theta:g}"],
        [
            [
                str(row["layer"]),
                *(f"{row[name]:.3f}" for name in _RATIOS),
                "cross" if row["flow"] > theta else "intra",
            ]
            for row in layers
        ],
    )
    variants = scores.by_variant(recipe, subject, summary)
    lines = [
        charts.Curve(label, [row["layer"] for row in layers], [row[name] for row in layers], marked=True)
        for name, label in _RATIOS.items()
    ]
    means = {row["method"]: row for row in summary["means"] if row["method"] in recipe.shown()}
    dots = [(recipe.shown()[m], row) for m, row in means.items() if row["score"] is not None]
    draw = partial(
        charts.flow,
        lines,
        theta,
        charts.Dots(
            "score, question seen",
            [name for name, _ in dots],
            [row["score"] for _, row in dots],
            [row["low"] for _, row in dots],
            [row["high"] for _, row in dots],
        ),
    )
    data = {**variants.data, **measured}
    alike = len({row["flow"] > theta for row in layers}) == 1
    notes = list(variants.notes)
    if alike:
        what = "cross" if layers[0]["flow"] > theta else "intra"
        notes.insert(
            0, f"At theta {theta:g} every layer is {what}-modal here, so that `aligned` is `{what}` everywhere."
        )
    return Sheet(
        recipe.name, recipe.title, recipe.shows, [table, *variants.tables], notes, data, draw, variants.about
    )


# -------------------------------------------------------------------- outliers


def outliers(subject: Subject, tasks: Sequence[Task], methods: Sequence[str]) -> dict[str, Any]:
    """FlashCache's deviation of each token in each layer of one prompt, and which tokens it keeps."""
    model, processor = subject.load()
    example = tasks[-1].examples(0)[0]
    batch = prepare(processor, [example], "seen")
    shared = prefill(model, batch, 1)
    ids = batch.inputs["input_ids"]
    visual = visual_mask(model.config, ids, batch.inputs)
    visual = torch.zeros_like(ids, dtype=torch.bool) if visual is None else visual
    views = [_view(layer, visual.to(model.device)) for layer in shared.recorded_layers]
    method = FlashCache(budget=_KEPT)
    masks = [method.outliers(view) for view in views]
    length = shared.start
    weights = [float(weight) for _, weight in masks]
    kept = method.allocate(weights, int(_KEPT * length), length)
    picks = set(torch.linspace(0, len(views) - 1, min(_DRAWN, len(views))).round().int().tolist())
    layers = []
    for n, ((deviation, weight), view, count) in enumerate(zip(masks, views, kept, strict=True)):
        keep, each = method.plan(_with_mean(view, int(_KEPT * length)), count).keep[0, 0], deviation[0, 0]
        layer: dict[str, Any] = {
            "layer": n,
            "weight": float(weight),
            "largest": float(each.max() / each.median()),
            "count": len(keep),
            "visual": float(visual[0, keep.cpu()].float().mean()),
        }
        if n in picks:
            layer |= {"deviation": [round(x, 6) for x in each.tolist()], "kept": keep.tolist()}
        layers.append(layer)
    return {"layers": layers, "visual": visual[0].tolist(), "length": length, "question": example.question}


def _view(layer: RecordedLayer, visual: Tensor) -> LayerView:
    """One unpadded prompt's layer."""
    assert layer.states is not None
    keys, values = layer.states
    shape = keys.shape[:3]
    positions = torch.arange(shape[2], device=keys.device).expand(shape)
    ones = torch.ones(shape, device=keys.device)
    rule = layer.calls[0][1]
    return LayerView(keys, values, None, positions, ones, visual[:, None].expand(shape), rule)


def _with_mean(view: LayerView, budget: int) -> LayerView:
    view.mean_budget = budget
    return view


def outlier_sheet(recipe: Recipe, subject: Subject, measured: dict[str, Any]) -> Sheet:
    """How large outliers are, how many are visual, and what each layer keeps."""
    visual = measured["visual"]
    rows = [
        [
            str(layer["layer"]),
            f"{layer['largest']:.0f}x",
            f"{layer['weight']:.2f}",
            str(layer["count"]),
            f"{layer['visual']:.0%}",
        ]
        for layer in measured["layers"]
    ]
    share = sum(visual) / len(visual)
    table = Table(
        f"One prompt of {measured['length']} tokens, {share:.0%} visual; {100 * _KEPT:g} % kept over all layers",
        ["layer", "largest deviation over the median", "energy above the cutoff", "kept", "visual among kept"],
        rows,
    )
    notes = [
        f"Deviation: mean square of keys and values minus their low-pass (gamma {FlashCache().gamma:g}). "
        f"The prompt ends: {measured['question']!r}."
    ]
    draw = partial(charts.outliers, [layer for layer in measured["layers"] if "kept" in layer], visual)
    about = [f"Command: `{subject.command}`", f"Model `{subject.model}`."]
    return Sheet(recipe.name, recipe.title, recipe.shows, [table], notes, measured, draw, about)
