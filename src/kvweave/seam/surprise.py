"""How surprising a prompt's tokens were when they were first read: what a model would guess need not be kept."""

from typing import Any

import torch
from torch import Tensor

_TOKENS = 256  # whose logits are at hand at a time


@torch.no_grad()
def surprise(model: Any, hidden: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
    """Nats of each token given those before it; 0 for a prompt's first: float32 [batch, length].

    Args:
        hidden: [batch, length, width], what the decoder made of the tokens; ids: int64 [batch, length].
        valid: bool, alike, real tokens.
    """
    head = model.get_output_embeddings()
    nats = torch.zeros(ids.shape, dtype=torch.float32, device=hidden.device)
    for start in range(0, ids.shape[1] - 1, _TOKENS):
        stop = min(start + _TOKENS, ids.shape[1] - 1)
        logits = _scaled(head(hidden[:, start:stop]).float(), model.config)
        said = ids[:, start + 1 : stop + 1, None].to(logits.device)
        nats[:, start + 1 : stop + 1] = logits.logsumexp(-1) - logits.gather(-1, said)[..., 0]
    valid = valid.to(nats.device)
    nats[:, 1:] *= valid[:, 1:] & valid[:, :-1]
    return nats


def _scaled(logits: Tensor, config: Any) -> Tensor:
    """Logits as the model's own head scales and caps them."""
    text = config.get_text_config(decoder=True)
    logits = logits * (getattr(text, "logit_scale", None) or 1.0) / (getattr(text, "logits_scaling", None) or 1.0)
    cap = getattr(text, "final_logit_softcapping", None)
    return logits if not cap else cap * torch.tanh(logits / cap)
