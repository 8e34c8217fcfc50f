"""Options that several commands take, and what they come to."""

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvweave.cli.console import BadInput, bad_input, err
from kvweave.ops.brief import brief

if TYPE_CHECKING:
    from PIL.Image import Image

    from kvweave.evals.tasks.sources import Source
    from kvweave.methods.base import Method

ModelName = Annotated[
    str, typer.Option("--model", help="lab, lab-large, smol, smol-text, a folder, or an id of the Hugging Face hub.")
]
Images = Annotated[
    list[Path] | None, typer.Option("--image", help="An image of your own; repeatable, in the prompt's order.")
]
PromptText = Annotated[str | None, typer.Option("--prompt", help="What to ask about the images.")]
Number = Annotated[
    int | None,
    typer.Option("--images", help="Pictures in the generated example; of smol-text, tokens.", show_default="12; 600"),
]
Task = Annotated[
    str | None, typer.Option("--task", help="What the generated example asks.", show_default="image_needle; needle")
]
Questions = Annotated[
    str | None,
    typer.Option(
        "--questions", help="Whose: lab, lab-large, smol or smol-text.", show_default="the model's own, else lab"
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Of the generated example.", show_default="0")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
Attention = Annotated[str, typer.Option("--attention", help="auto, sdpa, eager or flash_attention_2.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings along; read it first.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder to write to.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]

#: What may be counted, and what may be zero besides.
COUNT: dict[str, Any] = {"min": 1, "max": 2**31 - 1}
NUMBER: dict[str, Any] = {"min": 0, "max": 2**31 - 1}


@dataclass(frozen=True)
class Ask:
    """What the model is to be asked: chat messages, and the same for people."""

    messages: list[dict[str, Any]]
    images: "list[Image]"
    question: str
    right: str | None = None


def parse_methods(spellings: list[str], budget: str) -> "list[Method]":
    """Methods as typed, all at `budget` where they do not say otherwise."""
    from kvweave.methods import parse_method
    from kvweave.methods.registry import parse_budget

    with bad_input(option="--budget"):
        default = parse_budget(budget)
    methods = []
    for spelling in spellings:
        with bad_input(option=f"--method {spelling!r}"):
            methods.append(parse_method(spelling, budget=default))
    return methods


def check_model(model: str) -> None:
    """Refuse what holds no checkpoint, here or on the hub, before any work is done."""
    from kvweave.models.source import locate

    with model_errors():
        locate(model)


@contextlib.contextmanager
def model_errors(model: str = "--model") -> Iterator[None]:
    """What is wrong with a model is said of the option that is at fault, `model` unless it is another."""
    from kvweave.models import ModelError

    try:
        yield
    except ModelError as error:
        raise BadInput(f"{model if error.option == 'model' else '--' + error.option}: {error}") from error


def load(model: str, dtype: str, device: str, attention: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """The model and its processor."""
    from kvweave import models

    with err().status(f"loading {model}"), model_errors():
        loaded = models.load(model, dtype, device, attention, trust_remote_code)
    if not models.reads_images(loaded[1]):
        err().print(f"{model} reads text only: loaded by AutoModelForCausalLM, with its tokenizer")
    return loaded


def pick_device(device: str) -> str:
    """The device by this name; with "auto" CUDA where there is one."""
    from kvweave import models

    with model_errors():
        return models.pick_device(device)


def encode(processor: Any, ask: Ask) -> Any:
    """The model's inputs."""
    from kvweave import models

    with bad_input(models.PromptError, option="--image" if ask.images else "--prompt"):
        return models.encode(processor, ask.messages)


def read_ask(
    source: "Source",
    images: list[Path] | None,
    prompt: str | None,
    number: int | None,
    task: str | None,
    seed: int | None,
) -> Ask:
    """The user's own images and prompt, or an example of a source's."""
    own = {"--images": number, "--task": task, "--seed": seed}
    if images or prompt is not None:
        for option, value in own.items():
            if value is not None:
                raise BadInput(
                    f"{option} {value!r} is for the generated example: allowed is either it, or --image and --prompt"
                )
        return _own(images or [], prompt)
    return read_example(source, number, task, seed or 0)


def say_own_world(model: str, ask: Ask) -> None:
    """Say what the embedded model cannot know."""
    from kvweave.evals.one.collect import OWN_WORLD
    from kvweave.models import LABS

    if model in LABS and ask.right is None:
        err().print(OWN_WORLD)


def check_tasks(names: Sequence[str], source: "Source") -> list[str]:
    """A source's tasks by these names; its own if there are none."""
    for name in names:
        if name not in source.all_tasks:
            near = difflib.get_close_matches(name, source.all_tasks, n=1, cutoff=0.4)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise BadInput(f"--task {name!r} is unknown{hint}: allowed is one of {', '.join(source.all_tasks)}")
    return list(names or source.tasks)


def read_example(source: "Source", number: int | None = None, task: str | None = None, seed: int = 0) -> Ask:
    """A hold-out question of a source's."""
    name = source.example if task is None else task
    check_tasks([name], source)
    if not 0 <= seed <= NUMBER["max"]:
        raise BadInput(f"--seed {brief(seed)}: allowed is an int >= 0, below 2**31")
    size = source.example_size if number is None else number
    with bad_input(option=f"--{source.unit} {brief(size)}"):
        example = source.make([name], 1, size)[0].examples(seed)[0]
    pieces = example.messages[0]["content"]
    images = [piece["image"] for piece in pieces if piece["type"] == "image"]
    return Ask(example.messages, images, example.question.removeprefix("question: "), example.answer)


def batch_size(model: str) -> int:
    """Prompts answered together where nothing is said."""
    from kvweave.models import LABS

    sizes = dict.fromkeys(LABS, 50) | {"smol": 20, "smol-text": 8}  # texts may be ten times as long
    return sizes.get(model, 1)


def source(model: str, questions: str | None = None) -> "Source":
    """Whose questions are asked."""
    from kvweave.evals.tasks import sources

    with bad_input(option="--questions"):
        return sources.source(model, questions)


def _own(paths: list[Path], prompt: str | None) -> Ask:
    if prompt is not None and not prompt.strip():
        raise BadInput(f"--prompt {prompt!r} is empty: allowed is text (or no --prompt at all, with --image)")
    images = [_open(path) for path in paths]
    pieces: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    if prompt is not None:
        pieces.append({"type": "text", "text": prompt})
    return Ask([{"role": "user", "content": pieces}], images, prompt or "(images only)")


def _open(path: Path) -> "Image":
    from kvweave.models import PictureError, open_picture

    try:
        return open_picture(path)
    except PictureError as error:
        raise BadInput(f"--image {error}") from error
