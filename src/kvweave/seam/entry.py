"""What users call to compress what a model reads: `kvweave.compress`, `attach` and `detach`."""

from typing import Any

import torch
from torch import Tensor

from kvweave.cut.stream import SINKS, stream_of
from kvweave.methods.base import Method
from kvweave.methods.registry import chosen_method
from kvweave.ops.budget import Budget, kl_target
from kvweave.seam.probes import CHUNK, read_probes
from kvweave.seam.session import Session, attached_to


def compress(
    model: Any,
    method: Method | str | None = None,
    *,
    budget: Budget | None = None,
    visual: Tensor | None = None,
    trace: bool = False,
    probes: Any = None,
    processor: Any = None,
    probe_tokens: int = 32,
    replay_chunk: int = CHUNK,
    every: int | None = None,
    total: int | None = None,
    stream_sinks: int = SINKS,
) -> Session:
    """Compress the KV cache of everything that `model` is given inside the `with` block.

        with kvweave.compress(model, kvweave.FlowMM(budget=0.2)) as session:
            out = model.generate(**inputs, max_new_tokens=64)
        session.report

    Args:
        model: any decoder of transformers, with an image encoder or without; or PEFT's wrapper of one.
        method: what decides which entries stay, or its spelling, such as "flowmm:budget=0.2".
        budget: in place of a method: `Weave(budget=budget)`.
        visual: bool [batch, length], which tokens are visual, where only embeddings are passed; else it is read
            from the inputs.
        trace: keep what became of each token, for pictures.
        probes: for contexts whose question is not known: what the model is asked about a prompt before it is cut;
            what it then looks at stays (SPEC 13.2, 15.5). A list of texts or of token ids; "default": to describe
            the images and repeat the text; "replay": the prompt's text is read again behind it, then images are
            described, but weave and `kvzip:images=true` read the images again, too, where the model tells what its
            decoder is given for them (`report["probes"]["images"]`); "template": the tokens that end a user's turn.
            They take the place of `defer`, which is ignored. A method that reads no attention is none the wiser.
            None: nothing, but kvzip asks "replay".
        processor: the model's, or its tokenizer, where probes are texts. Without it "replay" comes without an
            instruction, and images are not described.
        probe_tokens: most tokens of an answer to a probe.
        replay_chunk: tokens of the prompt that "replay" reads at once.
        every: over endless text or video: bring the cache back to its budget after so many new tokens, inside long
            prompts and while decoding (SPEC 18). Budgets are tokens or bytes; the only probes are "template", which
            are read before each cut.
        total: with `every`, tokens of the whole input, for a budget that is a share of it.
        stream_sinks: with `every`, first tokens of the whole input that stay.
    Raises:
        TypeError: `method` is none, `model` is none.
        ValueError, RuntimeError: on entering, where the model cannot be compressed or already is.
    """
    chosen = chosen_method(method, budget)
    if visual is not None and (visual.dtype != torch.bool or visual.dim() != 2):
        raise ValueError(f"visual must be bool [batch, length], got {visual.dtype} {list(visual.shape)}")
    bounds: dict[str, Any] = {"every": every, "total": total, "stream_sinks": stream_sinks}
    chosen, stream = stream_of(chosen, **bounds, trace=trace)
    if stream is not None and probes is not None and not (isinstance(probes, str) and probes == "template"):
        raise ValueError(f"probes={probes!r} is not allowed with every={every}: allowed is 'template'")
    if probes is not None and kl_target(chosen.budget) is not None:
        raise ValueError(f"budget={chosen.budget!r} is not allowed with probes: allowed is a number")
    probe_set = None if probes is None else read_probes(probes, processor, probe_tokens, replay_chunk)
    return Session(model, chosen, visual=visual, trace=trace, probes=probe_set, processor=processor, bounds=bounds)


def attach(model: Any) -> Session:
    """Let `model` read every `CompressedCache` that it is given, until `kvweave.detach(model)`, or inside `with`.

    cache = kvweave.CompressedCache(model.config, method)
    with kvweave.attach(model):
        out = model.generate(**inputs, past_key_values=cache)
    """
    return Session(model, None).attach()


def detach(model: Any) -> None:
    """End whatever session is attached to `model`; nothing happens where there is none."""
    session = attached_to(model)
    if session is not None:
        session.detach()
