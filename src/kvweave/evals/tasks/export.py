"""Any task written out in MileBench's format, images as files; `kvweave.evals.tasks.milebench` reads it back."""

from pathlib import Path
from typing import Any

from kvweave.evals.run import store
from kvweave.evals.tasks.tasks import Example, Task


def export(task: Task, folder: Path, seed: int = 0) -> Path:
    """Write `folder/<task>/<task>.json` and its images.

    Args:
        task: its examples hold pictures, not files' names, in one user turn.
        folder: new or not; files of an earlier export of the task are replaced.
    Returns:
        The file of questions.
    """
    home = folder / task.name
    (home / "images").mkdir(parents=True, exist_ok=True)
    examples = task.examples(seed)
    data = [_sample(n, example, home / "images") for n, example in enumerate(examples)]
    meta = {
        "dataset": task.name,
        "task_instruction": [""],
        "question_type": "open-ended",
        "num_sample": len(data),
        "kvweave": {"metrics": list(task.metrics), "max_new_tokens": task.max_new_tokens},
    }
    path = home / f"{task.name}.json"
    store.write_json(path, {"meta_data": meta, "data": data}, indent=4)
    return path


def _sample(number: int, example: Example, folder: Path) -> dict[str, Any]:
    words: list[str] = []
    files: list[str] = []
    for piece in example.messages[0]["content"]:
        if piece["type"] == "text":
            words.append(piece["text"])
            continue
        files.append(f"{number}-{len(files) + 1}.png")
        piece["image"].save(folder / files[-1])
        words.append(f"{{image#{len(files)}}}")
    count = len(files)
    return {
        "sample_id": number,
        "task_instruction_id": 0,
        "task_instance": {"context": " ".join(words), "images_path": files, "question": example.question},
        "response": example.answer,
        "image_quantity_level": "Few" if count < 6 else "Medium" if count <= 31 else "Many",
    }
