"""A method of one's own: a frozen dataclass that says which slots stay, here those whose keys are longest."""

from dataclasses import dataclass

import kvweave
import kvweave.lab
import kvweave.models
from kvweave.methods.base import Method
from kvweave.methods.options import integer
from kvweave.methods.registry import register
from kvweave.ops.select import top_and_recent
from kvweave.plan import Plan
from kvweave.view import LayerView


@register("longest_keys")
@dataclass(frozen=True)
class Longest(Method):
    """Keeps the tokens of longest keys, and the recent ones."""

    recent: int = integer(16, minimum=0, help="last tokens that stay, at most half of the budget")

    def plan(self, view: LayerView, budget: int) -> Plan:
        lengths = view.keys.float().norm(dim=-1)  # [batch, kv_heads, length]
        return Plan(top_and_recent(lengths, budget, min(self.recent, budget // 2)))


model, processor = kvweave.models.load("lab")
album = kvweave.lab.example(images=12)
inputs = processor.apply_chat_template(album.messages(), tokenize=True, return_dict=True, return_tensors="pt")
for spelling in ("longest_keys:budget=0.5,recent=8", "snapkv:budget=0.5"):
    with kvweave.compress(model, spelling) as session:
        out = model.generate(**inputs, max_new_tokens=8)
    answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{spelling}: {answer} (right: {album.answer}); {session}")
