"""MileBench from a disk: its folders and files as they are, its prompts as it composes them.

    <data>/<Task>/<Task>.json                     <data>/<Task>/images/...
    <data>/<Task>/<Task>-adv.json                 adversarial questions about the same images
    <data>/<Task>/<Task>_combined_<N>.json        <data>/<Task>/combined_<N>_images/...

`kvweave lab export` writes the lab's questions in this format. Beside what MileBench knows, `meta_data` may hold
{"kvweave": {"metrics": [...], "max_new_tokens": n}}, and a sample's `task_instance` the end of its context that is
the "question"; elsewhere the question is what stands behind the last image.
"""

import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvweave import models
from kvweave.evals.scores.metrics import check_metrics
from kvweave.evals.tasks.questions import LONGEST_ANSWER, MOST, instruction, read, texts
from kvweave.evals.tasks.tasks import Example
from kvweave.ops.brief import brief

IMAGE = "<ImageHere>"  # where an image goes, in its prompts and its output
SCORINGS = ("official", "strict")
TRUNCATIONS = ("ours", "official")
_BY_TYPE = {"open-ended": "rouge", "multi-choice": "choice"}


@dataclass(frozen=True)
class Options:
    """How samples are read, asked and scored.

    Attributes:
        count: the first so many samples of each task; None: all.
        combined: N: the files in which a sample's images are combined into N; None: one by one.
        adversarial: the `-adv` files.
        scoring: which of the two goes into the tables first; the other stands beside it.
        truncation: "ours": none. "official": its rule, from the left, at `max_context_len` tokens of text and
            `tokens_per_image` for each image, counted by `tokenizer`.
        tokenizer: name of the model that counts; used by the official truncation only.
        max_new_tokens: where an answer is cut off; None: 512, or what the file says.
    """

    count: int | None = None
    combined: int | None = None
    adversarial: bool = False
    scoring: str = "official"
    truncation: str = "ours"
    max_context_len: int = 4096
    tokens_per_image: int = 576
    tokenizer: str = ""
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("scoring", SCORINGS), ("truncation", TRUNCATIONS)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is unknown: allowed is one of {', '.join(allowed)}")
        for name in ("count", "combined", "max_context_len", "tokens_per_image", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MOST:
                raise ValueError(f"{name}={brief(value)} is not allowed: allowed is an int >= 1, below 2**31")
        if self.combined and self.adversarial:
            raise ValueError("adversarial=True is not allowed with combined: there are no such files")


@dataclass(frozen=True)
class Sample:
    """One sample, as it is asked.

    Attributes:
        prompt: all of the text, `IMAGE` where an image goes.
        images: files, in order.
        question: the end of `prompt` that comes after the context, where the file says which.
        quantity: of images: "Few", "Medium" or "Many".
    """

    id: int
    prompt: str
    images: tuple[str, ...]
    response: str
    choices: tuple[str, ...]
    question: str
    quantity: str


@dataclass(frozen=True)
class MileBenchTask:
    """One of MileBench's tasks. The seed of its examples changes nothing but their ids."""

    name: str
    data: str
    options: Options = field(default_factory=Options)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those that its file names, else MileBench's and the strict one."""
        names = self._meta.get("kvweave", {}).get("metrics")
        if names:
            return check_metrics(names)
        strict = "words" if self.official in ("needle", "contains") else self.official
        pair = f"milebench_{self.official}", f"strict_{strict}"
        return pair if self.options.scoring == "official" else pair[::-1]

    @property
    def official(self) -> str:
        """Which metric MileBench's scorer picks: by name, then by type of question."""
        if "NeedleInAHaystack" in self.name:
            return "needle"
        if "MMCoQA" in self.name:
            return "contains"
        kind = self._meta.get("question_type")
        if not isinstance(kind, str) or kind not in _BY_TYPE:
            raise ValueError(
                f"{self.path}: question_type={brief(kind)} has no metric: allowed is {', '.join(_BY_TYPE)}"
            )
        return _BY_TYPE[kind]

    @property
    def max_new_tokens(self) -> int:
        limit = self._meta.get("kvweave", {}).get("max_new_tokens", LONGEST_ANSWER)
        return int(limit if self.options.max_new_tokens is None else self.options.max_new_tokens)

    @property
    def path(self) -> Path:
        """The file of questions."""
        return _file(Path(self.data), self.name, self.options)

    @property
    def _meta(self) -> dict[str, Any]:
        return read(self.path)["meta_data"]

    def to_dict(self) -> dict[str, Any]:
        mark = hashlib.sha256(self.path.read_bytes()).hexdigest()[:12]
        return {"source": "milebench", "name": self.name, "mark": mark, **asdict(self.options)}

    def samples(self) -> list[Sample]:
        """All samples that are asked, in the file's order.

        Raises:
            ValueError: something is missing in the file, or an image on the disk; the message says which sample.
        """
        read_file = read(self.path)
        data = read_file["data"][: self.options.count]
        tokenizer = _tokenizer(self.options.tokenizer) if self.options.truncation == "official" else None
        instructions = read_file["meta_data"]["task_instruction"]
        return [self._sample(raw, instructions, tokenizer) for raw in data]

    def examples(self, seed: int) -> list[Example]:
        return [self._example(sample, seed) for sample in self.samples()]

    def _sample(self, raw: dict[str, Any], instructions: Any, tokenizer: Any) -> Sample:
        task_text = instruction(instructions, raw["task_instruction_id"])
        instance = raw["task_instance"]
        choices = tuple(map(str, instance.get("choice_list", ())))
        combined = self.options.combined
        named = instance[f"combined_{combined}_images"] if combined else instance["images_path"]
        folder = self.path.parent / (f"combined_{combined}_images" if combined else "images")
        images = [str(self._inside(folder, name)) for name in named]
        context = instance["context"] + _listed(choices, lettered=self.name != "GPR1200")
        for n in range(1, len(instance["images_path"]) + 1):
            for kind in ("image", "table"):
                context = context.replace(f"{{{kind}#{n}}}", f"<Image {n}> " if combined else IMAGE)
        if combined:
            task_text = IMAGE * len(images) + "\n" + task_text
        elif len(images) > context.count(IMAGE):
            context = IMAGE * (len(images) - context.count(IMAGE)) + context
        if tokenizer is not None:
            context, kept = shortened(task_text, context, len(images), tokenizer, self.options)
            images = images[len(images) - kept :]
        question = str(instance.get("question", ""))
        if question and not context.endswith(question):
            question += _listed(choices, lettered=self.name != "GPR1200")
        return Sample(
            id=int(raw["sample_id"]),
            prompt=f"{task_text}\n{context}",
            images=tuple(images),
            response=str(raw["response"]),
            choices=choices,
            question=question if context.endswith(question) else "",
            quantity=_quantity(len(instance["images_path"])),
        )

    def _inside(self, folder: Path, name: str) -> Path:
        """An image's file, which may not lie outside of the data: names may say anything, links lead anywhere."""
        path = Path(os.path.abspath(folder / name))
        away = os.path.isabs(name) or ".." in Path(name).parts
        try:
            away = away or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.data))
        except ValueError:  # characters that no path has
            away = True
        if away:
            raise ValueError(f"{self.path}: image {brief(name)} leaves the folder: allowed is a file in {self.data}")
        return path

    def _example(self, sample: Sample, seed: int) -> Example:
        texts, images = sample.prompt.split(IMAGE), iter(sample.images)
        pieces: list[dict[str, Any]] = []
        for n, text in enumerate(texts):
            if n:
                pieces.append({"type": "image", "image": next(images, None)})
            if text:
                pieces.append({"type": "text", "text": text})
        question = sample.question or texts[-1].lstrip()
        before = sample.prompt[: len(sample.prompt) - len(question)] if question else sample.prompt
        places = len(texts) - 1
        error = "" if places == len(sample.images) else f"{len(sample.images)} images for {places} places in its text"
        return Example(
            id=f"{self.name}/{seed}/{sample.id}",
            messages=[{"role": "user", "content": pieces}],
            question=question,
            answer=sample.response,
            choices=sample.choices,
            context=hashlib.sha256("\0".join([before, *sample.images]).encode()).hexdigest(),
            error=error,
        )


def milebench_tasks(
    data: Path, names: Sequence[str] = (), options: Options | None = None
) -> tuple[MileBenchTask, ...]:
    """Tasks of a MileBench folder by name; all that there are if none is named. Their files are read and checked.

    Raises:
        ValueError: a folder that is not MileBench's, an unknown task, a damaged file, a missing image.
    """
    options = options or Options()
    there = find(data, options)
    for name in names:
        if name not in there:
            raise ValueError(f"tasks={name!r} is unknown: allowed is one of those in {data}: {', '.join(there)}")
    tasks = tuple(MileBenchTask(name, str(data), options) for name in dict.fromkeys(names or there))
    for task in tasks:
        check_metrics(task.metrics)
        _check_images(task)
    return tasks


def find(data: Path, options: Options) -> list[str]:
    """Names of the tasks in a folder.

    Raises:
        ValueError: it holds none; the message says what was looked for, and what is there.
    """
    if not data.is_dir():
        what = "is a file" if data.exists() else "does not exist"
        raise ValueError(f"data={str(data)!r} {what}: allowed is a folder in MileBench's layout")
    folders = sorted(path.name for path in data.iterdir() if path.is_dir())
    tasks = [name for name in folders if _file(data, name, options).is_file()]
    if not tasks:
        entries = sorted(path.name + "/" * path.is_dir() for path in data.iterdir())
        shown = ", ".join(entries[:8]) + (f" and {len(entries) - 8} more" if len(entries) > 8 else "")
        inside = (data / f"{data.resolve().name}.json").is_file()
        hint = f" (this is one task's folder: try {data.resolve().parent})" if inside else ""
        looked = _file(Path("<Task>").parent, "<Task>", options)
        raise ValueError(
            f"data={str(data)!r} is not in MileBench's layout{hint}: looked for {looked}, found {shown or 'nothing'}"
        )
    return tasks


def _file(data: Path, name: str, options: Options) -> Path:
    suffix = "-adv" if options.adversarial else ""
    if options.combined and options.combined != 1:  # one image takes the names from the plain file
        suffix = f"_combined_{options.combined}"
    return data / name / f"{name}{suffix}.json"


def _check_images(task: MileBenchTask) -> None:
    combined = task.options.combined
    if combined:
        key = f"combined_{combined}_images"
        for raw in read(task.path)["data"][: task.options.count]:
            if not texts(raw["task_instance"].get(key)):
                raise ValueError(
                    f"{task.path}: sample_id {raw['sample_id']}: looked for a list {key!r} of file names"
                )
    lost = [(sample.id, image) for sample in task.samples() for image in sample.images if not os.path.isfile(image)]
    if lost:
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ValueError(f"{task.name}: sample_id {lost[0][0]} has an image that is not there: {lost[0][1]}{more}")


def _listed(choices: Sequence[str], *, lettered: bool) -> str:
    """What is put behind a context that there is something to choose from."""
    if not choices:
        return ""
    lines = [f"{chr(ord('A') + n)}. {text}" if lettered else text for n, text in enumerate(choices)]
    return "\nChoice list: \n" + "\n".join(lines) + "\nYour answer is: "


def _quantity(images: int) -> str:
    return "Few" if images < 6 else "Medium" if images <= 31 else "Many"


@functools.cache
def _tokenizer(model: str) -> Any:
    return models.load_tokenizer(model)


def shortened(instruction: str, context: str, images: int, tokenizer: Any, options: Options) -> tuple[str, int]:
    """MileBench's own truncation: the end of a context that fits, and how many of the last images are in it.

    From the last piece of text to the first, each followed to its left by an image of `tokens_per_image`, until
    something does not fit beside the instruction; a last piece that does not fit is cut itself. What stays is
    decoded from its tokens.
    """

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    one_by_one = not options.combined
    limit = options.max_context_len - len(tokens(instruction.removeprefix(IMAGE * images + "\n")))
    pieces: list[list[int]] = []
    used, kept, image_first = 0, 0, False
    for text in reversed(context.split(IMAGE)):
        piece = tokens(text)
        if used + len(piece) > limit:
            if not pieces:
                pieces.append(piece[max(0, len(piece) - limit) :] if limit > 0 else piece)
            break
        image_first = False
        pieces.insert(0, piece)
        used += len(piece)
        if one_by_one:
            if used + options.tokens_per_image > limit:
                break
            if kept < images:
                image_first = True
                kept += 1
                used += options.tokens_per_image
    text = IMAGE.join(tokenizer.decode(piece) for piece in pieces)
    return (IMAGE if image_first else "") + text, kept if one_by_one else images
