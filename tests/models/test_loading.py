"""From names to models: what is refused at once, what a checkpoint may not do, what a picture may not be."""

import builtins
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from inputs import bomb
from kvweave import lab, models
from kvweave.models import loading, source

EMBEDDED = Path(models.check("lab"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """A copy of the embedded model, with something changed."""

    def make(config: dict[str, Any] | None = None, change: Callable[[dict], dict] = dict) -> Path:
        home = tmp_path / "checkpoint"
        home.mkdir(exist_ok=True)
        for file in (*EMBEDDED.glob("*.json"), *EMBEDDED.glob("*.jinja")):
            (home / file.name).write_text(file.read_text())
        told = json.loads((home / "config.json").read_text())
        (home / "config.json").write_text(json.dumps(told | (config or {})))
        weights = load_file(EMBEDDED / "model.safetensors")
        save_file(change(weights), home / "model.safetensors", {"format": "pt"})
        return home

    return make


# -------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name",
    [
        "lap",
        "gpt2",
        "owner/",
        "/name",
        "a/b/c",
        "./nowhere",
        "~/nowhere",
        "owner/na me",
        "",
        " ",
        "..",
        "a/..",
        "x" * 5000,
    ],
)
def test_names_that_no_model_has_are_refused_at_once(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source, "_unreached", lambda name: pytest.fail("the hub was asked"))
    started = time.perf_counter()
    with pytest.raises(models.ModelError, match=r"model='.*(does not exist|folder).* allowed is lab") as refused:
        models.load(name)
    assert time.perf_counter() - started < 1
    assert len(str(refused.value)) < 500
    assert ("did you mean 'lab'" in str(refused.value)) == (name == "lap")


def test_ids_of_the_hub_are_names():
    for name in ("Qwen/Qwen2.5-VL-7B-Instruct", "a/b", "google/gemma-3-4b-it"):
        assert models.check(name) == name


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch):
    asked = []

    class Api:
        def model_info(self, name: str, timeout: float) -> None:
            asked.append(timeout)
            raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    source._unreached.cache_clear()
    for read in (models.load, models.checkpoint_mark, models.load_tokenizer):
        with pytest.raises(models.ModelError, match=r"'owner/none' is not on this machine, .* \(no route to host\)$"):
            read("owner/none")
    assert asked == [5.0]  # once: what waits in vain waits once
    source._unreached.cache_clear()


def test_a_hub_without_the_model_says_so(monkeypatch: pytest.MonkeyPatch):
    class Api:
        def model_info(self, name: str, timeout: float) -> None:
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    with pytest.raises(models.ModelError, match="'owner/gone' is not on the hub, or is private"):
        models.load("owner/gone")


@pytest.mark.parametrize(
    ("option", "value"), [("dtype", "int3"), ("device", "cuda:77"), ("device", "tpu9"), ("attention", "flash")]
)
def test_errors_say_which_option_is_at_fault(option: str, value: str):
    with pytest.raises(models.ModelError, match=f"{option}={value!r}.* allowed is") as refused:
        models.load(**{option: value})
    assert refused.value.option == option


def test_an_attention_that_is_not_installed_is_its_own_fault():
    with pytest.raises(models.ModelError, match="attention='flash_attention_3' is not available") as refused:
        models.load(attention="flash_attention_3")
    assert refused.value.option == "attention"


# -------------------------------------------------------------------- checkpoints


def test_a_whole_checkpoint_is_loaded(checkpoint: Callable[..., Path]):
    model, _ = models.load(str(checkpoint()))
    mine, theirs = model.state_dict(), models.load()[0].state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("layer", ["mlp.down_proj", "input_layernorm", "embed_tokens"])
def test_a_checkpoint_that_lacks_a_weight_is_refused(checkpoint: Callable[..., Path], layer: str):
    def without(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        gone = next(name for name in weights if layer in name)
        return {name: weight for name, weight in weights.items() if name != gone}

    home = checkpoint(change=without)
    with pytest.raises(models.ModelError, match=rf"lacks the weight \S*{layer}\S*.*: allowed is a whole checkpoint"):
        models.load(str(home))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "processor_config.json", "model.safetensors"])
@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{", "[" * 100_000, '{"model_type": []}', '{"model_type": {"a": 1}}']
)
def test_damaged_files_are_one_line(checkpoint: Callable[..., Path], file: str, text: str):
    home = checkpoint()
    (home / file).write_text(text)
    try:
        models.load(str(home))
    except models.ModelError as refused:
        assert len(str(refused).splitlines()) == 1  # noqa: PT017


def test_a_tied_weight_is_not_missing(tmp_path: Path):
    sizes = {"vocab_size": 160, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    models.load_tokenizer("lab").save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model, _ = models.load(str(tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(checkpoint: Callable[..., Path], value: float):
    home = checkpoint(change=lambda weights: {name: torch.full_like(x, value) for name, x in weights.items()})
    with pytest.raises(models.ModelError, match=r"its weight .* holds NaN or infinity: allowed is finite numbers"):
        models.load(str(home))


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], bool]:
    """Whether a checkpoint's code has not run; nobody is asked anything on the way."""
    monkeypatch.setattr(builtins, "input", lambda *words: pytest.fail("asked on stdin"))
    return lambda: not (tmp_path / "ran").exists()


def test_custom_code_never_runs_unless_it_is_trusted(
    checkpoint: Callable[..., Path], untouched: Callable[[], bool], tmp_path: Path
):
    maps = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    home = checkpoint({"model_type": "their_own", "auto_map": maps})
    (home / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise RuntimeError('it ran')\n")
    with pytest.raises(models.ModelError, match=r"needs code that it brings along.* --trust-remote-code"):
        models.load(str(home))
    models.load_tokenizer(str(home))
    assert untouched()
    with pytest.raises(models.ModelError, match="cannot be loaded"):
        models.load(str(home), trust_remote_code=True)
    assert not untouched()


def test_custom_code_beside_our_own_is_left_alone(
    checkpoint: Callable[..., Path], untouched: Callable[[], bool], tmp_path: Path
):
    home = checkpoint({"auto_map": {"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model"}})
    wrecker = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    (home / "code.py").write_text(wrecker)
    (home / "custom_generate").mkdir()
    (home / "custom_generate" / "generate.py").write_text(wrecker + "def generate(model, **kwargs): pass\n")
    model, processor = models.load(str(home))
    sample = lab.example(2, task="lookup")
    model.generate(**models.encode(processor, sample.messages()), max_new_tokens=2)
    assert untouched()


# -------------------------------------------------------------------- pictures


@pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (12_000, 12_000), (60_000, 60_000), (2**30, 2**30)])
def test_a_picture_of_too_many_pixels_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, height: int
):
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("it was decoded"))
    with pytest.raises(models.PictureError, match=r"bomb\.png' has .*pixels: allowed is at most 100,000,000"):
        models.open_picture(bomb(tmp_path / "bomb.png", width, height))


def test_the_processor_is_given_no_file(tmp_path: Path):
    _, processor = models.load()
    messages = [
        {"role": "user", "content": [{"type": "image", "image": str(bomb(tmp_path / "b.png", 20_000, 9_000))}]}
    ]
    with pytest.raises(models.PictureError, match="at most"):
        models.encode(processor, messages)
    path = tmp_path / "a.png"
    picture = lab.example(2, task="lookup").images[0]
    picture.save(path)
    read, given = (
        models.encode(processor, [{"role": "user", "content": [{"type": "image", "image": image}]}])
        for image in (str(path), picture)
    )
    assert all(torch.equal(read[name], given[name]) for name in given)


def test_files_that_are_no_pictures(tmp_path: Path):
    (tmp_path / "words.png").write_text("words")
    for name, words in (("words.png", "cannot be read"), ("gone.png", "does not exist"), (".", "is a folder")):
        with pytest.raises(models.PictureError, match=f"{words}.*: allowed is"):
            models.open_picture(tmp_path / name)


class TestTorchvision:
    """It is built for one torch: what a mismatch breaks is far from what it says."""

    @pytest.fixture
    def broken(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision/__init__.py").write_text(
            "raise RuntimeError('operator torchvision::nms does not exist')"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "torchvision", raising=False)

    @pytest.mark.usefixtures("broken")
    def test_a_mismatch_is_named_with_its_cure(self) -> None:
        with pytest.raises(models.ModelError) as refused, loading.refusals("some/model"):
            raise ModuleNotFoundError("Could not import module 'AutoProcessor'.")
        said = str(refused.value)
        assert said.startswith(
            f"model='some/model' cannot be loaded: torchvision does not fit torch {torch.__version__}"
        )
        assert "operator torchvision::nms does not exist" in said
        assert "pip install --force-reinstall torch torchvision" in said

    def test_other_faults_keep_their_words(self) -> None:
        with (
            pytest.raises(models.ModelError, match=r"cannot be loaded: no such thing"),
            loading.refusals("some/model"),
        ):
            raise OSError("no such thing")

    def test_a_missing_one_is_named_with_its_extra(self) -> None:
        with (
            pytest.raises(models.ModelError, match=r"pip install 'kvweave\[vision\]'"),
            loading.refusals("some/model"),
        ):
            raise ImportError("it requires the Torchvision library")


# -------------------------------------------------------------------- conversations


@pytest.mark.parametrize("wrong", ["what is this?", [], ["what is this?"], [{"role": "user"}], None], ids=repr)
def test_what_is_no_conversation_is_refused(wrong):
    _, processor = models.load()
    with pytest.raises(models.PromptError, match="is no conversation: allowed is a list of turns, such as"):
        models.encode(processor, wrong)
    with pytest.raises(models.PromptError, match="no conversation is given"):
        models.encode(processor)


def test_a_turn_may_be_a_text_for_a_tokenizer_too():
    _, processor = models.load()
    turns = [{"role": "user", "content": "what color is it ?"}]
    pieces = [{"role": "user", "content": [{"type": "text", "text": "what color is it ?"}]}]
    for reader in (processor, processor.tokenizer):
        ids, same = (models.encode(reader, turn)["input_ids"] for turn in (turns, pieces))
        assert ids.tolist() == same.tolist()


def test_torchs_names_of_dtypes_are_taken():
    assert models.load(dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    with pytest.raises(models.ModelError, match="dtype='float64' is not allowed"):
        models.load(dtype=torch.float64)
