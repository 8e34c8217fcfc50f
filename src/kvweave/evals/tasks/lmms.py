"""Any model of transformers under any method, as a model of lmms-eval, which finds it by its entry point.

    lmms-eval --model kvweave --model_args pretrained=Qwen/Qwen2.5-VL-7B-Instruct,method=flowmm,budget=0.2 \\
              --tasks mmmu_val

Imported by lmms-eval only; `kvweave.evals.tasks.lmms_tasks` writes MileBench's tasks for it.
"""

import re
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages

from kvweave import models
from kvweave.evals.answer.answering import answer, prepare
from kvweave.evals.tasks.tasks import Example
from kvweave.methods import parse_method
from kvweave.methods.registry import load_plugin

_ARGUMENTS = ("pretrained", "method", "budget", "batch_size", "device", "dtype", "trust_remote_code", "plugin")
_LONGEST = 512  # tokens of an answer where the task says nothing


def manifests() -> list[ModelManifest]:
    """What the entry point `lmms_eval.models` offers."""
    return [ModelManifest(model_id="kvweave", chat_class_path="kvweave.evals.tasks.lmms.KVWeave")]


class KVWeave(lmms):
    """A model that answers greedily, its cache compressed.

    Args:
        pretrained: "lab", a folder or a hub id.
        method: its spelling, options separated by semicolons: "flowmm:theta=0.3;proxies=16".
        budget: a share, or tokens as an int.
        trust_remote_code: run code that the checkpoint brings along.
        plugin: module that is imported first, for the methods that it registers.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        method: str = "full",
        budget: float | int = 1.0,
        batch_size: int | str = 1,
        device: str = "auto",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        plugin: str = "",
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(f"model_args {', '.join(unknown)}: allowed is {', '.join(_ARGUMENTS)}")
        if plugin:
            load_plugin(plugin)
        self.method = parse_method(method.replace(";", ","), budget=budget)
        self.batch_size = int(batch_size)
        self.model, self.processor = models.load(
            pretrained, dtype, device or "auto", trust_remote_code=trust_remote_code
        )

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of the requests."""
        texts: dict[int, str] = {}
        alike: dict[str, list[int]] = {}
        for n, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[2].items())), []).append(n)
        for numbers in alike.values():
            for some in _batched(numbers, self.batch_size):
                texts |= zip(some, self._answers([requests[n] for n in some]), strict=True)
        return [texts[n] for n in range(len(requests))]

    def _answers(self, requests: list[Instance]) -> list[str]:
        """Answers to requests with the same settings."""
        settings = requests[0].args[2]
        if settings.get("do_sample") or settings.get("num_beams", 1) > 1:
            raise ValueError("do_sample=True and num_beams > 1 are not allowed: kvweave evaluates greedy answers")
        examples = []
        for request in requests:
            _, messages_of, _, number, task, split = request.args
            chat = ChatMessages(messages=messages_of(self.task_dict[task][split][number]))
            examples.append(Example(f"{task}/{split}/{number}", chat.to_hf_messages(), "", ""))
        batch = prepare(self.processor, examples, "seen")
        answers = answer(self.model, self.processor, self.method, batch, settings.get("max_new_tokens", _LONGEST))
        stops = settings.get("until") or []
        pattern = "|".join(re.escape(stop) for stop in ([stops] if isinstance(stops, str) else stops) if stop)
        return [re.split(pattern, one.text, maxsplit=1)[0] if pattern else one.text for one in answers]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "kvweave evaluates generated answers: allowed are tasks of output_type generate_until"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("kvweave evaluates single turns: allowed are tasks of output_type generate_until")


def _batched(numbers: list[int], size: int) -> list[list[int]]:
    return [numbers[at : at + size] for at in range(0, len(numbers), size)]
