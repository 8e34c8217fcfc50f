"""Drawn conversations, step by step against the oracle: models, methods, padding, pieces, turns, rows that move.

A few cases each time, always the same; a failing one is found again by its number. `KVWEAVE_CASES=1000 pytest
tests/seam/test_differential.py` goes on to a thousand of each kind.
"""

import os
from dataclasses import dataclass, replace
from functools import cache
from random import Random

import pytest
import torch
from methods_for_tests import Biased, Heavier
from tiny import (
    IMAGE,
    Cut,
    assert_close,
    cut_of,
    decode,
    masked,
    picture_inputs,
    text_inputs,
    text_model,
    vision_model,
    words,
)

import kvweave

CASES = int(os.environ.get("KVWEAVE_CASES", "0"))
SLIDES = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
KINDS = {
    "llama": {},
    "one kv head": {"kind": "llama", "num_key_value_heads": 1},
    "three layers": {"kind": "llama", "num_hidden_layers": 3, "num_key_value_heads": 4},
    "llama, eager": {"kind": "llama", "attention": "eager"},
    "qwen3": {},
    "smollm3": {"no_rope_layers": [1, 0], "layer_types": ["full_attention"] * 2},
    "llava": {},
    "gemma2": {"attention": "eager"} | SLIDES,
    "gpt_oss": {"attention": "eager"} | SLIDES,
    "cohere2": SLIDES,
    "qwen2_5_vl": {},
    "qwen2_vl": {},
}
WHOLE = [kind for kind, special in KINDS.items() if "sliding_window" not in special]  # can be cropped at any time
VISION = ("qwen2_5_vl", "qwen2_vl")


@cache
def twins(kind):
    """Two models with the same weights: one to attach kvweave to, one that never sees it."""
    special = dict(KINDS[kind])
    if kind in VISION:
        return vision_model(kind=kind), vision_model(kind=kind)
    name = special.pop("kind", kind)
    return text_model(name, **special), text_model(name, **special)


NARROW = {"proxies": 4, "theta": 0.3}
PLAIN = [
    ("streaming_llm", {"sinks": 2}),
    ("h2o", {}),
    ("snapkv", {"window": 4}),
    ("random", {}),
    ("adakv", {"window": 4}),
    ("pyramidkv", {"window": 4, "beta": 4}),
    ("vlcache", {"p": 0.3}),
    ("mixkv", {"window": 4}),
    ("madakv", {"proxies": 4}),
    ("peak", {"recent": 4}),
    ("cam", {"window": 3}),
    ("flowmm", NARROW),
    ("flowmm", NARROW | {"rope_aware": True}),
    ("flowmm", NARROW | {"merge_keys": False, "flow": "misaligned"}),
    ("meda", {}),
    ("d2o", {"var_norm": "none"}),
    ("kvmerger", {"recent": 4}),
    ("flashcache", {"recent": 4}),
]
BIASED = [
    ("flowmm", NARROW | {"mass_bias": True, "flow": "cross"}),
    ("lookm", {"merge_rule": "average", "mass_bias": True}),
    ("chelsea", {"recent": 4, "chunk": 4, "mass_bias": True}),
    ("weave", {"proxies": 4, "recent": 4}),
    ("weave", {"proxies": 4, "recent": 4, "rope_aware": True}),
]


def method_of(draw, kind, *, defers=True):
    """A method of any sort: eviction, merging with and without mass, layers and heads that keep different counts."""
    if draw.random() < 0.15:
        return draw.choice([Heavier(budget=0.4), Biased(budget=3)])
    name, options = draw.choice(draw.choice([PLAIN, PLAIN, BIASED]))
    if (kind, name) == ("gpt_oss", "adakv"):
        name = "snapkv"
    waits = defers and name != "pyramidkv" and draw.random() < 0.4
    budget = draw.choice([0.1, 0.3, 0.5, 0.8, draw.randint(1, 12)])
    return kvweave.get_method(name, budget=budget, defer=draw.randint(1, 3) if waits else 0, **options)


@dataclass(frozen=True)
class Turn:
    """A prompt that comes in `pieces`, tokens decoded after it, and what then happens to the rows."""

    pieces: tuple[int, ...]
    decoded: int
    rows: tuple[int, ...] | None = None  # the rows that go on, in that order
    cropped: int = 0  # tokens that are taken back, of the prompt too, before others are decoded
    gaps: bool = False  # rows begin with padding, each with its own


@dataclass(frozen=True)
class Conversation:
    kind: str
    method: kvweave.Method
    lengths: tuple[int, ...]
    pictures: int
    turns: tuple[Turn, ...]
    held: bool  # prompts are cut when all of a turn has been decoded
    questions: tuple[int, ...]  # asked of the frozen cache, each forgotten before the next


def conversation(number):
    draw = Random(number)
    kind = draw.choice(sorted(KINDS))
    pictures = draw.randint(0, 2) if kind in VISION else 0
    lengths = tuple(draw.randint(max(4, 2 + 7 * pictures), 22) for _ in range(draw.randint(1, 3)))
    batch, turns = len(lengths), []
    for turn in range(draw.randint(1, 3)):
        new = draw.randint(1, 9) if turn else max(lengths)
        pieces = (new,)
        if new > 1 and not (pictures and not turn) and draw.random() < 0.5:
            first = draw.randint(1, new - 1)
            pieces = first, new - first
        decoded, rows = draw.randint(0, 5), None
        if draw.random() < 0.4:
            rows = tuple(draw.randrange(batch) for _ in range(draw.randint(1, 4)))
            if draw.random() < 0.5:
                rows = tuple(draw.sample(range(batch), batch))
            batch = len(rows)
        cropped = draw.choice([0, draw.randint(0, decoded), draw.randint(0, decoded + (0 if pictures else new - 1))])
        turns.append(Turn(pieces, decoded, rows, cropped if kind in WHOLE else 0, draw.random() < 0.4))
    questions = tuple(draw.randint(2, 6) for _ in range(draw.randint(0, 2))) if kind in WHOLE else ()
    held, method = draw.random() < 0.15, method_of(draw, kind)
    if isinstance(method, Biased):  # it says no bias of rows that fit its budget: none becomes so short
        turns = [replace(turn, cropped=min(turn.cropped, turn.decoded)) for turn in turns]
    return Conversation(kind, method, lengths, pictures, tuple(turns), held, questions)


class Talk:
    """A conversation with a compressed cache, and all that the oracle needs to hold the same one.

    Attributes:
        ids, mask: [batch, columns] of everything said; positions: [..., batch, columns].
        logits: [batch, columns, vocabulary], what the model with the compressed cache answered.
        cuts: those made so far.
        checks: states to be held against the oracle.
    """

    def __init__(self, case):
        self.case, self.method = case, case.method
        self.model, self.plain = twins(case.kind)
        self.cache = kvweave.CompressedCache(self.model.config, case.method, hold=case.held)
        self.end = self.seed = 0
        self.cuts, self.checks, self.waits = [], [], False
        if case.kind in VISION:
            inputs = picture_inputs(case.lengths, pictures=case.pictures)
        else:
            inputs = text_inputs(case.lengths, images=((1, 3),) if case.kind == "llava" else ())
        self.ids, self.mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        self.prompt, self.pictures = self.ids.shape[1], inputs
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        if case.kind in VISION:
            self.positions = self.positions.expand(3, -1, -1)
        if case.pictures:
            kinds = inputs["mm_token_type_ids"]
            self.positions, _ = self.plain.model.get_rope_index(
                self.ids, kinds, image_grid_thw=inputs["image_grid_thw"], attention_mask=self.mask
            )
        self.logits = torch.empty(len(self.ids), 0, 96)

    def says(self, count, gaps=False):
        """Further columns of all rows."""
        self.seed += 1
        new = words(len(self.ids), count, seed=50 + self.seed)
        real = torch.ones_like(new)
        if gaps:
            for row in range(len(new)):
                real[row, : (self.seed + 2 * row) % count] = 0
        self.ids = torch.cat([self.ids, new * real], 1)
        self.mask = torch.cat([self.mask, real], 1)
        last = self.positions.amax(-1, keepdim=True)
        last = last.amax(0, keepdim=True).expand_as(last) if last.dim() == 3 else last
        self.positions = torch.cat([self.positions, last + real.cumsum(1)], -1)

    def feed(self, count):
        """One forward pass of the next `count` columns."""
        start = self.logits.shape[1]
        part = slice(start, start + count)
        step = {"position_ids": self.positions[..., part], "attention_mask": self.mask[:, : part.stop]}
        if self.case.pictures and not start:
            step |= self.pictures
        out = self.model(input_ids=self.ids[:, part], past_key_values=self.cache, use_cache=True, **step)
        self.logits = torch.cat([self.logits, out.logits], 1)

    def read(self, pieces):
        """A prompt."""
        total = self.logits.shape[1] + sum(pieces)
        if len(pieces) > 1 or sum(pieces) == 1:
            self.cache.declare_prompt(total)
        for count in pieces:
            self.feed(count)
        self.end, self.waits = total, bool(self.method.defer) or self.case.held
        if not self.waits:
            self.cut()

    def decode(self, count):
        """Tokens one by one."""
        for _ in range(count):
            self.says(1)
            self.feed(1)
            if self.waits and not self.case.held and self.logits.shape[1] - self.end >= self.method.defer:
                self.cut()

    def cut(self):
        """Note the cut that must have been made by now."""
        self.waits = False
        start = self.logits.shape[1]
        cut = cut_of(self.cache, start, merged=True, mass_bias=self.method.biases_logits)
        if isinstance(self.method, Biased):
            for seen in cut.bias.values():  # the prompt's entries, not of what was decoded behind it
                prompt = seen[..., : self.end]
                prompt += Biased.bias(torch.arange(self.end).expand(prompt.shape)).double()
        self.cuts.append(cut)

    def check(self):
        """Hold all that was said so far against the oracle, later."""
        cuts = [Cut(cut.start, cut.bias, cut.contents) for cut in self.cuts]
        self.checks.append((self.ids, self.mask, self.positions, self.pictures, self.logits, cuts))

    def move(self, rows):
        """Other rows, in another order."""
        rows = torch.tensor(rows)
        if sorted(rows.tolist()) == list(range(len(self.ids))):
            self.cache.reorder_cache(rows)
        else:
            self.cache.batch_select_indices(rows)
        if self.case.pictures:
            kinds = self.pictures["mm_token_type_ids"][rows]
            batch = len(self.ids)
            shown = {
                name: self.pictures[name].unflatten(0, (batch, -1))[rows].flatten(0, 1)
                for name in ("pixel_values", "image_grid_thw")
            }
            self.pictures = shown | {"mm_token_type_ids": kinds}
        self.ids, self.mask, self.logits = self.ids[rows], self.mask[rows], self.logits[rows]
        self.positions = self.positions[..., rows, :]
        for cut in self.cuts:
            cut.bias = {n: bias[rows] for n, bias in cut.bias.items()}
            cut.contents = {n: (keys[rows], values[rows]) for n, (keys, values) in cut.contents.items()}

    def take_back(self, count):
        """Forget the last tokens."""
        self.check()
        self.cache.crop(-count)
        left = self.logits.shape[1] - count
        self.ids, self.mask, self.logits = self.ids[:, :left], self.mask[:, :left], self.logits[:, :left]
        self.positions = self.positions[..., :left]
        self.waits = self.waits and left >= self.end
        if self.cuts and self.cuts[-1].start > left:  # what it left of the columns before
            bias = {n: x[..., :left] for n, x in self.cuts[-1].bias.items()}
            contents = {n: tuple(x[:, :, :left] for x in pair) for n, pair in self.cuts[-1].contents.items()}
            self.cuts = [*(cut for cut in self.cuts if cut.start < left), Cut(left, bias, contents)]

    def verify(self):
        """Run the checks, with a model that kvweave was never attached to."""
        for ids, mask, positions, pictures, logits, cuts in self.checks:
            given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
            if self.case.pictures:
                kinds = torch.zeros_like(ids)
                kinds[:, : self.prompt] = pictures["mm_token_type_ids"]
                given |= pictures | {"mm_token_type_ids": kinds}
            with torch.no_grad(), masked(self.plain, *cuts):
                expected = self.plain(**given).logits
            real = mask.bool()
            assert_close(logits[real], expected[real])


@pytest.mark.parametrize("number", range(CASES or 28))
def test_conversations_equal_the_masked_full_cache(number):
    case = conversation(number)
    talk = Talk(case)
    handle = kvweave.attach(talk.model)
    try:
        with torch.no_grad():
            for number, turn in enumerate(case.turns):
                if number:
                    talk.says(sum(turn.pieces), turn.gaps)
                talk.read(turn.pieces)
                talk.decode(turn.decoded)
                if case.held:
                    talk.cache.compress()
                    talk.cut()
                if turn.cropped:
                    talk.take_back(turn.cropped)
                    talk.decode(2)
                if turn.rows is not None:
                    talk.move(turn.rows)
            if case.questions:
                talk.cache.freeze()
                if talk.waits:
                    talk.cut()
                for count in case.questions:
                    talk.says(count, gaps=True)
                    talk.feed(count)
                    talk.decode(2)
                    talk.take_back(count + 2)
            talk.check()
    finally:
        handle.detach()
    assert talk.cache.get_seq_length() == talk.logits.shape[1]
    talk.verify()


@dataclass(frozen=True)
class Decoding:
    kind: str
    method: kvweave.Method
    lengths: tuple[int, ...]
    options: dict[str, int | bool | float]
    steps: int


def decoding(number):
    draw = Random(number)
    kind = draw.choice(sorted(KINDS))
    lengths = tuple(draw.randint(9, 24) for _ in range(draw.randint(1, 3)))
    how = draw.choice(["greedy", "pieces", "beams", "samples"])
    options = {}
    if how == "pieces" and kind not in VISION:
        options = {"prefill_chunk_size": draw.randint(1, 25)}
    if how == "beams":
        beams = draw.randint(2, 3)
        options = {"num_beams": beams, "num_return_sequences": draw.randint(1, beams)}
    if how == "samples":
        options = {"do_sample": True, "temperature": 2.0, "num_return_sequences": draw.randint(1, 3)}
    method = method_of(draw, kind, defers=how != "beams")  # beams that wait are cut each by its own tokens
    return Decoding(kind, method, lengths, options, draw.randint(3, 7))


@pytest.mark.parametrize("number", range(CASES or 12))
def test_generate_equals_the_masked_full_cache(number):
    case = decoding(number)
    model, plain = twins(case.kind)
    given = {"pictures": 1} if case.kind in VISION else {"images": ()}
    inputs = (picture_inputs if case.kind in VISION else text_inputs)(case.lengths, **given)
    length, options = max(case.lengths), case.options | {"suppress_tokens": [IMAGE]}
    with kvweave.compress(model, case.method) as session:
        torch.manual_seed(7)
        mine, logits = decode(model, inputs, case.steps, **options)
    defer = case.method.defer
    start = length + defer if case.steps > defer else length
    cut = cut_of(session.cache, start, merged=True, mass_bias=case.method.biases_logits)
    if isinstance(case.method, Biased):
        for seen in cut.bias.values():
            seen += Biased.bias(torch.arange(length).expand(seen.shape)).double()
    options.pop("prefill_chunk_size", None)
    assert session.cache.get_seq_length() == length + case.steps - 1
    with masked(plain, *([cut] if case.steps > defer else [])):
        torch.manual_seed(7)
        same, expected = decode(plain, inputs, case.steps, **options)
    assert torch.equal(mine, same)
    assert_close(logits, expected)
