"""docs/MODELS.md: what kvweave makes of each of transformers' model types, and that it leaves them as they were.

    python -m benchmarks.models > docs/MODELS.md

Every type that builds tiny runs as it is, with kvweave attached, and with method `full`: a forward pass, one with
`logits_to_keep=5`, and greedy decoding with prompt look-up, by SDPA and eagerly. Then a batch of two, the second
padded on the left, is cut by a method that evicts and by one that merges (`benchmarks.cuts`).
"""

import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor

import kvweave
from benchmarks import cuts, zoo

ATTENTION = ("sdpa", "eager")
STEPS = 6
VERSION = transformers.__version__
_HEAD = """# Models

Written by `python -m benchmarks.models`, with transformers {version}: its {types} types of language models, with
eyes or ears or without (`AutoModelForCausalLM`, `AutoModelForImageTextToText`, `AutoModelForMultimodalLM`), built
tiny with random weights.

**Untouched.** {exact} run exactly as without kvweave, to the bit: with it attached and with method `full`, by SDPA
and eagerly where they take both. {different} differ, {refused} are refused by name, and {unbuildable} could not be
built tiny or do not answer a prompt without pictures.

**Evicting**, `{evicting}`: a batch of two prompts of {lengths}. Equal ({evicted} types): the logits of {steps}
decoded tokens are those of the same model with everything in its cache and all but the kept tokens masked, computed
in float64, to {tolerance:g} of the largest.

**Merging**, `{merging}`: the same batch. Equal ({merged} types): the logits are those of the masked full cache with
the merged entries in place of its own, and these entries are what `kvweave.compress_tensors` makes of the queries,
keys and values that the plain model's attention was called with. Where attention is not plain and causal the
entries are not compared, and the last column says why.

**Visual tokens** are recognised by their placeholders, which the prompts hold (they are read as tokens; no tower
runs), in {seen} types; `kvweave.compress(..., visual=mask)` tells of them elsewhere. Full-attention layers are
compressed, the others left as they are.
"""
NOTES = {"llama4": "transformers 5.24.0 itself cannot run it: its outputs have no `image_outputs`"}


@dataclass
class Finding:
    """What became of one type.

    Attributes:
        kind: the type; outcome: "exact", "refused", "unbuildable" or "different".
        reason: why, where it is not exact.
        decoded: from caches that methods cut, by what these do, where it is exact.
    """

    kind: str
    outcome: str
    reason: str = ""
    decoded: dict[str, cuts.Outcome] = field(default_factory=dict)


def examine(kind: str) -> Finding:
    """Build a type, by each attention that it takes, and compare."""
    ran, reasons = [], []
    first: zoo.Model | None = None
    for attention in ATTENTION:
        try:
            made = zoo.tiny(kind, attention)
        except zoo.UnbuildableError as error:
            reasons.append(str(error))
            continue
        with zoo.within(zoo.SECONDS):
            ran.append(_compared(kind, made))
        first = first or made
        if ran[-1].outcome != "exact":
            return ran[-1]
    if not ran:
        return Finding(kind, "unbuildable", reasons[-1])
    assert first is not None
    for how in cuts.METHODS:
        with zoo.within(zoo.SECONDS):
            ran[0].decoded[how] = cuts.compared(first, how)
    return ran[0]


def _compared(kind: str, made: zoo.Model) -> Finding:
    try:
        plain = _runs(made)
    except Exception as error:
        return Finding(kind, "unbuildable", f"does not decode by itself: {zoo.one_line(error)}")
    sessions: dict[str, Callable[[], AbstractContextManager[kvweave.Session]]] = {
        "attached": lambda: kvweave.attach(made.model),
        "full": lambda: kvweave.compress(made.model, kvweave.Full()),
    }
    for how, session in sessions.items():
        try:
            with session():
                mine = _runs(made)
        except ValueError as error:
            why = " ".join(str(error).split())
            named = type(made.model).__name__ in why or kvweave.CompressedCache.__name__ in why
            return Finding(kind, "refused" if named else "different", f"{'' if named else how + ': '}{why}")
        for name in plain:
            if name not in mine or not torch.equal(mine[name], plain[name]):
                return Finding(kind, "different", f"{how}: {name}")
    return Finding(kind, "exact")


def _runs(made: zoo.Model) -> dict[str, Tensor]:
    """Logits of the ways in which a model is run; of those that it has."""
    model, inputs = made.model, made.inputs
    with torch.no_grad():
        found = {"forward": model(**inputs).logits}
        with suppress(TypeError):
            found["logits_to_keep"] = model(**inputs, logits_to_keep=5).logits
        kept = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True}
        found["generate"] = torch.stack(model.generate(**inputs, **kept).logits, 1)
        with suppress(Exception):  # recurrent states cannot be rolled back, and some caches cannot be cropped
            found["look-up"] = torch.stack(model.generate(**inputs, **kept, prompt_lookup_num_tokens=3).logits, 1)
    return found


def page(findings: Iterable[Finding]) -> str:
    """docs/MODELS.md."""
    found = sorted(findings, key=lambda finding: finding.kind)
    count = {name: sum(f.outcome == name for f in found) for name in ("exact", "different", "refused", "unbuildable")}
    equal = {how: sum(f.decoded[how].word == "equal" for f in found if how in f.decoded) for how in cuts.METHODS}
    seen = sum(f.decoded["evicting"].visual == "yes" for f in found if f.decoded)
    head = _HEAD.format(
        version=VERSION,
        types=len(found),
        **count,
        lengths=f"{cuts.LENGTH} tokens, {cuts.PADDING} of them padding on the left in the second",
        steps=cuts.STEPS,
        tolerance=cuts.TOLERANCE,
        evicting=cuts.METHODS["evicting"].spelling(),
        evicted=equal["evicting"],
        merging=cuts.METHODS["merging"].spelling(),
        merged=equal["merging"],
        seen=seen,
    )
    lines = [
        head,
        "| type | untouched | compressed layers | evicting | merging | visual tokens | why; the other layers |",
        "|---|---|---|---|---|---|---|",
    ]
    for f in found:
        evicting, merging = (f.decoded.get(how) for how in cuts.METHODS)
        if evicting is None or merging is None:
            lines.append(f"| {f.kind} | {f.outcome} | | | | | {_cell(f.reason, f.kind)} |")
            continue
        why = [
            ", ".join(evicting.kinds),
            evicting.reason,
            merging.reason if merging.reason != evicting.reason else "",
        ]
        cells = [f.kind, f.outcome, evicting.layers, evicting.word, merging.word, evicting.visual]
        lines.append("| " + " | ".join(cells) + f" | {_cell('; '.join(filter(None, why)), f.kind)} |")
    return "\n".join(lines)


def _cell(text: str, kind: str) -> str:
    """What fits into a table: an error without what it allows."""
    note = f"; {NOTES[kind]}" if kind in NOTES else ""
    return text.replace("|", "/").partition("; allowed")[0] + note


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    findings = []
    for kind in sys.argv[1:] or zoo.TYPES:
        try:
            findings.append(examine(kind))
        except Exception as error:
            findings.append(Finding(kind, "different", zoo.one_line(error)))
        words = ", ".join(f"{how} {cut.word}" for how, cut in findings[-1].decoded.items())
        print(f"{kind}: {findings[-1].outcome} {findings[-1].reason} {words}", file=sys.stderr, flush=True)
    print(page(findings))


if __name__ == "__main__":
    main()
