"""Shares of a model's heads by what a cut costs: gradient descent on the replies of the full cache.

The mean shares of kvzip say who would use what; what it costs to go without says the reply. Here a prompt is read
once, and the full cache replies. Every head then keeps its best entries, by the score that weave will go by, and how
many is a number that can be a fraction: around the last place that a head keeps, an entry's logits are given the
logarithm of a weight between one and nothing. So the KL of the reply to the full cache's depends on all heads' counts
and has a gradient, and their sum stays what the budget says. L0 gates (1712.01312) and DuoAttention (2410.10819)
learn which heads keep everything; here each head has a count, and no weight of the model is touched.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvweave.evals.answer.prefill import Prefill
from kvweave.evals.calibration.prompts import Prompt
from kvweave.methods.allocation import Pool
from kvweave.methods.full import Full
from kvweave.methods.weave import Weave
from kvweave.models.chat import encode
from kvweave.ops.select import of_some, ranks_by
from kvweave.seam.entry import compress

REPLY = 64  # tokens of a reply at most
SHORTEST = 4  # of a reply that says anything
HELD_OUT = 5  # one lesson in so many is not learned from
_ALIKE = 0.2  # of the entries, that all heads have alike at the start: nobody begins at nothing
_RATE = 0.08  # of Adam, on logarithms of shares
_BATCH = 2  # lessons a step
_SOFT, _LEAST = 0.06, 0.7  # places over which an entry's weight falls: a share of the count, and at least
_NOISE = 1e-3  # nats, what a reply may differ by and count for little

Shares = list[float]  # of all heads, layer after layer


@dataclass(frozen=True)
class Ordering(Weave):
    """Notes how the heads of every layer rank a prompt's tokens.

    Attributes:
        found: the layers' pools, for each prompt.
    """

    found: list[Sequence[Pool]] = field(default_factory=list, compare=False)

    def allocate(self, weights: list[Any], budget: int, length: int) -> list[Any]:
        self.found.append(weights)
        return super().allocate(weights, budget, length)


@dataclass(frozen=True)
class Lesson:
    """A prompt that was read, and what the full cache made of it.

    Attributes:
        inputs: of the prompt.
        prefill: with the reply behind it.
        ranks: of each layer that may be cut, int64 [kv_heads, length]: a token's place among those of its head.
        reply: int64 [1, tokens].
        places: position ids of the reply's tokens but the last, as `generate` gave them; None: it gave none.
        said: log-probabilities [tokens - 1, vocabulary] of the full cache.
    """

    inputs: dict[str, Tensor]
    prefill: Prefill
    ranks: list[Tensor]
    reply: Tensor
    places: Tensor | None
    said: Tensor

    @classmethod
    def of(cls, model: Any, inputs: dict[str, Tensor]) -> "Lesson | None":
        """None: the reply is too short to learn from.

        Args:
            inputs: of one prompt, for `generate`.
        """
        inputs = {name: x.to(model.device) for name, x in inputs.items()}
        with torch.no_grad(), _noted_places(model) as places:
            prefill = Prefill.recorded(
                model, lambda **cache: model.generate(**inputs, **cache, do_sample=False, max_new_tokens=REPLY)
            )
        reply = prefill.tokens[:, prefill.start :]
        if reply.shape[1] < SHORTEST:
            return None
        ordering = Ordering(0.5, form="lent", reach=0, redecode=True)  # its heads compete by the scores
        with torch.no_grad(), compress(model, ordering), prefill.replayed(model):
            count = ordering.defer + 1  # by then it has ranked them
            model.generate(**inputs, do_sample=False, min_new_tokens=count, max_new_tokens=count)
        ranks = [_ranks(pool.row(0)) for pool in ordering.found[-1]]
        for layer in prefill.recorded_layers:  # a replay asks for `states` alone: neither queries nor what was held
            layer.calls.clear()
            layer.block = None
        at = torch.cat(places[1 : reply.shape[1]], -1) if places[1:] else None
        lesson = cls(inputs, prefill, ranks, reply, at, torch.empty(0))
        with torch.no_grad():
            return replace(lesson, said=lesson.read(model))

    @property
    def length(self) -> int:
        return self.prefill.start

    def read(self, model: Any, gates: Sequence[Tensor] | None = None) -> Tensor:
        """Log-probabilities along the reply, [tokens - 1, vocabulary], read at once.

        Args:
            gates: of each layer, [kv_heads, length], added to the logits of the prompt's tokens.
        """
        with compress(model, Full()) as session, self.prefill.replayed(model):
            with torch.no_grad():
                model(**self.inputs, use_cache=True)
            cache = session.cache
            assert cache is not None
            cache.freeze()
            if gates is not None:
                valid = torch.ones(1, self.length, dtype=torch.bool, device=self.reply.device)
                for layer, gate in zip(cache.compressed_layers, gates, strict=True):
                    assert layer.block is not None
                    layer.block = replace(layer.block.as_slots(valid), bias=gate[None])
            at = {} if self.places is None else {"position_ids": self.places}
            logits = model(input_ids=self.reply[:, :-1], past_key_values=cache, **at).logits
        return logits[0].float().log_softmax(-1)

    def cost(self, model: Any, counts: Tensor, *, soft: bool = True) -> Tensor:
        """Mean KL of the reply's next tokens to the full cache's, in nats.

        Args:
            counts: [layers x kv_heads], entries of each head.
            soft: with a gradient; else whole entries stay or go.
        """
        counts, gates = counts.clamp(min=1), []
        for own, rank in zip(counts.split([len(rank) for rank in self.ranks]), self.ranks, strict=True):
            left = own[:, None] - rank - 0.5
            if soft:
                gates.append(F.logsigmoid(left / (_SOFT * own[:, None]).clamp(min=_LEAST)))
            else:
                gates.append(torch.zeros_like(left).masked_fill(left < 0, -1e9))
        there = self.said.float()
        return (there.exp() * (there - self.read(model, gates))).sum(-1).mean()


@contextmanager
def _noted_places(model: nn.Module) -> Iterator[list[Tensor]]:
    """Position ids that the model is given, of each forward pass."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: Any, given: dict[str, Any]) -> None:
        if given.get("position_ids") is not None:
            found.append(given["position_ids"])

    noted = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        noted.remove()


def _ranks(pool: Pool) -> Tensor:
    """Tokens that stay by force come first."""
    forced = pool.forced.expand_as(pool.keys[0])
    return ranks_by([forced.to(pool.keys[0].dtype), *of_some(pool.keys, pool.valid.expand_as(forced))])


def lessons(model: Any, processor: Any, prompts: Sequence[Prompt], tell: Callable[[int, int], None]) -> list[Lesson]:
    """What can be learned from; replies of fewer than `SHORTEST` tokens are left out.

    Raises:
        ValueError: fewer than ten are left.
    """
    found = []
    for number, prompt in enumerate(prompts):
        tell(number, len(prompts))
        found.append(Lesson.of(model, dict(encode(processor, prompt.messages))))
    tell(len(prompts), len(prompts))
    kept = [lesson for lesson in found if lesson is not None]
    if len(kept) < 2 * HELD_OUT:
        raise ValueError(
            f"{len(kept)} of {len(prompts)} replies have {SHORTEST} tokens or more: allowed to fit to is "
            f"{2 * HELD_OUT}, of more prompts or other ones"
        )
    return kept


def fit(
    model: Any,
    learned: Sequence[Lesson],
    start: Shares,
    budget: float,
    steps: int,
    tell: Callable[[int, int], None],
) -> tuple[Shares, dict[str, float]]:
    """Shares at one budget: the fitted ones, or those at the start where their loss on what is held out is no higher.

    Args:
        start: shares of all heads, layer by layer.
        steps: of Adam; each reads `_BATCH` replies.
    Returns:
        The shares, whose mean is the budget; and "start" and "fitted", the mean KL over held-out lessons in nats.
    """
    aside = learned[::HELD_OUT]
    rest = [lesson for number, lesson in enumerate(learned) if number % HELD_OUT]
    begin = torch.tensor(start, dtype=torch.float32, device=learned[0].reply.device)
    begin = begin * (budget / begin.mean())
    logs = ((1 - _ALIKE) * begin + _ALIKE * budget).log().requires_grad_(True)
    adam = torch.optim.Adam([logs], lr=_RATE, betas=(0.9, 0.99), eps=1e-4)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps, 0.05 * _RATE)
    draws = _draws(rest)
    with _frozen(model):
        for step in range(steps):
            tell(step, steps)
            for lesson in itertools.islice(draws, _BATCH):
                shares = budget * len(begin) * logs.softmax(0)
                descend(model, _loss(lesson.cost(model, shares * lesson.length)))
            adam.step()
            adam.zero_grad()
            slower.step()
    tell(steps, steps)
    with torch.no_grad():
        tables = {"start": begin, "fitted": budget * len(begin) * logs.softmax(0)}
        costs = {
            name: torch.stack([one.cost(model, shares * one.length, soft=False) for one in aside])
            for name, shares in tables.items()
        }
    best = min(tables, key=lambda name: float(_loss(costs[name]).mean()))
    return tables[best].tolist(), {name: float(of.mean()) for name, of in costs.items()}


def _loss(cost: Tensor) -> Tensor:
    """A reply that is lost altogether does not rule all others: its root counts."""
    return (cost + _NOISE).sqrt()


def descend(model: Any, loss: Tensor) -> None:
    """The loss's gradient, or an error that names the model that has none."""
    try:
        loss.backward()
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise ValueError(
            f"{type(model).__name__} writes over what a gradient needs, as linear attention does: shares cannot be "
            "fitted; allowed is their mean, fit=0"
        ) from None


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No weight of the model asks for a gradient."""
    asking = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in asking:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in asking:
            weight.requires_grad_(True)


def _draws(learned: Sequence[Lesson]) -> Iterator[Lesson]:
    """All, in a random order, again and again."""
    order, chance = list(learned), random.Random(0)
    while True:
        chance.shuffle(order)
        yield from order
