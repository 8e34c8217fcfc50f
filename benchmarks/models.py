"""docs/MODELS.md: which of transformers' models kvweave leaves untouched to the bit, and what it makes of each.

    python -m benchmarks.models > docs/MODELS.md

Every type that builds tiny runs as it is, with kvweave attached, and with method `full`: a forward pass, one with
`logits_to_keep=5`, and greedy decoding with prompt look-up, by SDPA and eagerly. Then `snapkv` says which layers it
would compress.
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
from benchmarks import zoo

ATTENTION = ("sdpa", "eager")
STEPS = 6
VERSION = transformers.__version__
NOTES = {"llama4": "transformers 5.24.0 itself cannot run it: its outputs have no `image_outputs`"}


@dataclass
class Finding:
    """What became of one type.

    Attributes:
        kind: the type; outcome: "exact", "refused", "unbuildable" or "different".
        reason: why, where it is not exact.
        layers: how many layers `snapkv` compresses, of how many; empty where none ran.
        kinds: what the others are.
    """

    kind: str
    outcome: str
    reason: str = ""
    layers: str = ""
    kinds: list[str] = field(default_factory=list)


def examine(kind: str) -> Finding:
    """Build a type, by each attention that it takes, and compare."""
    ran, reasons = [], []
    for attention in ATTENTION:
        try:
            made = zoo.tiny(kind, attention)
        except zoo.UnbuildableError as error:
            reasons.append(str(error))
            continue
        with zoo.within(zoo.SECONDS):
            ran.append(_compared(kind, made))
        if ran[-1].outcome != "exact":
            return ran[-1]
    if not ran:
        return Finding(kind, "unbuildable", reasons[-1])
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
    return _compressed(kind, made)


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


def _compressed(kind: str, made: zoo.Model) -> Finding:
    with kvweave.compress(made.model, kvweave.SnapKV(budget=0.5, window=4)) as session:
        made.model.generate(**made.inputs, max_new_tokens=2)
    layers = session.report.get("layers", [])
    done = [layer for layer in layers if layer["compressed"]]
    kinds = sorted({layer["kind"].replace("_", " ") for layer in layers if not layer["compressed"]})
    return Finding(kind, "exact", layers=f"{len(done)} of {len(layers)}" if layers else "none", kinds=kinds)


def page(findings: Iterable[Finding]) -> str:
    """docs/MODELS.md."""
    found = sorted(findings, key=lambda finding: finding.kind)
    count = {name: sum(f.outcome == name for f in found) for name in ("exact", "different", "refused", "unbuildable")}
    lines = [
        "# Models",
        "",
        f"Written by `python -m benchmarks.models`, with transformers {VERSION}. Of the {len(found)} "
        f"types of `AutoModelForCausalLM` and `AutoModelForImageTextToText`, {count['exact']} run tiny, with random "
        "weights, exactly as without kvweave, to the bit: with it attached and with method `full`, by SDPA and "
        f"eagerly where they take both. {count['different']} differ, {count['refused']} are refused by name, and "
        f"{count['unbuildable']} could not be built tiny or do not answer a prompt of text alone. Full-attention "
        "layers are compressed, the others left as they are.",
        "",
        "| type | outcome | compressed layers | others are |",
        "|---|---|---|---|",
    ]
    for f in found:
        why = f.reason or ", ".join(f.kinds)
        note = f"; {NOTES[f.kind]}" if f.kind in NOTES else ""
        lines.append(f"| {f.kind} | {f.outcome} | {f.layers} | {why.replace('|', '/')}{note} |")
    return "\n".join(lines)


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
        print(f"{kind}: {findings[-1].outcome} {findings[-1].reason}", file=sys.stderr, flush=True)
    print(page(findings))


if __name__ == "__main__":
    main()
