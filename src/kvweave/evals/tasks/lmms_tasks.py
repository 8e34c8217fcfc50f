"""MileBench's tasks for lmms-eval: `python -m kvweave.evals.tasks.lmms_tasks DATA FOLDER`, then
`lmms-eval --include_path FOLDER --tasks milebench`. Needs no lmms-eval itself.

For each task a YAML and its samples as they are asked, a line each; scored as `kvweave eval` scores them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from kvweave.evals.run import store
from kvweave.evals.scores.metrics import METRICS
from kvweave.evals.tasks.milebench import MileBenchTask, Options, milebench_tasks
from kvweave.models import open_picture

GROUP = "milebench"
_FUNCTIONS = "from kvweave.evals.tasks.lmms_tasks import doc_to_messages, process_results\n"
_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {lines}
test_split: test
output_type: generate_until
doc_to_text: ""
doc_to_target: answer
doc_to_messages: !function kvweave_functions.doc_to_messages
process_results: !function kvweave_functions.process_results
generation_kwargs:
  max_new_tokens: {longest}
  do_sample: false
  until: []
metric_list:
{metrics}"""
_METRIC = "  - metric: {name}\n    aggregation: mean\n    higher_is_better: true\n"


def write_tasks(data: Path, folder: Path, options: Options | None = None) -> list[str]:
    """Write lmms-eval's tasks for a folder in MileBench's layout; their names, which the group `milebench` joins."""
    tasks = milebench_tasks(data, options=options)
    names = [_write_task(task, folder) for task in tasks]
    store.write_text(folder / "kvweave_functions.py", _FUNCTIONS)
    listed = "".join(f"  - {name}\n" for name in names)
    store.write_text(folder / f"{GROUP}.yaml", f"group: {GROUP}\ntask:\n{listed}")
    return names


def _write_task(task: MileBenchTask, folder: Path) -> str:
    name = f"{GROUP}_{task.name.lower().replace('-', '_')}"
    lines = folder / f"{name}.jsonl"
    rows = [_row(task, example) for example in task.examples(0) if not example.error]
    store.write_text(lines, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    metrics = "".join(_METRIC.format(name=metric) for metric in task.metrics)
    text = _TASK.format(
        name=name, lines=json.dumps(str(lines.resolve())), longest=task.max_new_tokens, metrics=metrics
    )
    store.write_text(folder / f"{name}.yaml", text)
    return name


def _row(task: MileBenchTask, example: Any) -> dict[str, Any]:
    pieces = [
        {"type": piece["type"], "content": piece.get("text") or piece.get("image")}
        for piece in example.messages[0]["content"]
    ]
    return {
        "id": example.id,
        "pieces": pieces,
        "answer": example.answer,
        "choices": list(example.choices),
        "metrics": list(task.metrics),
    }


def doc_to_messages(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> list[dict[str, Any]]:
    """One user turn, texts and images interleaved."""
    content = []
    for piece in doc["pieces"]:
        if piece["type"] == "text":
            content.append({"type": "text", "text": piece["content"]})
        else:
            content.append({"type": "image", "url": open_picture(piece["content"])})
    return [{"role": "user", "content": content}]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Each metric's score of one answer."""
    return {name: METRICS[name](results[0], doc["answer"], doc["choices"] or ()) for name in doc["metrics"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder in MileBench's layout")
    parser.add_argument("folder", type=Path, help="where to write, for --include_path")
    parser.add_argument("--count", type=int, help="the first so many samples of each task")
    arguments = parser.parse_args()
    print("\n".join(write_tasks(arguments.data, arguments.folder, Options(count=arguments.count))))
