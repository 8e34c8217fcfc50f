"""How close a compressed cache stays to the full one, along the answer that the full one gave."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

TOKENS = 64  # of an answer that are compared
CHOICES = 1024  # likeliest next tokens whose probabilities are kept; all others count as one


@dataclass(frozen=True)
class Reference:
    """What the full cache said to one sample, and how sure it was.

    Attributes:
        tokens: its answer, the end included.
        first: the first token of the answer that comes from the cache; in `seen` the prompt's own forward pass
            gives the one before it.
        ids: int32 [compared, choices], the likeliest tokens at each place from `first` on, best first.
        log_probs: float32, theirs.
    """

    tokens: list[int]
    first: int
    ids: Tensor
    log_probs: Tensor

    @classmethod
    def of(cls, tokens: list[int], first: int, logits: Tensor) -> "Reference":
        """Args: logits: [compared, vocabulary] at each place from `first` on."""
        log_probs, ids = logits.float().log_softmax(-1).topk(min(CHOICES, logits.shape[-1]), -1)
        return cls(tokens, first, ids.int().cpu(), log_probs.cpu())

    def save(self, path: Path) -> None:
        """Write it to a file that is whole or not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}")
        tokens, first = torch.tensor(self.tokens), torch.tensor(self.first)
        save_file({"tokens": tokens, "first": first, "ids": self.ids, "log_probs": self.log_probs}, part)
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Reference | None":
        """None: there is none, as where the full cache's answer failed.

        Raises:
            ValueError: the file is damaged.
        """
        if not path.is_file():
            return None
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}; delete the whole folder, and it is made again") from None
        return cls(tensors["tokens"].tolist(), int(tensors["first"]), tensors["ids"], tensors["log_probs"])


@dataclass(frozen=True)
class Fidelity:
    """Of one sample, means over the answer's tokens that come from the cache, its end included.

    Attributes:
        kl: KL(full || compressed) of the next token in nats, tokens beyond the full cache's `CHOICES` likeliest
            taken as one: exact for smaller vocabularies, else a lower bound.
        top1: share of tokens at which both find the same one likeliest.
        same: the answer, decoded freely, is the full cache's to the token.
        tokens: how many were compared.
    """

    kl: float
    top1: float
    same: bool
    tokens: int


def compared(reference: Reference, tokens: list[int], logits: Tensor) -> Fidelity | None:
    """Hold a compressed cache against the full one; None where no token of the answer came from the cache.

    Args:
        tokens: the compressed cache's own answer.
        logits: [compared, vocabulary], what it expects next along the reference's answer.
    """
    count = len(reference.ids)
    if not count:
        return None
    mine = logits.float().log_softmax(-1).cpu()
    theirs, ids = reference.log_probs, reference.ids.long()
    log_probs = mine.gather(-1, ids)
    kl = torch.where(theirs > -torch.inf, theirs.exp() * (theirs - log_probs), 0.0).sum(-1)
    if ids.shape[-1] < mine.shape[-1]:
        rest, own_rest = (_rest(x) for x in (theirs, log_probs))
        kl = kl + rest * (rest.log() - own_rest.log())
    top1 = (mine.argmax(-1) == ids[:, 0]).float().mean()
    return Fidelity(max(0.0, float(kl.mean())), float(top1), tokens == reference.tokens, count)


def _rest(log_probs: Tensor) -> Tensor:
    """Probability of all that is not listed: [compared]."""
    return (1 - log_probs.double().exp().sum(-1)).clamp(min=1e-9)
