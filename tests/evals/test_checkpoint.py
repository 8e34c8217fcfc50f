"""A checkpoint on a disk, with noisy weights, on a folder in MileBench's layout: contexts with several questions."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

import kvweave
from kvweave import lab, models
from kvweave.cli import app
from kvweave.evals import Evaluation, milebench_tasks, run
from kvweave.evals.answer.answering import answer, prepare
from kvweave.evals.run.plan import parse_methods
from kvweave.evals.run.worker import batches

NOISE = 0.5
ENDS = [51, 54]  # tokens that end a reply


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's architecture and processor around weights so noisy that they say all kinds of things."""
    home = tmp_path_factory.mktemp("checkpoint")
    model = AutoModelForImageTextToText.from_pretrained(lab.weights_path(), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += NOISE * weight.std() * torch.randn(weight.shape, generator=generator)
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(home)
    AutoProcessor.from_pretrained(lab.weights_path()).save_pretrained(home)
    return home


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three albums: three questions about the first, one about the second, two about the third."""
    home = tmp_path_factory.mktemp("data") / "MileBench"
    folder = home / "ALFRED" / "images"
    folder.mkdir(parents=True)
    samples: list[dict[str, Any]] = []
    asks = ["what is in image #2 ?", "what did the robot do ?", "what colour is the star in image #1 and #2 ?"]
    for album, questions in enumerate((asks, asks[:1], asks[1:])):
        files = []
        for place, picture in enumerate(lab.example(images=6, seed=album).images[: 2 + album]):
            picture.save(folder / f"{album}-{place}.jpg")
            files.append(f"{album}-{place}.jpg")
        context = "".join(
            f"image #{n + 1} {{image#{n + 1}}} the old lion sleeps near river " for n in range(len(files))
        )
        samples += [
            {
                "sample_id": len(samples) + n,
                "task_instruction_id": 0,
                "task_instance": {"context": context + ask, "images_path": files, "question": ask},
                "response": "up left",
                "image_quantity_level": "Few",
            }
            for n, ask in enumerate(questions)
        ]
    meta = {"task_instruction": ["Look well."], "question_type": "open-ended"}
    (home / "ALFRED" / "ALFRED.json").write_text(json.dumps({"meta_data": meta, "data": samples}))
    return home


def plan(checkpoint: Path, data: Path, **options: Any) -> Evaluation:
    from kvweave.evals import Options

    tasks = milebench_tasks(data, options=Options(max_new_tokens=7))
    methods = parse_methods(["snapkv:window=8"])
    return Evaluation(str(checkpoint), tasks, methods, (0.4,), protocols=("seen", "unseen"), **options)


def test_batches_hold_all_questions_about_a_context(checkpoint: Path, data: Path):
    examples = plan(checkpoint, data).tasks[0].examples(0)
    assert [len(batch) for batch in batches(examples, "unseen", 2)] == [4, 2]
    assert [len(batch) for batch in batches(examples, "seen", 4)] == [4, 2]
    assert len({example.context for example in examples}) == 3


def test_results_do_not_depend_on_the_batch(checkpoint: Path, data: Path, tmp_path: Path):
    alone = run(plan(checkpoint, data), tmp_path / "alone", batch=1)
    together = run(plan(checkpoint, data), tmp_path / "together", batch=3)
    said = set()
    for one, other in zip(alone, together, strict=True):
        assert one["cell"] == other["cell"]
        assert one["missing"] == 0
        assert one["failed"] == []
        for a, b in zip(one["samples"], other["samples"], strict=True):
            assert (a["id"], a["prediction"], a["kept"]) == (b["id"], b["prediction"], b["kept"])
            if one["cell"]["method"] == "full":
                assert a["fidelity"] is None
            else:
                assert a["fidelity"]["kl"] == pytest.approx(b["fidelity"]["kl"], rel=1e-3, abs=1e-4)
                assert a["fidelity"]["kl"] > 0
                assert a["fidelity"]["same"] == b["fidelity"]["same"]
            said.add((a["id"], a["prediction"]))
    assert len(said) > 12  # of 24
    assert len({len(prediction.split()) for _, prediction in said}) > 2


@pytest.fixture
def loaded(checkpoint: Path) -> Iterator[tuple[Any, Any, list[tuple[int, int]]]]:
    """The model, its processor, and (new tokens, rows) of each forward pass."""
    model, processor = models.load(str(checkpoint))
    passes: list[tuple[int, int]] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(tuple(kwargs["inputs_embeds"].shape[1::-1])), with_kwargs=True
    )
    yield model, processor, passes
    hook.remove()


def test_a_context_is_read_and_compressed_once(loaded: Any, checkpoint: Path, data: Path):
    model, processor, passes = loaded
    examples = plan(checkpoint, data).tasks[0].examples(0)
    batch = prepare(processor, examples, "unseen")
    length = batch.inputs["input_ids"].shape[1]
    method = kvweave.SnapKV(budget=0.4, window=8)
    said = answer(model, processor, method, batch, 7)
    assert [rows for new, rows in passes if new == length] == [3]
    assert [new for new, _ in passes if 1 < new < length] == [min(map(len, r.questions)) for r in batch.rounds]
    assert {one.length for one in said[:3]} == {said[0].length}
    for example, one in zip(examples, said, strict=True):
        (alone,) = answer(model, processor, method, prepare(processor, [example], "unseen"), 7)
        assert (alone.text, alone.kept) == (one.text, one.kept)


def test_questions_that_contain_an_end_are_read_to_theirs(loaded: Any, checkpoint: Path, data: Path):
    """Chat templates close the user's turn with a token that also ends a reply."""
    model, processor, _ = loaded
    examples = plan(checkpoint, data).tasks[0].examples(0)
    batch = prepare(processor, examples, "unseen")
    plain = answer(model, processor, kvweave.SnapKV(budget=0.4), batch, 3)
    model.generation_config.eos_token_id = [*ENDS, batch.rounds[0].questions[0][-1]]
    assert [one.text for one in answer(model, processor, kvweave.SnapKV(budget=0.4), batch, 3)] == [
        one.text for one in plain
    ]


@pytest.mark.parametrize("protocol", ["seen", "unseen"])
def test_fidelity_by_plain_forward_passes(loaded: Any, checkpoint: Path, data: Path, protocol: str):
    model, processor, _ = loaded
    example = plan(checkpoint, data).tasks[0].examples(0)[4]
    batch = prepare(processor, [example], protocol)
    (full,) = answer(model, processor, kvweave.get_method("full"), batch, 7, refer=True)
    assert full.reference is not None
    method = kvweave.SnapKV(budget=0.3, window=8)
    (found,) = answer(model, processor, method, batch, 7, references=[full.reference])
    expected = []
    tail = batch.rounds[0].questions[0] + full.reference.tokens
    for one in (kvweave.get_method("full"), method):
        with torch.inference_mode(), kvweave.compress(model, one) as session:
            first = model(**batch.inputs, use_cache=True)
            steps = [model(input_ids=torch.tensor([[t]]), past_key_values=session.cache) for t in tail[:-1]]
            rows = [out.logits[0, -1] for out in (first, *steps)]
        skipped = max(1, len(batch.rounds[0].questions[0]))
        expected.append(torch.stack(rows[skipped:]).double().log_softmax(-1))
    whole, cut = expected
    fidelity = found.fidelity
    assert fidelity is not None
    assert fidelity.tokens == len(whole)
    assert fidelity.kl == pytest.approx(float((whole.exp() * (whole - cut)).sum(-1).mean()), rel=1e-3)
    assert fidelity.top1 == pytest.approx(float((whole.argmax(-1) == cut.argmax(-1)).double().mean()))
    assert fidelity.same == (found.text == full.text)


def test_the_command_on_a_checkpoint_and_a_folder(checkpoint: Path, data: Path, tmp_path: Path):
    arguments = ["eval", "--model", str(checkpoint), "--data", str(data), "--tasks", "ALFRED", "--methods", "snapkv"]
    arguments += ["--budgets", "0.2", "--count", "2", "--max-new-tokens", "3", "--out", str(tmp_path), "--quiet"]
    done = CliRunner().invoke(app, [*arguments, "--truncation", "official", "--tokens-per-image", "25"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "outputs" / f"{checkpoint.name}-snapkv-0.2-seen" / "ALFRED" / "eval.json").is_file()
    row = json.loads((tmp_path / "table.json").read_text())["scores"][0]
    assert (row["metric"], list(row["besides"])) == ("milebench_rouge", ["strict_rouge"])
