"""A file of questions in MileBench's layout, read and checked before anything is asked."""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvweave.ops.brief import brief

LONGEST_ANSWER = 512
MOST = 2**31 - 1  # of anything that is counted
_NEEDED = ("sample_id", "task_instruction_id", "task_instance", "response")


def read(path: Path) -> dict[str, Any]:
    """A file of questions, checked.

    Raises:
        ValueError: it is no JSON (the line is named) or not MileBench's (what is missing, and where).
    """
    return _read(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=32)
def _read(path: Path, changed: int) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path}: its JSON is nested too deeply: allowed is MileBench's layout") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: damaged JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: no UTF-8: {error.reason}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{path}: damaged JSON: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("data"), list) or not data["data"]:
        raise ValueError(f"{path}: no samples: looked for an object with a list 'data'")
    meta = data.get("meta_data")
    if not isinstance(meta, dict) or not isinstance(meta.get("task_instruction"), (list, dict)):
        raise ValueError(f"{path}: looked for 'meta_data' with 'task_instruction', a list or an object")
    _check_meta(meta, path)
    numbers: set[int] = set()
    for n, sample in enumerate(data["data"]):
        _check_sample(sample, f"{path}: sample {n + 1} of the file", meta["task_instruction"])
        if int(sample["sample_id"]) in numbers:
            raise ValueError(f"{path}: sample_id={sample['sample_id']} is there twice")
        numbers.add(int(sample["sample_id"]))
    return data


def _check_meta(meta: dict[str, Any], path: Path) -> None:
    """Refuse what `meta_data` cannot hold beside the instructions."""
    own = meta.get("kvweave", {})
    longest = own.get("max_new_tokens", LONGEST_ANSWER) if isinstance(own, dict) else None
    if type(longest) is not int or not 1 <= longest <= MOST:
        raise ValueError(f"{path}: kvweave={brief(own)}: allowed is an object, its 'max_new_tokens' an int >= 1")
    if not texts(own.get("metrics", [])):
        raise ValueError(f"{path}: metrics={brief(own['metrics'])}: allowed is a list of names")


def texts(value: Any) -> bool:
    """A list of strings."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _check_sample(sample: Any, where: str, instructions: Any) -> None:
    missing = [name for name in _NEEDED if not isinstance(sample, dict) or name not in sample]
    if missing:
        raise ValueError(f"{where}: looked for {', '.join(missing)}")
    where = f"{where} (sample_id {brief(sample['sample_id'])})"
    number = sample["sample_id"]
    if type(number) not in (int, str) or not re.fullmatch("[0-9]{1,18}", str(number)):
        raise ValueError(f"{where}: allowed as sample_id is an int >= 0")
    instance = sample["task_instance"]
    if not isinstance(instance, dict) or not isinstance(instance.get("context"), str):
        raise ValueError(f"{where}: looked for task_instance with a string 'context'")
    if not texts(instance.get("images_path")):
        raise ValueError(f"{where}: looked for a list 'images_path' of file names in its task_instance")
    if not isinstance(instance.get("choice_list", []), list):
        raise ValueError(f"{where}: looked for a list 'choice_list' in its task_instance")
    instruction(instructions, sample["task_instruction_id"], where)


def instruction(instructions: list[str] | Mapping[Any, str], number: Any, where: str = "") -> str:
    """One of the task's instructions: a list's by place, an object's by name."""
    try:
        if isinstance(instructions, list):
            return str(instructions[int(number)])
        return str(instructions[number] if number in instructions else instructions[str(number)])
    except (LookupError, ValueError, TypeError):
        raise ValueError(f"{where}: task_instruction has no entry {brief(number)}") from None
