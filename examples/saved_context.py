"""A context on disk: an album is read and compressed by one process, and asked about by another."""

import tempfile
from pathlib import Path

import torch

import kvweave
import kvweave.lab
import kvweave.models

model, processor = kvweave.models.load("lab")
album = kvweave.lab.example(images=12)
prompt = processor.apply_chat_template(album.messages(), tokenize=True, return_dict=True, return_tensors="pt")
asked = processor.tokenizer(album.question, return_tensors="pt")["input_ids"]
context = prompt["input_ids"].shape[1] - asked.shape[1]
columns = ("input_ids", "attention_mask", "mm_token_type_ids")
inputs = {name: x[:, :context] if name in columns else x for name, x in prompt.items()}

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "album.safetensors"
    cache = kvweave.CompressedCache(model.config, kvweave.Weave(budget=0.4, form="spelled"), hold=True)
    with kvweave.attach(model), torch.no_grad():
        model(**inputs, past_key_values=cache)
        cache.compress(probes="default", processor=processor)
        cache.save(path)
    print(f"{context} tokens in {path.stat().st_size:,} bytes")

    # From here on it could be another process, on another day: it needs the file and the model, no pictures.
    cache = kvweave.CompressedCache.load(path, model)
    with kvweave.attach(model), cache.question(asked) as inputs:
        out = model.generate(**inputs, max_new_tokens=8)
    answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{album.question} {answer} (right: {album.answer})")
