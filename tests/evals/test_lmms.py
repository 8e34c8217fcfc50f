"""The adapter for lmms-eval against a stand-in of its interface, and MileBench's tasks as it reads them."""

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from kvweave.evals import Evaluation, lab_tasks, milebench_tasks, run
from kvweave.evals.run.plan import parse_methods
from kvweave.evals.tasks.export import export
from kvweave.evals.tasks.lmms_tasks import doc_to_messages, process_results, write_tasks


class StandInModel:
    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}


@dataclass
class StandInManifest:
    model_id: str
    chat_class_path: str


class StandInMessages:
    """What lmms-eval makes of a task's messages."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self.messages = messages

    def to_hf_messages(self) -> list[dict[str, Any]]:
        return [
            {
                "role": turn["role"],
                "content": [
                    piece if piece["type"] == "text" else {"type": "image", "image": piece["url"]}
                    for piece in turn["content"]
                ],
            }
            for turn in self.messages
        ]


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, content in {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"Instance": SimpleNamespace},
        "lmms_eval.api.model": {"lmms": StandInModel},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": StandInManifest},
        "lmms_eval.protocol": {"ChatMessages": StandInMessages},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "kvweave.evals.tasks.lmms", raising=False)
    return importlib.import_module("kvweave.evals.tasks.lmms")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    data, folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("tasks")
    for task in lab_tasks(["lookup", "change"], 4, 4):
        export(task, data)
    return data, folder, write_tasks(data, folder)


def docs(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_tasks_are_written_as_it_reads_them(written: tuple[Path, Path, list[str]]):
    _, folder, names = written
    assert names == ["milebench_change", "milebench_lookup"]
    assert yaml.safe_load((folder / "milebench.yaml").read_text()) == {"group": "milebench", "task": names}
    text = (folder / "milebench_change.yaml").read_text()
    assert "doc_to_messages: !function kvweave_functions.doc_to_messages" in text
    settings = yaml.safe_load(text.replace("!function ", ""))
    assert settings["dataset_kwargs"]["data_files"]["test"] == str(folder / "milebench_change.jsonl")
    assert [one["metric"] for one in settings["metric_list"]] == ["exact", "rouge_l"]
    assert settings["generation_kwargs"] == {"max_new_tokens": 6, "do_sample": False, "until": []}
    (turn,) = doc_to_messages(docs(folder, "milebench_change")[0])
    assert [piece["type"] for piece in turn["content"]] == ["text", "image"] * 4 + ["text"]


def test_it_scores_what_an_evaluation_scores(written: tuple[Path, Path, list[str]], adapter: Any, tmp_path: Path):
    data, folder, names = written
    (manifest,) = adapter.manifests()
    home, _, name = manifest.chat_class_path.rpartition(".")
    model = getattr(importlib.import_module(home), name)("lab", method="snapkv:kernel=3;window=16", budget=0.3)
    assert (model.method.spelling(), model.is_simple) == ("snapkv:budget=0.3,window=16,kernel=3", False)
    requests = []
    for task in names:
        model.task_dict[task] = {"test": docs(folder, task)}
        settings = {"max_new_tokens": 6, "do_sample": False, "until": [" "] if task == "milebench_lookup" else []}
        requests += [SimpleNamespace(args=("", doc_to_messages, settings, n, task, "test")) for n in (2, 0, 3, 1)]
    model.batch_size = 3
    said = model.generate_until(requests)
    plan = Evaluation("lab", milebench_tasks(data), parse_methods(["snapkv:kernel=3,window=16"]), (0.3,))
    for result in run(plan, tmp_path)[-2:]:
        task = f"milebench_{result['cell']['task']}"
        expected = [result["samples"][n]["prediction"] for n in (2, 0, 3, 1)]
        found = [one for one, request in zip(said, requests, strict=True) if request.args[4] == task]
        assert found == ([text.partition(" ")[0] for text in expected] if task == "milebench_lookup" else expected)
        if task == "milebench_change":
            scores = [
                process_results(docs(folder, task)[n], [text]) for n, text in zip((2, 0, 3, 1), found, strict=True)
            ]
            assert scores == [result["samples"][n]["scores"] for n in (2, 0, 3, 1)]


def test_what_it_does_not_do_is_refused(adapter: Any):
    with pytest.raises(ValueError, match="model_args colour"):
        adapter.KVWeave("lab", colour="red")
    model = adapter.KVWeave("lab")
    with pytest.raises(ValueError, match="do_sample=True"):
        model.generate_until([SimpleNamespace(args=("", None, {"do_sample": True}, 0, "t", "test"))])
    for call in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="generate_until"):
            call([])
