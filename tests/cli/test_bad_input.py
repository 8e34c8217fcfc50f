"""Every bad input ends in one line that names the option, its value and what is allowed, with exit code 2."""

from pathlib import Path

import pytest

from kvweave import models

BEFORE_LOADING = {
    "budget zero": (["run", "--budget", "0"], ["--budget", "budget=0", "allowed is a share in (0, 1]"]),
    "budget negative": (["run", "--budget", "-0.5"], ["--budget", "budget=-0.5", "allowed is"]),
    "budget above one": (["run", "--budget", "1.5"], ["--budget", "budget=1.5", "allowed is"]),
    "budget nan": (["run", "--budget", "nan"], ["--budget", "budget=nan", "allowed is"]),
    "budget no number": (["run", "--budget", "lots"], ["--budget", "budget='lots'", "allowed is"]),
    "budget no unit": (["run", "--budget", "12parsecs"], ["--budget", "budget='12parsecs'", "MiB"]),
    "budget of a method": (["run", "--method", "snapkv:budget=2.0"], ["--method", "budget=2.0", "allowed is"]),
    "budget of 400 digits": (["run", "--budget", "9" * 400], ["--budget", "budget='999", "9...", "allowed is"]),
    "budget of 5000 digits": (["run", "--budget", "9" * 5000], ["--budget", "budget='999", "9...", "allowed is"]),
    "bytes of 400 digits": (["run", "--budget", "9" * 400 + "MiB"], ["--budget", "more than any cache holds"]),
    "budgets of 400 digits": (["eval", "--budgets", "9" * 400, "--quiet"], ["budget=", "allowed is"]),
    "a module that is not imported": (
        ["run", "--method", "this.x"],
        ["--method 'this.x'", "is not imported", "--plugin"],
    ),
    "no module at all": (["run", "--method", "..x"], ["--method '..x'", "is not imported"]),
    "a module's name to describe": (["methods", "..x"], ["methods: method='..x'", "is not imported"]),
    "an option that every call has": (["run", "--method", "snapkv:name=x"], ["name='x' is no option of snapkv"]),
    "option of 400 digits": (
        ["run", "--method", f"snapkv:defer_weight={10**400}"],
        ["--method", "defer_weight='1000", "is not allowed", "[0, 1)"],
    ),
    "itself within itself": (
        ["run", "--method", "quantized:method=quantized"],
        ["method='quantized' is not allowed"],
    ),
    "seed of 400 digits": (["run", "--seed", "9" * 400], ["--seed", "..."]),
    "images of 400 digits": (["run", "--images", "9" * 400], ["--images", "1 to 12"]),
    "name too long for a file": (
        ["run", "--out", "x" * 5000],
        ["--out", "File name too long", "allowed is a folder"],
    ),
    "name too long for a model": (["run", "--model", "x" * 5000], ["--model", "does not exist", "allowed is"]),
    "one word as model": (["run", "--model", "gpt2"], ["--model", "'gpt2' does not exist", "owner/name"]),
    "no such plugin": (["--plugin", "nowhere", "run"], ["--plugin", "plugin='nowhere' cannot be imported"]),
    "unknown method": (
        ["run", "--method", "flowm"],
        ["--method 'flowm'", "did you mean 'flowmm'", "allowed is one of"],
    ),
    "unknown option": (
        ["run", "--method", "flowmm:thta=0.2"],
        ["thta='0.2' is no option of flowmm", "did you mean 'theta'", "allowed is"],
    ),
    "option out of range": (
        ["run", "--method", "flowmm:sensitivity_quantile=2"],
        ["sensitivity_quantile=2.0", "a number in [0, 1]"],
    ),
    "option no number": (["run", "--method", "flowmm:theta=big"], ["theta='big'", "allowed is a number"]),
    "option without value": (["run", "--method", "flowmm:theta"], ["'theta'", "allowed is name=value"]),
    "missing image": (["run", "--image", "nowhere.png"], ["--image 'nowhere.png' does not exist", "allowed is"]),
    "unreadable image": (["run", "--image", "words.png"], ["--image 'words.png' cannot be read", "allowed is"]),
    "folder as image": (["flow", "--image", "."], ["--image '.' is a folder", "allowed is"]),
    "empty prompt": (["run", "--image", "picture.png", "--prompt", " "], ["--prompt ' ' is empty", "allowed is"]),
    "empty prompt of flow": (["flow", "--prompt", ""], ["--prompt '' is empty", "allowed is"]),
    "no such folder": (["run", "--model", "./nowhere"], ["--model", "'./nowhere' does not exist", "allowed is"]),
    "file as model": (["run", "--model", "./words.png"], ["--model", "'./words.png' is a file", "allowed is"]),
    "no weights": (["run", "--model", "empty"], ["--model", "'empty' is a folder without weights", "allowed is"]),
    "no config": (["flow", "--model", "."], ["--model", "'.' is a folder without config.json", "allowed is"]),
    "unknown task": (["run", "--task", "lokup"], ["--task 'lokup'", "did you mean 'lookup'", "allowed is one of"]),
    "too many images": (["run", "--images", "13"], ["--images 13", "1 to 12"]),
    "no room for the task": (["run", "--images", "1", "--task", "change"], ["--images 1", "a pair takes 2"]),
    "negative seed": (["run", "--seed", "-1"], ["--seed -1", "allowed is an int >= 0"]),
    "two kinds of prompt": (["run", "--prompt", "hello", "--task", "lookup"], ["--task 'lookup'", "allowed is"]),
    "file as out": (["run", "--out", "words.png"], ["--out 'words.png'", "allowed is a folder"]),
    "file above out": (["flow", "--out", "words.png/deep"], ["--out", "words.png is a file", "allowed is a folder"]),
    "no such option": (["run", "--budgt", "1"], ["--budgt", "--budget"]),
    "no whole number": (["run", "--max-new-tokens", "few"], ["--max-new-tokens", "few"]),
    "no tokens": (["run", "--max-new-tokens", "0"], ["--max-new-tokens", "0"]),
    "no such command": (["runn"], ["runn"]),
    "unknown method to describe": (["methods", "snapk"], ["'snapk'", "did you mean 'snapkv'", "allowed is one of"]),
    "theta nan": (["flow", "--theta", "nan"], ["--theta", "nan", "allowed is a number"]),
    "theta infinite": (["flow", "--theta", "inf"], ["--theta", "inf", "allowed is a number"]),
    "method to evaluate": (["eval", "--methods", "flowm"], ["'flowm'", "did you mean 'flowmm'", "allowed is one of"]),
    "task to examine": (["lab", "eval", "--task", "lokup"], ["--task 'lokup'", "did you mean 'lookup'"]),
    "images to examine": (["lab", "eval", "--images", "99"], ["--images 99", "1 to 12"]),
}


@pytest.fixture
def rubbish(picture: Path) -> None:
    """Things that are not what they seem, beside the picture."""
    folder = picture.parent
    (folder / "words.png").write_text("no picture")
    (folder / "empty").mkdir()
    (folder / "empty/config.json").write_text("{}")


@pytest.mark.usefixtures("rubbish")
@pytest.mark.parametrize("case", BEFORE_LOADING)
def test_refused_before_a_model_is_loaded(kvweave, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    def load(*arguments: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(models, "load", load)
    arguments, wanted = BEFORE_LOADING[case]
    done = kvweave(*arguments)
    _refused(done, wanted)


LOADING = {
    "dtype": (["run", "--dtype", "int3"], ["--dtype: dtype='int3'", "allowed is one of auto, float32"]),
    "attention": (
        ["flow", "--attention", "flash"],
        ["--attention: attention='flash'", "allowed is one of auto, sdpa, eager"],
    ),
    "device": (["run", "--device", "cuda:77"], ["--device: device='cuda:77'", "allowed is auto or one of cpu"]),
    "device to train on": (["lab", "train", "--device", "tpu9"], ["--device", "device='tpu9'", "allowed is auto"]),
    "no checkpoint": (["run", "--model", "empty"], ["model='empty' cannot be loaded"]),
}


@pytest.mark.usefixtures("rubbish")
@pytest.mark.parametrize("case", LOADING)
def test_refused_while_loading(kvweave, case: str) -> None:
    Path("empty/model.safetensors").write_bytes(b"")
    arguments, wanted = LOADING[case]
    _refused(kvweave(*arguments), wanted)


@pytest.mark.parametrize("kind", ["sliding", "recurrent"])
def test_a_model_without_layers_to_compress(kvweave, tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

    small = {"vocab_size": 160, "hidden_size": 32, "num_hidden_layers": 2}
    if kind == "sliding":
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32, "sliding_window": 8}
        MistralForCausalLM(MistralConfig(**small, **heads)).save_pretrained(tmp_path / "model")
    else:
        MambaForCausalLM(MambaConfig(**small, state_size=4)).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(models.check("lab")).save_pretrained(tmp_path / "model")
    for command in ("run", "flow"):
        done = kvweave(command, "--model", tmp_path / "model", "--prompt", "code of eagle is tango mike")
        assert done.code == 2, done.err
        assert "--model" in done.err
        assert "allowed is" in done.err
        assert not list(Path("out").glob("*"))


def _refused(done: tuple[int, str, str], wanted: list[str]) -> None:
    code, out, err = done
    assert code == 2, err
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("kvweave: ")
    assert "Traceback" not in err
    assert "unexpected" not in err
    assert len(err) < 2500
    for words in wanted:
        assert words in err
    assert not Path("out").exists()


def test_a_folder_that_cannot_be_written_in_the_end(kvweave, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError("No space left on device")

    monkeypatch.setattr("kvweave.cli.console.tempfile.mkdtemp", full)
    done = kvweave("flow", "--images", 1, "--out", "there")
    assert done.code == 2
    assert "--out 'there': No space left on device; allowed is a folder that can be written to" in done.err
