"""A batch of two prompts, the second padded on the left, cut by one method that evicts and by one that merges.

What is decoded from the cut cache is compared with the same model that has everything in its cache and is told what
to see (`benchmarks.oracle`). What a merging method puts into its slots is compared with what `compress_tensors` makes
of the queries, keys and values that the plain model's attention was called with.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kvweave
from benchmarks import zoo
from benchmarks.oracle import Asked, Cut, masked
from kvweave.prompt import visual_token_ids

LENGTH, PADDING, STEPS = 24, 5, 5
PICTURE = slice(8, 14)  # columns of placeholders
TOLERANCE = 1e-4  # of the largest logit, or of the largest number in a slot
METHODS: dict[str, kvweave.Method] = {
    "evicting": kvweave.SnapKV(budget=0.5, window=4),
    "merging": kvweave.FlowMM(budget=0.5, proxies=4),
}


@dataclass
class Outcome:
    """What became of one type under one method.

    Attributes:
        word: "equal", "refused", "nothing" (no layer that could be cut), "failed" (not by kvweave) or "differs".
        reason: why it is not equal, or what was not compared.
        layers: how many were compressed, of how many; kinds: what the others are.
        visual: "yes", "no"; "none named" where the configuration has no placeholders, "not read" where the model does
            not read them without pictures; empty: it takes text alone.
    """

    word: str
    reason: str = ""
    layers: str = ""
    kinds: list[str] = field(default_factory=list)
    visual: str = ""


def prompts(pictures: bool) -> dict[str, Tensor]:
    """Ids and mask of the two prompts, with placeholders of a picture or without."""
    ids = torch.randint(10, zoo.VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    if pictures:
        ids[:, PICTURE] = zoo.IMAGE
    mask = torch.ones_like(ids)
    ids[1, :PADDING], mask[1, :PADDING] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def compared(made: zoo.Model, how: str) -> Outcome:
    """One type, cut by `METHODS[how]`."""
    method = METHODS[how]
    pictures = made.pictures
    try:
        plain = decoded(made.model, prompts(pictures))
    except Exception as error:
        if not pictures:
            return Outcome("failed", f"does not decode the batch by itself: {zoo.one_line(error)}")
        pictures = False
        try:
            plain = decoded(made.model, prompts(pictures))
        except Exception as again:
            return Outcome("failed", f"does not decode the batch by itself: {zoo.one_line(again)}")
    inputs = prompts(pictures)
    try:
        with warnings.catch_warnings(), kvweave.compress(made.model, method) as session:
            warnings.simplefilter("ignore")
            mine = decoded(made.model, inputs)
    except ValueError as error:
        return Outcome("refused", " ".join(str(error).split()))
    layers = session.report.get("layers", [])
    done = [layer for layer in layers if layer["compressed"]]
    kinds = sorted({layer["kind"].replace("_", " ") for layer in layers if not layer["compressed"]})
    outcome = Outcome("equal", layers=f"{len(done)} of {len(layers)}" if layers else "none", kinds=kinds)
    if session.cache is None or not done:
        return Outcome("nothing", layers=outcome.layers, kinds=kinds)
    outcome.visual = _recognised(session.cache, inputs, made, pictures)
    if not torch.equal(mine[:, 0], plain[:, 0]):
        outcome.word, outcome.reason = "differs", "the first token, before anything was cut"
        return outcome
    if torch.equal(mine, plain):
        outcome.word, outcome.reason = "differs", "not from the full cache: the cut was not felt"
        return outcome
    cut = Cut.of(session.cache, LENGTH, merged=how == "merging")
    with masked(made.model, cut):
        expected = decoded(made.model, inputs)
    error = distance(mine, expected)
    if error > TOLERANCE:
        outcome.word, outcome.reason = "differs", f"by {error:.1e} of the largest logit"
    elif how == "merging":
        outcome.reason = _contents(session.cache, cut, method)
        outcome.word = "differs" if outcome.reason.startswith("layer") else "equal"
    return outcome


def decoded(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of greedy decoding: [batch, STEPS, vocabulary]."""
    out = model.generate(
        **inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, return_dict_in_generate=True, output_logits=True
    )
    return torch.stack(out.logits, 1)


def distance(mine: Tensor, theirs: Tensor) -> float:
    """The largest difference, against the largest number if that is above 1."""
    scale = max(1.0, theirs.abs().max().item())
    return (mine.double() - theirs.double()).abs().max().item() / scale


def _recognised(cache: kvweave.CompressedCache, inputs: dict[str, Tensor], made: zoo.Model, pictures: bool) -> str:
    assert cache.prompt is not None
    if not made.pictures:
        return ""
    if not visual_token_ids(made.model.config):
        return "none named"
    if not pictures:
        return "not read"
    expected = (inputs["input_ids"] == zoo.IMAGE) & inputs["attention_mask"].bool()
    return "yes" if torch.equal(cache.prompt.visual[:, :LENGTH], expected) else "no"


def _contents(cache: kvweave.CompressedCache, cut: Cut, method: kvweave.Method) -> str:
    """Empty where every layer's slots are those of the reference; else why not, or why there is none."""
    assert cache.prompt is not None
    visual, valid = cache.prompt.visual[:, :LENGTH], cache.prompt.valid[:, :LENGTH]
    for number in cut.bias:
        layer: Any = cache.layers[number]
        asked = cut.asked.get(number)
        unlike = "its attention is not asked for the prompt at once" if asked is None else _unlike(asked, valid)
        if asked is None or unlike:
            return f"contents not compared: {unlike}"
        own = kvweave.compress_tensors(
            method,
            [asked.query],
            [asked.key],
            [asked.value],
            visual=visual,
            valid=valid,
            scaling=asked.options.get("scaling"),
        )[0]
        count = own.positions.shape[-1]
        if not torch.equal(layer.positions[..., :count], own.positions):
            return f"layer {number}: keeps other tokens than the reference"
        for name in ("keys", "values"):
            error = distance(getattr(layer, name)[:, :, :count], getattr(own, name))
            if error > TOLERANCE:
                return f"layer {number}: {name} are not the reference's, by {error:.1e}"
    return ""


def _unlike(asked: Asked, valid: Tensor) -> str:
    """Why attention is not what `compress_tensors` takes it to be; empty: it is."""
    for name in ("softcap", "s_aux", "position_bias"):
        if asked.options.get(name) is not None:
            return f"its attention has {name}"
    if asked.mask is not None:
        seen = asked.mask if asked.mask.dtype == torch.bool else asked.mask > -1e4
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & valid[:, None, None]
        rows = valid[:, None, :, None]
        if not torch.equal((seen & rows).expand_as(causal & rows), causal & rows):
            return "its prompts are not read causally"
    return ""
