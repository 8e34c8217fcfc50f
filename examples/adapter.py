"""A model with PEFT's adapters: kvweave finds the model inside, and its adapters run as ever. `pip install peft`."""

import torch
from peft import LoraConfig, get_peft_model

import kvweave
import kvweave.lab
import kvweave.models

model, processor = kvweave.models.load("lab")
torch.manual_seed(0)
adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
adapted = get_peft_model(model, adapters).eval()
album = kvweave.lab.example(images=12)
inputs = processor.apply_chat_template(album.messages(), tokenize=True, return_dict=True, return_tensors="pt")

with kvweave.compress(adapted, kvweave.Weave(budget=0.2, defer=2)) as session:
    out = adapted.generate(**inputs, max_new_tokens=8)
    with adapted.disable_adapter():
        same = adapted.generate(**inputs, max_new_tokens=8)

for name, tokens in {"adapted": out, "without its adapters": same}.items():
    answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{name}: {answer} (right: {album.answer})")
print(session)
