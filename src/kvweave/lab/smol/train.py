"""Training: the tower learns to say what a cell shows, then all of it to answer about albums. Resumable, seeded.

1. *look*: a patch is to be the language model's own embedding of the noun in its cell: cross-entropy against the
   directions of the nouns' embeddings, and the distance to the embedding itself. Without the distance the language
   model reads near misses ("train" for locomotive).
2. *answer*: albums with packed questions, short ones first; families are drawn by what they still get wrong.

A run of a number of steps depends on the seed alone. A run of a number of minutes takes as many steps as fit, and
its rates follow the clock.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import pickle
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from kvweave.lab.runs import forget_after, write_whole
from kvweave.lab.smol import scenes
from kvweave.lab.smol.albums import FAMILIES, TRAIN, album, generator
from kvweave.lab.smol.model import Adapters, create, load_language, load_own_state, own_state
from kvweave.lab.smol.nouns import NOUNS
from kvweave.lab.smol.processor import load_tokenizer
from kvweave.lab.smol.prompts import Packed, draw_questions, pack
from kvweave.lab.smol.scenes import CELLS, EMPTY, Scenes, dress

QUESTIONS = 10  # drawn for each album
EASY = 0.08  # of its share a family keeps when it makes no errors
SHARPNESS = 20.0  # of the cosine between a patch and the nouns
MEMORY = 200  # questions over which a family's running accuracy forgets two thirds
STATE = "smol.safetensors"
_CHECKPOINT, _LOG = "checkpoint.pt", "log.jsonl"


class Lengths(NamedTuple):
    """Images of albums `until` a share of the run: `fewest` to `most`, or by the chance `longer` a long album."""

    until: float
    fewest: int
    most: int
    longer: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """How a run goes.

    Attributes:
        look: share of the run in which only the tower learns, from `pictures` a step.
        tokens: of the albums of a step, questions included, roughly.
        lengths: of the albums in the rest, one after another; long: fewest and most images of the long ones.
        adapter_rate, look_rate, tower_rate: of AdamW, for the adapters, and the tower in the first part and then.
        watch: weight of the first part's cross-entropy in the second.
        compiled: whether the language model's layers are compiled: twice as fast, after half a minute.
    """

    look: float = 0.15
    pictures: int = 48
    tokens: int = 2_500
    lengths: tuple[Lengths, ...] = (Lengths(0.1, 2, 5), Lengths(0.3, 2, 9), Lengths(1.0, 3, 12, 0.3))
    long: tuple[int, int] = (13, 20)
    adapter_rate: float = 1e-3
    look_rate: float = 1e-3
    tower_rate: float = 2e-4
    watch: float = 0.1
    compiled: bool = False
    minutes: float = 480.0  # where nothing is said


GPU = Recipe(pictures=384, tokens=32_000, compiled=True, minutes=5.0)


@dataclass(frozen=True)
class Batch:
    """Pictures to look at, or albums to answer about."""

    scenes: Scenes
    packed: Packed | None = None


def draw_batch(
    tokenizer: Any, recipe: Recipe, seed: int, step: int, done: float, shares: Mapping[str, float]
) -> Batch:
    """The batch of a step, `done` of the run (0 .. 1) being over."""
    rng = generator(TRAIN, seed, step)
    if done < recipe.look:
        cells = rng.integers(0, len(NOUNS), (recipe.pictures, CELLS))
        cells[rng.random(cells.shape) < 0.25] = EMPTY
        return Batch(dress(cells, rng))
    done = (done - recipe.look) / (1 - recipe.look)
    now = next(lengths for lengths in recipe.lengths if done <= lengths.until)
    fewest, most = recipe.long if rng.random() < now.longer else (now.fewest, now.most)
    images = int(rng.integers(fewest, most + 1))
    count = max(1, recipe.tokens // (images * 48 + QUESTIONS * 25))
    albums = [album(rng, images) for _ in range(count)]
    questions = draw_questions(albums, QUESTIONS, shares, rng)
    dressed = dress(np.concatenate([made.cells for made in albums]), rng)
    return Batch(dressed, pack(tokenizer, albums, questions, dressed))


class Trainer:
    """A model, its adapters, the optimiser, and how well each family is answered; takes one step after another."""

    def __init__(
        self,
        language: Path,
        recipe: Recipe,
        seed: int = 0,
        device: str | torch.device = "cpu",
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.recipe, self.seed, self.device = recipe, seed, torch.device(device)
        self.fast = self.device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()  # else bfloat16 is slower
        self.dtype = torch.bfloat16 if self.fast else torch.float32
        self.tokenizer = load_tokenizer(language)
        model = create(load_language(language), seed).requires_grad_(False)
        self.adapters = Adapters(model.model.language_model, seed=seed).to(self.device)
        if start is not None:
            load_own_state(model, self.adapters, start)
        self.model = model.to(self.device)
        self.language_model = self.model.model.language_model.to(self.dtype)
        self.eyes = [
            *self.model.model.vision_tower.requires_grad_(True).parameters(),
            *self.model.model.multi_modal_projector.requires_grad_(True).parameters(),
        ]
        groups = [{"params": list(self.adapters.parameters())}, {"params": self.eyes}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=self.device.type == "cuda"
        )
        if recipe.compiled:
            for layer in self.language_model.layers:
                layer.compile(dynamic=True)
        self.names = _noun_embeddings(self.language_model.get_input_embeddings().weight, self.tokenizer)
        self.step = 0
        self.accuracy = dict.fromkeys(FAMILIES, 0.0)
        self.sight = 0.0  # running share of cells that are told right

    def shares(self) -> dict[str, float]:
        """How often each family is to be asked."""
        return {family: EASY + 1 - self.accuracy[family] for family in FAMILIES}

    def advance(self, batch: Batch, done: float) -> dict[str, Any]:
        """Learn from a batch, `done` of the run being over; returns what the log keeps of it."""
        rates = self._rates(done)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        record = self._look(batch.scenes) if batch.packed is None else self._answer(batch.packed.to(self.device))
        learnt = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(learnt, 1.0)
        self.optimizer.step()
        self.step += 1
        return {"step": self.step, "done": round(done, 4), **record, "norm": round(norm.item(), 3)}

    def _rates(self, done: float) -> tuple[float, float]:
        recipe = self.recipe
        if done < recipe.look:
            return 0.0, recipe.look_rate * _curve(done / recipe.look)
        curve = _curve((done - recipe.look) / (1 - recipe.look))
        return recipe.adapter_rate * curve, recipe.tower_rate * curve

    def _pixels(self, drawn: Scenes) -> Tensor:
        drawn = drawn.to(self.device)
        noise = torch.Generator(self.device).manual_seed((self.seed << 32) + self.step)
        shape = (len(drawn), scenes.SIDE, scenes.SIDE, 3)
        return scenes.pixel_values(scenes.draw(drawn, torch.randn(shape, generator=noise, device=self.device)))

    def _features(self, pixels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.fast):
            found = self.model.get_image_features(pixels, return_dict=True).pooler_output
        return torch.stack(list(found)).float()  # [pictures, 36, hidden]

    def _look(self, drawn: Scenes) -> dict[str, Any]:
        features = self._features(self._pixels(drawn))
        cross, hits, distance = self._sight(features, drawn.cells.to(self.device), exact=True)
        loss = 0.3 * cross + 6 * distance
        loss.backward()
        figures = torch.stack([loss.detach(), distance.detach(), hits]).tolist()
        self.sight += (figures[2] - self.sight) * 0.05
        return {"loss": round(figures[0], 4), "distance": round(figures[1], 4), "sight": round(self.sight, 4)}

    def _sight(self, features: Tensor, cells: Tensor, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy of cells' nouns, share of cells told right, squared distance to the nouns' embeddings."""
        grid, half = scenes.GRID, features.shape[1] // (2 * scenes.CELLS)
        patches = features.view(-1, grid, half, grid, half, features.shape[-1]).transpose(2, 3)
        patches = patches.reshape(-1, half * half, features.shape[-1])  # [cells, 4, hidden]
        wanted = torch.where(cells == EMPTY, len(NOUNS), cells).flatten()
        centre = self.names.mean(0)
        directions = F.normalize(self.names - centre, dim=-1)
        logits = SHARPNESS * F.normalize(patches - centre, dim=-1) @ directions.T
        cross = F.cross_entropy(logits.flatten(0, 1), wanted.repeat_interleave(half * half))
        hits = (logits.detach().sum(1).argmax(-1) == wanted).float().mean()
        if not exact:
            return cross, hits, cross.new_zeros(())
        spread = (self.names - centre).pow(2).sum(-1).mean()
        distance = (patches - self.names[wanted][:, None]).pow(2).sum(-1).mean() / spread
        return cross, hits, distance

    def _answer(self, packed: Packed) -> dict[str, Any]:
        features = self._features(self._pixels(packed.scenes))
        embedded = self.language_model.get_input_embeddings()(packed.tokens)
        visual = (packed.tokens == self.model.config.image_token_id)[..., None]
        embedded = embedded.masked_scatter(visual, features.to(self.dtype))
        arguments = {
            "inputs_embeds": embedded,
            "attention_mask": _mask(packed.groups, self.dtype),
            "position_ids": packed.places,
            "use_cache": False,
        }
        merged = self.adapters.merged(self.language_model)
        states = torch.func.functional_call(self.language_model, merged, (), arguments).last_hidden_state
        logits = F.linear(states.flatten(0, 1)[packed.behind], self.model.lm_head.weight.to(self.dtype)).float()
        loss = F.cross_entropy(logits, packed.targets)
        cross, sight, _ = self._sight(features, packed.scenes.cells, exact=False)
        (loss + self.recipe.watch * cross).backward()
        wrong = (logits.detach().argmax(-1) != packed.targets).float()
        wrong = torch.zeros(len(packed.families), device=self.device).index_add_(0, packed.owner, wrong)
        figures = torch.cat([loss.detach()[None], sight[None], wrong]).tolist()
        self.sight += (figures[1] - self.sight) * 0.05
        self._remember(packed.families.tolist(), [count == 0 for count in figures[2:]])
        return {
            "loss": round(figures[0], 4),
            "sight": round(self.sight, 4),
            "albums": len(packed.tokens),
            "images": len(packed.scenes) // len(packed.tokens),
            "length": packed.tokens.shape[1],
            "accuracy": {family: round(value, 3) for family, value in self.accuracy.items()},
        }

    def _remember(self, families: list[int], right: list[bool]) -> None:
        for index, family in enumerate(FAMILIES):
            mine = [hit for hit, kin in zip(right, families, strict=True) if kin == index]
            if mine:
                keep = math.exp(-len(mine) / MEMORY)
                self.accuracy[family] = keep * self.accuracy[family] + (1 - keep) * sum(mine) / len(mine)

    def own_state(self) -> dict[str, Tensor]:
        """What is learnt, as it is shipped: bfloat16, on the CPU."""
        state = own_state(self.model, self.adapters)
        return {name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in state.items()}

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        return {
            "run": self._identity(),
            "own": own_state(self.model, self.adapters),
            "optimizer": self.optimizer.state_dict(),
            "progress": (self.step, self.accuracy, self.sight),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a `state`; ValueError if it belongs to a run with another seed or recipe."""
        if state["run"] != self._identity():
            raise ValueError("the checkpoint belongs to a run with another seed or recipe")
        load_own_state(self.model, self.adapters, state["own"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, accuracy, self.sight = state["progress"]
        self.accuracy = dict(accuracy)

    def _identity(self) -> str:
        return json.dumps({"seed": self.seed, "recipe": asdict(self.recipe)})


def _curve(done: float) -> float:
    """A short rise, then a cosine down to a fiftieth."""
    return min(1.0, 0.02 + done / 0.03) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def _mask(groups: Tensor, dtype: torch.dtype) -> Tensor:
    """[albums, 1, length, length], added to the scores: a question sees its album, and itself up to a token."""
    length = groups.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=groups.device).tril()
    visible = (groups == 0)[:, None, :] | (groups[:, None, :] == groups[:, :, None])
    blocked = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=groups.device)
    return torch.where(visible & causal, blocked.new_zeros(()), blocked)[:, None]


def _noun_embeddings(embedding: Tensor, tokenizer: Any) -> Tensor:
    """float [nouns + 1, hidden]: the mean embedding of each noun's tokens, and of the word for an empty cell."""
    names = [f" {noun}" for noun in (*NOUNS, "nothing")]
    ids = tokenizer(names, add_special_tokens=False)["input_ids"]
    return torch.stack([embedding.detach()[one].float().mean(0) for one in ids])


class Painters:
    """Draws the batches of one step after another, in processes of their own ahead of time if there are any.

    They come back as bytes: tensors would be sent as files in shared memory, of which machines have few.
    """

    AHEAD = 2  # batches for each process

    def __init__(self, tokenizer: Any, recipe: Recipe, seed: int, workers: int) -> None:
        self._arguments = (tokenizer, recipe, seed)
        self._ahead: deque[Future[bytes]] = deque()
        self._most = workers * self.AHEAD
        self._pool: ProcessPoolExecutor | None = None
        if workers:
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(workers, context, _set_up, self._arguments)
            self._pool.submit(int).result()  # all fork now, before there is a GPU to share

    def batch(self, step: int, done: float, shares: Mapping[str, float]) -> Batch:
        """The batch of a step; with processes, drawn for what held when it was ordered."""
        if self._pool is None:
            return draw_batch(*self._arguments, step, done, shares)
        while len(self._ahead) < self._most:
            self._ahead.append(self._pool.submit(_draw_bytes, step + len(self._ahead), done, dict(shares)))
        return pickle.loads(self._ahead.popleft().result())

    def close(self) -> None:
        """Stop the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


_worker: tuple[Any, Recipe, int]


def _set_up(*given: Any) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = given


def _draw_bytes(step: int, done: float, shares: Mapping[str, float]) -> bytes:
    return pickle.dumps(draw_batch(*_worker, step, done, shares))


@dataclass
class _Run:
    """A training under way in a folder.

    Attributes:
        clock: seconds of training alone, over all resumed parts.
    """

    out: Path
    trainer: Trainer
    painters: Painters
    on_save: Callable[[], None]
    clock: float = 0.0

    def restore(self) -> None:
        """Go on where the folder's files left off."""
        saved = torch.load(self.out / _CHECKPOINT, map_location=self.trainer.device, weights_only=True)
        self.trainer.restore(saved["trainer"])
        self.clock = saved["clock"]

    def save(self) -> None:
        state = {"trainer": self.trainer.state(), "clock": self.clock}
        write_whole(self.out / _CHECKPOINT, partial(torch.save, state))
        write_whole(self.out / STATE, partial(save_file, self.trainer.own_state()))
        self.on_save()

    def go_on(self, done: Callable[[], float], save_every: float, on_step: Callable[[dict[str, Any]], None]) -> None:
        """Take steps until `done` says 1."""
        trainer = self.trainer
        last_saved = last = time.perf_counter()
        with (self.out / _LOG).open("a") as lines:
            while (now := done()) < 1:
                record = trainer.advance(self.painters.batch(trainer.step, now, trainer.shares()), now)
                if not math.isfinite(record["loss"]) or not math.isfinite(record["norm"]):
                    raise FloatingPointError(f"step {trainer.step}: loss {record['loss']}, norm {record['norm']}")
                this = time.perf_counter()
                record["seconds"] = round(this - last, 4)
                self.clock, last = self.clock + this - last, this
                lines.write(json.dumps(record) + "\n")
                on_step(record)
                if this - last_saved > save_every:
                    lines.flush()
                    self.save()
                    last_saved = last = time.perf_counter()


def train(
    out: Path,
    language: Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    recipe: Recipe | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    start: Path | None = None,
    resume: bool = False,
    workers: int = 0,
    save_every: float = 60.0,
    on_step: Callable[[dict[str, Any]], None] = lambda record: None,
    on_save: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train and write `smol.safetensors` (tower, projector, adapters) to the folder `out`, a log beside it.

    Args:
        language: folder of the language model.
        steps, minutes: how long; one of them, or the recipe's minutes. Minutes count training alone, over all
            resumed parts.
        start: a `smol.safetensors` to go on from instead of chance.
        resume: go on with the run in `out`.
        workers: processes that draw batches; 0: as they are needed, which alone repeats bit for bit.
        save_every: seconds.
        on_step, on_save: told the record of each step, and when files have been written.
    Raises:
        FileExistsError: `out` holds a run and `resume` is not set.
        FloatingPointError: the loss is no number any more.
        ValueError: the run had another seed or recipe, or both steps and minutes are given.
    """
    if steps is not None and minutes is not None:
        raise ValueError(f"steps={steps} and minutes={minutes} are not allowed together: allowed is one of them")
    out.mkdir(parents=True, exist_ok=True)
    found = (out / _CHECKPOINT).exists()
    if found and not resume:
        raise FileExistsError(f"{out} holds a run: resume it, or choose another folder")
    recipe = recipe or (Recipe() if torch.device(device).type == "cpu" else GPU)
    minutes = recipe.minutes if minutes is None else minutes
    painters = Painters(load_tokenizer(language), recipe, seed, workers)
    trainer = Trainer(language, recipe, seed, device, load_file(start) if start else None)
    run = _Run(out, trainer, painters, on_save)
    if found:
        run.restore()
    forget_after(out / _LOG, trainer.step)
    try:
        run.go_on(
            lambda: trainer.step / steps if steps is not None else run.clock / (60 * minutes), save_every, on_step
        )
    finally:
        painters.close()
    run.save()
    seconds = round(run.clock, 1)
    return {"steps": trainer.step, "seconds": seconds, "sight": trainer.sight, "accuracy": trainer.accuracy}
