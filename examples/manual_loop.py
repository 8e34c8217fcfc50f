"""Decoding by hand: kvweave compresses the cache of any forward pass, with no `generate` around it."""

import torch

import kvweave
import kvweave.lab
import kvweave.models

model, processor = kvweave.models.load("lab")
album = kvweave.lab.example(images=12)
inputs = processor.apply_chat_template(album.messages(), tokenize=True, return_dict=True, return_tensors="pt")

answer = []
with torch.no_grad(), kvweave.compress(model, kvweave.Weave(budget=0.2, defer=2)) as session:
    out = model(**inputs)  # the prompt is compressed once its layers have read it
    while len(answer) < 8 and model.generation_config.eos_token_id not in answer:
        token = out.logits[:, -1:].argmax(-1)
        answer.append(token.item())
        out = model(input_ids=token, past_key_values=session.cache)

print(album.question, processor.decode(answer, skip_special_tokens=True), f"(right: {album.answer})")
print(session)
