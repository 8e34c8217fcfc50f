"""Train the lab's model from a seed: up to 3,300 steps, each about 0.7 seconds on two free CPU cores.

The curriculum is data (`CURRICULUM`), and its order matters: short albums on plain ground first, frequent
walks among them; then longer ones; then cells with borders and a second needle, heavy in pairs; then lengths
up to twelve images. Runs that began with borders and two needles left the robot's walk at chance.

Each step's albums follow from the seed and the step alone, and what is asked about them from how well the
model answered each family until then. A run that was interrupted therefore goes on exactly where it stopped.

`ENLARGE` goes on from a model of the small world and teaches it the large one, grids growing, while a share of
the steps rehearses the small one.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvweave.lab import words
from kvweave.lab.model import Forward, create
from kvweave.lab.runs import forget_after, write_whole
from kvweave.lab.world import AUXILIARY, FAMILIES, TASKS, WORLDS, Albums, World, generator, layout, slot

if TYPE_CHECKING:
    from rich.progress import Progress

QUESTIONS = 112  # tokens of questions and answers behind each album
TRY_EVERY = 7  # tokens: so many questions are drawn; repeated ones and those that no longer fit are left out
SHARES = {
    "text_needle": 1.2, "image_needle": 1.0, "lookup": 2.5, "change": 3.0, "action": 1.0, "listing": 0.8,
    "two_images": 2.5,
}  # fmt: skip
EASY = 0.15  # of its share a family keeps when it makes no errors

MATRIX_RATE = 3e-3  # Muon
OTHER_RATE = 2e-3  # AdamW: embeddings, norms, biases
MEMORY = 40  # answer tokens over which a family's running accuracy forgets 3 %


@dataclass(frozen=True)
class Stage:
    """Some steps on one kind of albums, with a learning rate that rises, holds and falls.

    A step takes albums of one of the lengths in `images`, as many as come to about `tokens` tokens. The stage
    ends early once the running accuracy of every task has passed `enough`.
    """

    steps: int
    images: tuple[int, ...]
    world: World
    tokens: int = 13_500
    rate: float = 1.0  # at its height, as a share of the optimisers' own
    warm: int = 50  # steps of linear rise
    hold: float = 0.5  # share of the stage before the cosine falls
    floor: float = 0.05  # where it ends
    enough: float = 1.0
    even: bool = False  # every family weighs the same in the loss, however few words its answers have
    families: tuple[str, ...] = (*TASKS, *AUXILIARY)  # that are asked
    auxiliary: float = 0.3  # weight in the loss of the families that are no tasks in the small world
    questions: int = QUESTIONS
    rehearsal: float = 0.0  # share of the steps that take albums of the small world instead
    rehearsed: tuple[int, ...] = (8,)  # images in these

    def rate_at(self, step: int) -> float:
        """The factor on the learning rates at a step of this stage, counted from 0."""
        done = (step / self.steps - self.hold) / (1 - self.hold) if self.hold < 1 else 0.0
        fall = self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * max(0.0, done)))
        return self.rate * min(1.0, (step + 1) / self.warm) * fall


_PLAIN = World(frames=False, needles=1, walks=0.5, pairs=0.75)
_PAIRS = World(walks=0.3, pairs=1.0)
CURRICULUM: tuple[Stage, ...] = (
    Stage(900, (3,), _PLAIN, warm=100, floor=0.1),
    Stage(500, (5,), _PLAIN, enough=0.99, even=True),
    Stage(350, (3, 5), _PAIRS, enough=0.99, even=True),
    Stage(350, (5, 8), World(), enough=0.99, even=True),
    Stage(1200, (5, 8, 12), World(pairs=0.7), hold=0.4, floor=0.01, even=True),
)


def _grown(steps: int, grid: int, images: tuple[int, ...], **options: Any) -> Stage:
    """Steps on larger pictures, some of them in the small world."""
    world = replace(WORLDS["large"], grid=grid, pairs=0.7)
    return Stage(
        steps, images, world, tokens=8_000, even=True, families=FAMILIES, auxiliary=1.0, questions=168, **options
    )


ENLARGE: tuple[Stage, ...] = (
    _grown(100, 8, (5,), rate=0.7, warm=20, hold=1.0, rehearsal=0.15),
    _grown(100, 10, (4,), rate=0.7, warm=10, hold=1.0, rehearsal=0.15),
    _grown(170, 10, (4, 8), rate=0.7, warm=5, hold=0.2, floor=0.01, rehearsal=0.15),
    _grown(75, 10, (8,), rate=0.5, warm=10, hold=0.2, floor=0.01),
)
CURRICULA = {"small": CURRICULUM, "large": ENLARGE}


@dataclass(frozen=True)
class Batch:
    """Albums with questions packed behind them.

    tokens [albums, length]; pictures, bytes [albums, images, side, side, 3]; for each token of the questions
    `targets`, the token to predict from it (padding where nothing is asked), and `families`, whose answer
    that is (an index into FAMILIES).
    """

    tokens: Tensor
    pictures: Tensor
    targets: Tensor
    families: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(*(part.to(device) for part in (self.tokens, self.pictures, self.targets, self.families)))


def draw_batch(stage: Stage, seed: int, step: int, shares: Mapping[str, float]) -> Batch:
    """The albums of one step; `shares` says how often each family is asked."""
    rng = generator("train", seed, step)
    world, lengths = stage.world, stage.images
    if stage.rehearsal and rng.random() < stage.rehearsal:
        world, lengths = WORLDS["small"], stage.rehearsed
    images = int(rng.choice(lengths))
    count = max(1, stage.tokens // (1 + images * slot(world.grid) + stage.questions))
    albums = Albums(count, layout(images, rng, world), rng, world)
    pictures = albums.pictures(rng, frames=world.frames)
    packed = [_pack(albums, row, rng, shares, stage) for row in range(count)]
    questions, targets, families = (np.stack(parts) for parts in zip(*packed, strict=True))
    tokens = np.concatenate([albums.tokens(), questions], 1)
    return Batch(*(torch.from_numpy(part) for part in (tokens, pictures, targets, families)))


def _pack(
    albums: Albums, row: int, rng: np.random.Generator, shares: Mapping[str, float], stage: Stage
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Questions and answers behind one album: tokens, targets, families, each [questions]."""
    askable = [family for family in stage.families if albums.answerable(family)]
    share = np.array([shares[family] for family in askable])
    tokens, targets = np.full((2, stage.questions), words.PAD)
    families = np.full(stage.questions, -1)
    texts, used = set(), 0
    for pick in rng.choice(len(askable), size=stage.questions // TRY_EVERY, p=share / share.sum()):
        question = albums.question(row, askable[pick], rng)
        ask = words.encode(f"{words.QUESTION} {question.text}")
        answer = [words.TOKEN[words.ANSWER], *words.encode(question.answer), words.EOS]
        end = used + len(ask) + len(answer)
        if question.text in texts or end > stage.questions:
            continue
        texts.add(question.text)
        tokens[used:end] = ask + answer
        targets[used + len(ask) - 1 : end - 1] = answer  # the answer's opening follows the question mark
        families[used + len(ask) - 1 : end - 1] = FAMILIES.index(askable[pick])
        used = end
    return tokens, targets, families


def loss_and_hits(
    forward: Forward, batch: Batch, *, even: bool = False, auxiliary: float = 0.3
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the answers; and, for their words, [words] each: whether hit, whose family.

    What opens and ends an answer counts little, and `auxiliary` says how much the families count that are no
    tasks in the small world. With `even`, each family counts the same in all; without it, each word does.
    """
    album = batch.tokens.shape[1] - batch.targets.shape[1]
    states = forward(batch.tokens, batch.pictures)[:, album:]
    real = batch.targets != words.PAD
    target, family = batch.targets[real], batch.families[real]
    logits = F.linear(states[real].float(), forward.model.lm_head.weight)
    errors = F.cross_entropy(logits, target, reduction="none")
    frame = (target == words.EOS) | (target == words.TOKEN[words.ANSWER])
    weight = torch.where(frame, 0.2, 1.0)
    if even:
        weight = weight / weight.new_zeros(len(FAMILIES)).index_add(0, family, weight)[family]
    weight = weight * torch.where(family >= len(TASKS), auxiliary, 1.0)
    loss = (errors * weight).sum() / weight.sum()
    return loss, (logits.argmax(-1) == target)[~frame], family[~frame]


class Trainer:
    """A model, its two optimisers, and how well it answers each family; steps through a curriculum."""

    def __init__(
        self,
        seed: int = 0,
        curriculum: Sequence[Stage] = CURRICULUM,
        device: str | torch.device | None = None,
        *,
        start: str | Path | None = None,
        compiled: bool = True,
    ) -> None:
        self.seed, self.curriculum = seed, tuple(curriculum)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = create(seed) if start is None else _load(start)
        self._began = _digest(model)
        self.model = model.to(self.device).train()
        self.forward = Forward(self.model, compiled=compiled)
        self.optimizers = _optimizers(self.model)
        self.stage, self.stage_step, self.step = 0, 0, 0
        self.accuracy = dict.fromkeys(FAMILIES, 0.0)
        self._shares = self._current_shares()  # of the batch that is next
        self._painter = ThreadPoolExecutor(1, "kvweave-lab-world")
        self._next: Future[Batch] | None = None

    @property
    def finished(self) -> bool:
        """Whether the curriculum is over."""
        return self.stage == len(self.curriculum)

    @property
    def remaining(self) -> int:
        """Steps until the end, should no stage end early."""
        return sum(stage.steps for stage in self.curriculum[self.stage :]) - self.stage_step

    def advance(self) -> dict[str, Any]:
        """Take one step; returns what the log keeps of it."""
        stage = self.curriculum[self.stage]
        started = time.perf_counter()
        batch = (self._next or self._paint()).result().to(self.device)
        waited = time.perf_counter() - started
        self._shares = self._current_shares()
        rate = stage.rate_at(self.stage_step)
        self._count_step(stage)
        self._next = None if self.finished else self._paint()  # while the model works on this one

        with torch.autocast(self.device.type, torch.bfloat16, enabled=_fast_in_bfloat16(self.device)):
            loss, hits, families = loss_and_hits(self.forward, batch, even=stage.even, auxiliary=stage.auxiliary)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["full_rate"]
            optimizer.step()
            optimizer.zero_grad()
        self._remember(hits, families)
        return {
            "step": self.step,
            "images": batch.pictures.shape[1],
            "loss": round(loss.item(), 4),
            "norm": round(norm.item(), 3),
            "rate": round(rate, 4),
            "seconds": round(time.perf_counter() - started, 3),
            "waited": round(waited, 3),
            "accuracy": {family: round(value, 3) for family, value in self.accuracy.items()},
        }

    def _count_step(self, stage: Stage) -> None:
        self.step += 1
        self.stage_step += 1
        good = min(self.accuracy[task] for task in TASKS) > stage.enough
        if self.stage_step == stage.steps or (good and self.stage_step > stage.warm):
            self.stage, self.stage_step = self.stage + 1, 0

    def _paint(self) -> Future[Batch]:
        stage = self.curriculum[self.stage]
        return self._painter.submit(draw_batch, stage, self.seed, self.step, self._shares)

    def _current_shares(self) -> dict[str, float]:
        return {family: share * (EASY + 1 - self.accuracy[family]) for family, share in SHARES.items()}

    @torch.no_grad()
    def _remember(self, hits: Tensor, families: Tensor) -> None:
        for index, family in enumerate(FAMILIES):
            mine = hits[families == index]
            if len(mine):
                keep = 0.97 ** (len(mine) / MEMORY)
                self.accuracy[family] = keep * self.accuracy[family] + (1 - keep) * mine.float().mean().item()

    def close(self) -> None:
        """Stop painting."""
        self._painter.shutdown(cancel_futures=True)

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on (random numbers follow from seed and step)."""
        return {
            "run": self._identity(),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": (self.stage, self.stage_step, self.step),
            "accuracy": self.accuracy,
            "shares": self._shares,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a `state`; ValueError if it belongs to a run with another seed, start or curriculum."""
        if state["run"] != self._identity():
            raise ValueError("the checkpoint belongs to a run with another seed, start or curriculum")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.stage, self.stage_step, self.step = state["progress"]
        self.accuracy, self._shares = dict(state["accuracy"]), dict(state["shares"])

    def _identity(self) -> str:
        stages = [asdict(stage) for stage in self.curriculum]
        return json.dumps({"seed": self.seed, "start": self._began, "curriculum": stages})


def _load(start: str | Path) -> nn.Module:
    """The model in a folder, in float32."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    if not (Path(start) / "config.json").is_file():
        raise FileNotFoundError(f"start {str(start)!r} is not allowed: allowed is a folder with a model of the lab's")
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(start, dtype=torch.float32)


def _fast_in_bfloat16(device: torch.device) -> bool:
    """Processors without instructions for it take several times as long in bfloat16 as in float32."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()


def _digest(model: nn.Module) -> str:
    """What tells the starting weights of two runs apart."""
    parts = (weight.detach().numpy().tobytes() for weight in model.parameters())
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices (binds colours to shapes in 500 steps), AdamW for the rest."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    taken = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.02},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=OTHER_RATE, betas=(0.9, 0.97)),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_rate"] = group["lr"]
    return optimizers


def train(
    out: str | Path,
    seed: int = 0,
    device: str | torch.device | None = None,
    *,
    curriculum: Sequence[Stage] = CURRICULUM,
    resume: bool = False,
    start: str | Path | None = None,
    compiled: bool = True,
    save_every: int = 50,
    progress: bool = True,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train the lab's model and write it to the folder `out`, ready for `from_pretrained`.

    `start` is the folder of a lab model to go on from; without it weights are drawn from the seed.

    Beside the model lie `log.jsonl`, one line a step, and `checkpoint.pt`, written every `save_every` steps,
    from which `resume=True` goes on. `device` is CUDA where there is one. `compiled` takes a quarter off each
    step and needs a C++ compiler, or Triton on a GPU. Returns the number of steps, whether the run had ended
    before, and the running accuracy of each family.

    Raises FileExistsError if `out` holds a run and `resume` is not set, or a model of other origin;
    ValueError if the run had another seed, start or curriculum.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, log = out / "checkpoint.pt", out / "log.jsonl"
    if checkpoint.exists() and not resume:
        raise FileExistsError(f"{out} holds a run: pass resume=True to go on with it, or choose another folder")

    if (out / "model.safetensors").exists() and not checkpoint.exists():
        raise FileExistsError(f"{out} holds a model that no run here has made: choose another folder")

    trainer = Trainer(seed, curriculum, device, start=start, compiled=compiled)
    if checkpoint.exists():
        trainer.restore(torch.load(checkpoint, map_location=trainer.device, weights_only=True))
    already_finished = trainer.finished
    forget_after(log, trainer.step)
    try:
        with _progress_bar(progress, trainer) as show, log.open("a") as lines:
            while not trainer.finished:
                record = trainer.advance()
                lines.write(json.dumps(record) + "\n")
                if trainer.step % save_every == 0 or trainer.finished:
                    lines.flush()
                    write_whole(checkpoint, partial(torch.save, trainer.state()))
                show(record)
                if on_step:
                    on_step(record)
    finally:
        trainer.close()
    export(trainer.model, out)
    return {"steps": trainer.step, "already_finished": already_finished, "accuracy": dict(trainer.accuracy)}


def export(model: Any, out: str | Path) -> None:
    """Write a model with its processor to a folder, ready for `from_pretrained`.

    Weights are rounded to bfloat16 on disk, which halves the file, and load in float32.
    """
    from kvweave.lab.processor import LabProcessor

    own = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}  # tied
    rounded = {name: weight.to(torch.bfloat16) for name, weight in own.items()}
    model.save_pretrained(out, state_dict=rounded)
    LabProcessor.create().save_pretrained(out)


def _progress_bar(shown: bool, trainer: Trainer) -> AbstractContextManager[Callable[[dict[str, Any]], None]]:
    if not shown:
        return nullcontext(lambda record: None)
    return _ProgressBar(trainer)


class _ProgressBar:
    """Steps, loss, the weakest task, time left."""

    def __init__(self, trainer: Trainer) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._trainer = trainer
        self._bar: Progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )  # fmt: skip

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        total = self._trainer.step + self._trainer.remaining
        self._task = self._bar.add_task("training", total=total, completed=self._trainer.step, note="")
        self._bar.start()
        return self._show

    def _show(self, record: dict[str, Any]) -> None:
        weakest = min(TASKS, key=record["accuracy"].__getitem__)
        note = f"loss {record['loss']:.3f}, weakest {weakest} {record['accuracy'][weakest]:.2f}"
        total = record["step"] + self._trainer.remaining
        self._bar.update(self._task, completed=record["step"], total=total, note=note)

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
