"""Transformers' pipeline inside `kvweave.compress`: it calls the model's own `generate`, which is all it takes."""

from transformers import pipeline

import kvweave
import kvweave.lab
import kvweave.models

model, processor = kvweave.models.load("lab")
album = kvweave.lab.example(images=12)
answers = pipeline("image-text-to-text", model=model, processor=processor)

with kvweave.compress(model, kvweave.Weave(budget=0.2, defer=2)) as session:
    out = answers(text=album.messages(), max_new_tokens=8, return_full_text=False)

print(f"{album.question} {out[0]['generated_text']} (right: {album.answer})")
print(session)
